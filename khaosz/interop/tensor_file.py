"""Safetensors files, one tensor at a time.

The library maps a file into memory, where every page that was read counts as resident until the
file is closed, and its writer takes all tensors together. Here a tensor is read into memory of its
own, in the data type that is wanted, and written as soon as it is computed: the peak is one tensor.

Format: https://huggingface.co/docs/safetensors (8 bytes: length of the header; the header in JSON;
the tensors' bytes).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from khaosz.errors import ModelError, one_line
from khaosz.files import atomic_file

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes, of the tensors' beginning
# Elements that are converted at a time. glibc's malloc maps blocks larger than any that was freed,
# so a small buffer keeps the tensors out of its heaps, which would be fragmented: 100 MB of 900.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `type` is the format's name, such as BF16."""

    type: str
    shape: tuple[int, ...]
    offset: int  # in the file

    @property
    def type_name(self) -> str:
        """The type as PyTorch names it: torch.int8 for I8."""
        name = self.type.lower()
        for letter, kind in (("bf", "bfloat"), ("f", "float"), ("i", "int"), ("u", "uint")):
            if name.startswith(letter):
                return f"torch.{kind}{name.removeprefix(letter)}"
        return f"torch.{name}"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class TensorFile:
    """The tensors of one safetensors file; `entries` by name."""

    def __init__(self, path: Path) -> None:
        """Raises `ModelError` for a file that is missing, broken or cut short."""
        self.path = path
        try:
            # The library checks every size and offset against the file.
            with safe_open(str(path), framework="pt") as checked:
                names = list(checked.keys())
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise ModelError(f"{path}: broken or cut short ({one_line(str(error))})") from None
        self.entries = {
            name: Entry(
                header[name]["dtype"],
                tuple(header[name]["shape"]),
                8 + length + header[name]["data_offsets"][0],
            )
            for name in names
        }

    def read(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """A tensor, by default in the type that it is stored in; raises `ModelError`."""
        entry = self.entries[name]
        out = torch.empty(entry.shape, dtype=dtype or DTYPES[entry.type], device=device)
        self.fill(name, out)
        return out

    def fill(self, name: str, out: Tensor, first: int = 0) -> None:
        """Read into `out`, contiguous, the tensor's elements from `first` on; raises
        `ModelError`."""
        entry, flat = self.entries[name], out.view(-1)
        dtype = DTYPES[entry.type]
        if out.dtype == dtype and out.device.type == "cpu":
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.offset + first * dtype.itemsize)
                self._read_into(file, flat, name)
            return
        start = 0
        for part in self.chunks(name, first, len(flat)):
            flat[start : start + len(part)] = part
            start += len(part)

    def chunks(self, name: str, first: int = 0, count: int | None = None) -> Iterator[Tensor]:
        """`count` elements of the tensor, by default all, in pieces of one dimension, all in the
        same buffer."""
        entry = self.entries[name]
        dtype, count = DTYPES[entry.type], entry.numel if count is None else count
        buffer = torch.empty(min(count, _CHUNK), dtype=dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + first * dtype.itemsize)
            for start in range(0, count, _CHUNK):
                part = buffer[: count - start]
                self._read_into(file, part, name)
                yield part

    def _read_into(self, file: object, part: Tensor, name: str) -> None:
        rest = part.view(torch.uint8).numpy().data
        while rest:
            count = file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise ModelError(f"{self.path}: cut short in tensor '{name}'")
            rest = rest[count:]


def write_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file atomically; its tensors are requested one at a time, by name.
    Raises OSError."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    names, offset = sorted(shapes), 0  # the library's order, where all have one type
    for name in names:
        end = offset + torch.Size(shapes[name]).numel() * dtype.itemsize
        values = {
            "dtype": _NAMES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        header[name], offset = values, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            value = tensor(name).detach().to("cpu", dtype).contiguous()
            assert tuple(value.shape) == shapes[name], (name, value.shape, shapes[name])
            file.write(value.view(-1).view(torch.uint8).numpy().data)
            del value  # before the next one is computed
