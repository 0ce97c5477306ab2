"""Products with quantised matrices as stored in a GGUF file: `quantised.cpp`, compiled once for
this processor and stored in the user's cache.

Without a compiler, with one that fails, or with `KHAOSZ_NATIVE=0`, matrices are repacked for
PyTorch's kernel (`packed.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from khaosz.files import default_cache, publish
from khaosz.interop.gguf.file import TENSOR_TYPES

SOURCES = [Path(__file__).with_name(name) for name in ("quantised.cpp", "quantised_blocks.h")]
LEAST_ROWS = 16  # of a matrix that the library takes: its widest tile
_OPTIONS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-w"]
_SECONDS = 180  # to compile: usually two or three
_VECTORS = 1  # the least `khaosz_level` to use: 0 is code for a processor without vectors


class MappedMatrix:
    """Rows of GGUF tensors of one type, stacked, never copied. An output depends on its row of
    inputs alone, bitwise: not on other rows, nor on the number of threads."""

    def __init__(self, library: ctypes.CDLL, raws: Sequence[np.ndarray], kind: str) -> None:
        number, block, size = TENSOR_TYPES[kind]
        row_bytes = raws[0].shape[1]
        for raw in raws:  # the library does not check them
            assert len(raw) >= LEAST_ROWS, raw.shape
            assert raw.dtype == np.uint8 and raw.flags.c_contiguous, (raw.dtype, raw.strides)
            assert raw.shape[1] == row_bytes and row_bytes % size == 0, (raw.shape, kind)
        self._raws = list(raws)  # keeps the map open
        self.columns, self.rows = row_bytes // size * block, sum(map(len, raws))
        self.nbytes = sum(raw.nbytes for raw in raws)
        self._multiply, self._pool, self._number = library.khaosz_multiply, _pool(), number
        self._data = (ctypes.c_void_p * len(raws))(*(raw.ctypes.data for raw in raws))
        self._counts = (ctypes.c_int64 * len(raws))(*map(len, raws))

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs) in the dtype of `x`, from 16 bits of each input."""
        assert x.dim() == 2 and x.shape[1] == self.columns and len(x) < 2**31, x.shape
        wide = x.float().contiguous()
        out = torch.empty(len(x), self.rows)
        inputs = wide.data_ptr(), len(wide), self.columns
        weights = self._data, self._counts, len(self._raws)
        rest = out.data_ptr(), self._pool, torch.get_num_threads()
        status = self._multiply(self._number, *inputs, *weights, *rest)
        if status == 2:
            raise MemoryError("no memory for the inputs of a matrix")
        assert status == 0, status
        return out if x.dtype == out.dtype else out.to(x.dtype)


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they can't be compiled or would be slow."""
    if os.environ.get("KHAOSZ_NATIVE") == "0":
        return None
    try:
        return _library(os.environ.get("CXX", ""), default_cache() / "native")
    except (RuntimeError, ValueError):  # no home directory; an unbalanced quote in CXX
        return None


@cache
def _library(cxx: str, folder: Path) -> ctypes.CDLL | None:
    """Compiled by the user's compiler, or by the first that can."""
    for command in [shlex.split(cxx)] if cxx.strip() else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) is None:
            continue
        for processor in (["-march=native"], ["-mcpu=native"], []):
            try:
                library = _compiled([*command, *processor], folder)
            except (OSError, subprocess.SubprocessError):
                continue
            return library if library.khaosz_level() >= _VECTORS else None
    return None


def _compiled(command: list[str], folder: Path) -> ctypes.CDLL:
    """From the cache, if sources, compiler and processor are the same. Raises OSError and
    SubprocessError."""
    # A compiler's predefined macros show its version and the processor it targets.
    traits = _run([*command, "-x", "c++", "-dM", "-E", os.devnull])
    key = hashlib.sha256(repr([command, _OPTIONS]).encode() + traits)
    for source in SOURCES:
        key.update(source.read_bytes())
    suffix = ".dll" if sys.platform == "win32" else ".so"
    path = folder / f"quantised-{key.hexdigest()[:24]}{suffix}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):  # code is loaded from there
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise OSError(f"{folder} is writable by other users")
    try:
        return _opened(path)
    except OSError:  # not there, or broken
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            out = Path(temporary) / path.name
            _run([*command, *_OPTIONS, "-o", str(out), str(SOURCES[0])])
            publish(out, path)
        return _opened(path)


def _run(command: list[str]) -> bytes:
    quiet = subprocess.DEVNULL
    return subprocess.run(
        command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, timeout=_SECONDS, check=True
    ).stdout


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, small, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.khaosz_multiply.argtypes = [
        *(small, pointer, long, long, pointer, pointer, small, pointer, pointer, small)
    ]
    return library


@cache
def _pool() -> ctypes.c_void_p | None:
    """GOMP_parallel of PyTorch's own OpenMP threads, if it has them. A second pool would compete
    with them, both spinning while they wait."""
    no_load = getattr(os, "RTLD_NOLOAD", None)
    if no_load is not None:
        home = Path(torch.__file__).parent
        places = [home / "lib", home.parent / "torch.libs"]
        files = [str(f) for place in places for f in sorted(place.glob("lib*omp*"))]
        for name in ["libgomp.so.1", *files]:
            try:
                opened = ctypes.CDLL(name, mode=no_load | os.RTLD_NOW)
                return ctypes.cast(opened.GOMP_parallel, ctypes.c_void_p)
            except (OSError, AttributeError):
                continue
    return None
