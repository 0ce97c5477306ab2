from __future__ import annotations

from serving import service, taught, tiny

__all__ = ["service", "taught", "tiny"]
