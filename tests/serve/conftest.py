from __future__ import annotations

from browser_helpers import browser
from serving import service, taught, tiny

__all__ = ["browser", "service", "taught", "tiny"]
