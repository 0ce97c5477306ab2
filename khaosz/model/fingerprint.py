"""A hash of a model's weights: whether two files, in whatever format, hold the same model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


def weights_fingerprint(model: nn.Module) -> str:
    """BLAKE2b of every parameter's name, shape and fp32 values, in threads. A billion parameters
    take five seconds on two cores, about as long as to load them."""
    parameters = dict(model.named_parameters())
    return parameters_fingerprint(parameters, lambda name: parameters[name].detach())


def parameters_fingerprint(
    names: Iterable[str], read: Callable[[str], Tensor], *, threads: int = 8
) -> str:
    """`weights_fingerprint` of parameters that are read by name, one in each thread at a time."""

    def hashed(name: str) -> bytes:
        values = read(name).to("cpu", torch.float32).contiguous()
        digest = hashlib.blake2b(f"{name} {tuple(values.shape)}".encode(), digest_size=16)
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor(min(os.cpu_count() or 1, threads)) as pool:
        parts = pool.map(hashed, sorted(names))
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()
