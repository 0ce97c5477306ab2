from __future__ import annotations

from serving import service, tiny

__all__ = ["service", "tiny"]
