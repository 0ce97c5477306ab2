"""The GGUF container, versions 2 and 3: metadata and tensors in memory-mapped files.

A model may be split into files NAME-00001-of-00003.gguf: each has keys split.no (from 0) and
split.count, the first one the metadata, and all of them together split.tensors.count tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length, offset and
size is checked against the bytes of the file before it is used, so a broken or hostile file takes
no more memory than its size, and is rejected with one `ModelError`.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.errors import ModelError, quoted
from khaosz.files import atomic_file, disk_hint

MAGIC = b"GGUF"
_ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
_MAX_NAME = 65_535  # bytes of a key, by the format document; a tensor's name may have 64
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 100_000  # tensors, keys: an entry of 32 bytes costs twenty times that in memory
# Scalar metadata by type number: struct code. 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
SPLIT_NAME = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)

# name: (number in the file, elements of a block, bytes of a block); ggml-common.h
TENSOR_TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
    "BF16": (30, 1, 2),
    "MXFP4": (39, 32, 17),
}
_NAME_OF = {number: name for name, (number, _, _) in TENSOR_TYPES.items()}
# Types of llama.cpp that are not read, and the nearest that is: by bits of a weight.
_FOREIGN = {
    9: ("Q8_1", "Q8_0"), 16: ("IQ2_XXS", "Q2_K"), 17: ("IQ2_XS", "Q2_K"), 18: ("IQ3_XXS", "Q3_K"),
    19: ("IQ1_S", "Q2_K"), 21: ("IQ3_S", "Q3_K"), 22: ("IQ2_S", "Q2_K"), 24: ("I8", "Q8_0"),
    25: ("I16", "F16"), 26: ("I32", "F32"), 27: ("I64", "F32"), 28: ("F64", "F32"),
    29: ("IQ1_M", "Q2_K"), 34: ("TQ1_0", "Q2_K"), 35: ("TQ2_0", "Q2_K"), 40: ("NVFP4", "MXFP4"),
    41: ("Q1_0", "Q2_K"),
}  # fmt: skip


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF file by its name or, as Ollama's blobs, by its content."""
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a folder, or not there
        return False


@dataclass(frozen=True)
class GgufTensor:
    """`shape` is row-major, as numpy has it: (rows, columns), the reverse of the file's."""

    type: str
    shape: tuple[int, ...]
    offset: int  # in the file
    nbytes: int
    part: int = 0  # which file, of a split model


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    def __init__(self, data: memoryview, source: str) -> None:
        self.data, self.source, self.at = data, source, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> memoryview:
        if count > self.left:
            raise ModelError(
                f"{self.source}: cut short: {what} needs {count:,} bytes, {self.left:,} are left"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self.take(size, what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.number("Q", what)
        if limit is not None and length > limit:
            raise ModelError(f"{self.source}: {what} of {length:,} bytes is longer than {limit:,}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self.source}: {what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"the text of {quoted(key)}")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise ModelError(f"{self.source}: {quoted(key)} is of unknown type {kind}")
        return self.number(_SCALARS[kind], quoted(key))

    def array(self, key: str) -> Any:
        kind, count = self.number("I", quoted(key)), self.number("Q", quoted(key))
        if kind == _STRING:
            if count * 8 > self.left:
                raise ModelError(
                    f"{self.source}: {quoted(key)} claims {count:,} texts, more than fit"
                )
            return self._texts(count, key)
        if kind not in _SCALARS:
            # Arrays of arrays are allowed by the format and used by no model we read.
            raise ModelError(f"{self.source}: {quoted(key)} is an array of unsupported type {kind}")
        dtype = np.dtype(f"<{_SCALARS[kind]}" if kind != 7 else "?")
        return np.frombuffer(self.take(count * dtype.itemsize, quoted(key)), dtype=dtype)

    def _texts(self, count: int, key: str) -> list[str]:
        """Vocabularies have a hundred thousand of them: one tight loop."""
        data, at, end = self.data, self.at, len(self.data)
        length_at = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                if at > end:
                    raise ModelError(f"{self.source}: cut short: a text of {quoted(key)}")
                texts.append(str(data[start:at], "utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            raise ModelError(f"{self.source}: a text of {quoted(key)} is broken: {error}") from None
        self.at = at
        return texts


class GgufFile:
    """`metadata` values are int, float, bool, str, list[str] or a numpy array; `raw` gives a
    tensor's bytes without a copy."""

    def __init__(self, data: memoryview, source: str, *, size: int | None = None) -> None:
        """Parses from a buffer, which with `size` is the start of a file of so many bytes. Raises
        `ModelError` for anything that is not right."""
        end = len(data) if size is None else size
        self.source = source
        self._data = [data]  # of all parts
        self._maps: list[mmap.mmap] = []
        cursor = _Cursor(data, source)
        if bytes(cursor.take(4, "the magic")) != MAGIC:
            raise ModelError(f"{source}: not a GGUF file")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            what = "big-endian GGUF" if big else f"GGUF version {version}"
            raise ModelError(f"{source}: {what} is not supported", hint="versions 2 and 3 are")
        tensors, pairs = cursor.number("Q", "a count"), cursor.number("Q", "a count")
        # The smallest metadata pair takes 13 bytes, the smallest tensor entry 32.
        if pairs * 13 + tensors * 32 > cursor.left:
            raise ModelError(f"{source}: {tensors:,} tensors and {pairs:,} keys cannot fit")
        if max(tensors, pairs) > _MAX_ENTRIES:
            raise ModelError(f"{source}: {tensors:,} tensors and {pairs:,} keys are too many")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text("a key", _MAX_NAME)
            if key in self.metadata:
                raise ModelError(f"{source}: key {quoted(key)} comes twice")
            self.metadata[key] = cursor.value(cursor.number("I", quoted(key)), key)
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise ModelError(
                f"{source}: general.alignment {quoted(alignment)} is not a multiple of 8"
            )
        entries = [self._entry(cursor) for _ in range(tensors)]
        start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, tensor in entries:
            if name in self.tensors:
                raise ModelError(f"{source}: tensor {quoted(name)} comes twice")
            offset = start + tensor.offset
            if tensor.offset % alignment or offset + tensor.nbytes > end:
                raise ModelError(
                    f"{source}: tensor {quoted(name)} ({tensor.nbytes:,} bytes at {offset:,}) lies"
                    f" outside the file of {end:,} bytes or off its alignment"
                )
            self.tensors[name] = GgufTensor(tensor.type, tensor.shape, offset, tensor.nbytes)

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Maps a file into memory or, given any part of a split model, all of its files. Raises
        `ModelError`, also for a part that is missing."""
        path = Path(path)
        whole = cls._mapped(path)
        count = whole._split("count", 1)
        if count <= 1:
            return whole
        name = SPLIT_NAME.fullmatch(path.name)
        number = whole._split("no", 0) + 1
        if name is None or (int(name["number"]), int(name["count"])) != (number, count):
            raise ModelError(
                f"{path}: part {number} of {count} of a model, which its name does not say",
                hint=f"name the parts NAME-{1:05}-of-{count:05}.gguf and so on",
            )
        files = [path.with_name(part) for part in split_names(path.name)]
        for part, file in enumerate(files, 1):
            if not file.exists():
                raise ModelError(
                    f"{path}: part {part} of {count} is missing: {file.name}",
                    hint="all parts of a split model must be in one folder",
                )
        parts = [whole if file == path else cls._mapped(file) for file in files]
        parts[0].join(parts[1:])
        return parts[0]

    @classmethod
    def _mapped(cls, path: Path) -> GgufFile:
        try:
            with open(path, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise ModelError(f"{path}: empty")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
        opened = cls(memoryview(mapped), str(path))
        opened._maps = [mapped]
        return opened

    def _split(self, key: str, default: int) -> int:
        value = self.metadata.get(f"split.{key}", default)
        if not isinstance(value, int) or not 0 <= value <= _MAX_ENTRIES:
            raise ModelError(f"{self.source}: split.{key} {quoted(value)} is not a whole number")
        return value

    def join(self, others: list[GgufFile]) -> None:
        """Take the tensors of the other parts of a split model. Raises `ModelError`."""
        count = len(others) + 1
        for number, part in enumerate([self, *others]):
            if (part._split("no", 0), part._split("count", 1)) != (number, count):
                raise ModelError(
                    f"{part.source}: part {part._split('no', 0) + 1} of {part._split('count', 1)},"
                    f" not {number + 1} of {count}"
                )
            if number:
                for name, tensor in part.tensors.items():
                    if name in self.tensors:
                        raise ModelError(f"{part.source}: tensor {quoted(name)} comes twice")
                    self.tensors[name] = replace(tensor, part=number)
                self._data += part._data
                self._maps += part._maps
        total = self._split("tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise ModelError(
                f"{self.source}: the parts have {len(self.tensors)} tensors, not {total}"
            )

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(map(len, self._data))

    def release(self) -> None:
        """Release the pages that were read: the file stays mapped, and is read again on demand."""
        for mapped in self._maps if hasattr(mmap, "MADV_DONTNEED") else ():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _entry(self, cursor: _Cursor) -> tuple[str, GgufTensor]:
        name = cursor.text("a tensor's name", _MAX_NAME)
        dimensions = cursor.number("I", f"tensor {quoted(name)}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ModelError(f"{self.source}: tensor {quoted(name)} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q", f"tensor {quoted(name)}") for _ in range(dimensions))[::-1]
        what = f"tensor {quoted(name)}"
        number, offset = cursor.number("I", what), cursor.number("Q", what)
        if number not in _NAME_OF:
            known, nearest = _FOREIGN.get(number, (f"number {number}", ""))
            raise ModelError(
                f"{self.source}: tensor {quoted(name)} is of unsupported type {known}",
                hint=(f"the nearest is {nearest}; " if nearest else "")
                + f"supported: {', '.join(TENSOR_TYPES)}",
            )
        kind = _NAME_OF[number]
        _, block, size = TENSOR_TYPES[kind]
        count = math.prod(shape)
        if not count or shape[-1] % block:
            raise ModelError(
                f"{self.source}: tensor {quoted(name)} of {kind} has shape {shape}, not whole"
                f" blocks of {block}"
            )
        return name, GgufTensor(kind, shape, offset, count // block * size)

    def raw(self, name: str) -> np.ndarray:
        """uint8 (rows, bytes of a row), a read-only view of the file."""
        tensor = self.tensors[name]
        _, block, size = TENSOR_TYPES[tensor.type]
        row = tensor.shape[-1] // block * size
        flat = np.frombuffer(self._data[tensor.part], np.uint8, tensor.nbytes, tensor.offset)
        return flat.reshape(-1, row)


def split_names(name: str) -> list[str]:
    """The names of all parts of a split model, of any one's; of another file, its own."""
    match = SPLIT_NAME.fullmatch(name)
    if match is None:
        return [name]
    parts = range(1, int(match["count"]) + 1)
    return [f"{match['name']}-{part:05}-of-{match['count']}{name[-5:]}" for part in parts]


@dataclass(frozen=True)
class TensorToWrite:
    """`rows()` yields uint8 arrays that join to the tensor's bytes, so that a tensor need not be
    in memory as a whole."""

    name: str
    type: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterable[np.ndarray]]


def write_gguf(path: Path, metadata: dict[str, Any], tensors: list[TensorToWrite]) -> None:
    """Write a version 3 file atomically. Metadata: bool, int (uint32), float (float32), str,
    list[str], numpy int32 or float32 array."""
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), _encoded(value)]
    offset = 0
    for tensor in tensors:
        number, block, size = TENSOR_TYPES[tensor.type]
        nbytes = int(np.prod(tensor.shape)) // block * size
        head.append(_text(tensor.name))
        head.append(struct.pack("<I", len(tensor.shape)))
        head.append(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1]))
        head.append(struct.pack("<IQ", number, offset))
        offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as file:
            file.write(b"".join(head))
            for tensor in tensors:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                for rows in tensor.rows():
                    file.write(np.ascontiguousarray(rows).data)
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise ModelError(what, hint=disk_hint(error)) from error


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _encoded(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", _STRING) + _text(value)
        case np.ndarray():
            kind = {"u1": 0, "i4": 5, "f4": 6, "b1": 7}[value.dtype.str[1:]]
            return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.tobytes()
        case list():
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    raise TypeError(f"metadata of type {type(value).__name__}")
