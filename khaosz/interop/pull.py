"""Fetching models, for programs: `fetch/` has the parts."""

from khaosz.interop.fetch.pull import pull
from khaosz.interop.fetch.store import models_folder, pulled_models

__all__ = ["models_folder", "pull", "pulled_models"]
