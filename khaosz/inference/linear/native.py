"""Products with quantised matrices as stored in a GGUF file: `quantised.cpp`, compiled once for
this processor and stored in the user's cache.

Without a compiler, with one that fails, or with `KHAOSZ_NATIVE=0`, matrices are repacked for
PyTorch's kernel (`packed.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from khaosz.files import default_cache, publish
from khaosz.interop.gguf.file import TENSOR_TYPES

_log = logging.getLogger("khaosz.inference")

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


def dequantise(library: ctypes.CDLL, raw: np.ndarray, kind: str, out: Tensor) -> None:
    """Raw rows, uint8 (R, bytes of a row) of a quantised type, as numbers: `out` (R, C) is fp32 or
    bf16, contiguous."""
    number, block, size = TENSOR_TYPES[kind]
    rows, columns = len(raw), raw.shape[1] // size * block  # the library does not check them
    assert rows >= LEAST_ROWS and raw.dtype == np.uint8 and raw.flags.c_contiguous, raw.shape
    assert out.shape == (rows, columns) and out.is_contiguous(), (out.shape, raw.shape)
    halves = {torch.float32: 0, torch.bfloat16: 1}[out.dtype]
    place, rest = out.data_ptr(), (halves, _pool(), torch.get_num_threads())
    status = library.khaosz_dequantise(number, raw.ctypes.data, rows, columns, place, *rest)
    assert status == 0, status


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
    """From the cache, if sources, compiler and processor are the same, and the file's name has the
    hash of its content: loading a damaged one would kill the process. Raises OSError and
    SubprocessError."""
    # A compiler's predefined macros show its version and the processor it targets.
    traits = _run([*command, "-x", "c++", "-dM", "-E", os.devnull])
    key = hashlib.sha256(repr([command, _OPTIONS]).encode() + traits)
    for source in SOURCES:
        key.update(source.read_bytes())
    suffix = ".dll" if sys.platform == "win32" else ".so"
    name = f"quantised-{key.hexdigest()[:24]}"
    try:
        _check_private(folder)
    except OSError as error:
        _log.warning("the compiled kernel is not cached: %s", error)
        place = None
    else:
        place = folder
        for path in sorted(folder.glob(f"{name}*{suffix}")):
            with suppress(OSError):
                if path.name == f"{name}-{_digest(path)}{suffix}":
                    return _opened(path)
            with suppress(OSError):  # damaged, or from another system
                path.unlink()
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as temporary:
        out = Path(temporary) / f"{name}{suffix}"
        _run([*command, *_OPTIONS, "-o", str(out), str(SOURCES[0])])
        library = _opened(out)  # before others can see or remove it
        if place is not None:
            try:
                publish(out, place / f"{name}-{_digest(out)}{suffix}")
            except OSError as error:
                _log.warning("the compiled kernel is not cached: %s", error)
    return library


def _check_private(folder: Path) -> None:
    """Code is loaded from `folder`. Raises OSError where it cannot be created or written, or other
    users can write it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise OSError(f"{folder} is writable by other users")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} is not writable")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


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
    library.khaosz_dequantise.argtypes = [
        *(small, pointer, long, long, pointer, small, pointer, small)
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
