"""A hash of training examples that are held in memory."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def fingerprint(*values: Any) -> str:
    """BLAKE2b of arrays, texts, numbers, and lists and dictionaries of them."""
    hashed = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        match value:
            case np.ndarray():
                hashed.update(f"{value.dtype}{value.shape}".encode())
                hashed.update(np.ascontiguousarray(value).tobytes())
            case list() | tuple():
                hashed.update(f"[{len(value)}".encode())
                for each in value:
                    add(each)
            case dict():
                add(sorted(value.items(), key=lambda item: repr(item[0])))
            case _:
                hashed.update(f"{type(value).__name__}{value!r},".encode())

    add(values)
    return hashed.hexdigest()
