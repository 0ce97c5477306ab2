from __future__ import annotations

from browsing import browser
from serving import service, taught, tiny

__all__ = ["browser", "service", "taught", "tiny"]
