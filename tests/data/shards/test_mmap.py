from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.data.shards.mmap import (
    HEADER_BYTES,
    MmapFileHandler,
    TokenFileWriter,
    encode_header,
    token_dtype,
)
from khaosz.errors import TokenFileError

GIGABYTE = 1 << 30


def write(
    path: Path, documents: list[list[int]], *, vocab_size: int = 1000, masks: Any = None
) -> Path:
    writer = TokenFileWriter(
        path,
        vocab_size=vocab_size,
        stage="pt" if masks is None else "sft",
        fingerprint="f" * 64,
    )
    for i, document in enumerate(documents):
        mask = None if masks is None else np.array(masks[i], dtype=np.uint8)
        writer.append(np.array(document, dtype=np.int64), np.array([len(document)]), mask, 7)
    writer.close()
    return path


def rewrite_header(path: Path, change: dict[str, Any], version: int = 1) -> None:
    """Another header with a right checksum: damage that only the checks of fields can see."""
    raw = bytearray(path.read_bytes())
    length = struct.unpack("<I", raw[12:16])[0]
    header = {**json.loads(raw[16 : 16 + length]), **change}
    head = bytearray(encode_header(header))
    head[8:12] = struct.pack("<I", version)
    head[-4:] = struct.pack("<I", zlib.crc32(head[:-4]))
    path.write_bytes(bytes(head) + bytes(raw[HEADER_BYTES:]))


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), max_size=20), max_size=12),
    cut=st.integers(0, 12),
)
def test_documents_come_back_also_after_a_resume(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("tok")
    masks = [[token % 2 for token in document] for document in documents]
    plain = write(folder / "plain.tok", documents, vocab_size=70_000, masks=masks)
    path = folder / "resumed.tok"
    settings_of = {"vocab_size": 70_000, "stage": "sft", "fingerprint": "f" * 64}
    writer = TokenFileWriter(path, **settings_of)  # type: ignore[arg-type]
    state = None
    for i, document in enumerate(documents):
        if i == cut:
            state = json.loads(json.dumps(writer.flush()))
        tokens = np.array(document, dtype=np.int64)
        writer.append(tokens, np.array([len(document)]), (tokens % 2).astype(np.uint8), 7)
    if state is not None:  # everything behind the flush is dropped and written again
        writer.abandon()
        writer = TokenFileWriter(path, state=state, **settings_of)  # type: ignore[arg-type]
        for document in documents[cut:]:
            tokens = np.array(document, dtype=np.int64)
            writer.append(tokens, np.array([len(document)]), (tokens % 2).astype(np.uint8), 7)
    writer.close()
    assert path.read_bytes() == plain.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["plain.tok", "resumed.tok"]
    with MmapFileHandler(path) as handler:
        handler.verify()
        assert len(handler) == len(documents)
        assert [handler.document(i).tolist() for i in range(len(handler))] == documents
        assert handler.loss_mask is not None
        assert handler.loss_mask.tolist() == [bit for mask in masks for bit in mask]
        assert handler.n_bytes == 7 * len(documents)
        flat = [token for document in documents for token in document]
        assert [t for view in handler.pieces("tokens", step=3) for t in view.tolist()] == flat


def test_narrowest_type_that_holds_the_vocabulary(tmp_path: Path) -> None:
    small = write(tmp_path / "small.tok", [[65_535]], vocab_size=65_536)
    large = write(tmp_path / "large.tok", [[65_536]], vocab_size=65_537)
    assert MmapFileHandler(small).tokens.dtype == np.uint16
    assert MmapFileHandler(large).tokens.dtype == np.uint32
    assert MmapFileHandler(large).document(0).tolist() == [65_536]


def test_views_share_the_map_and_sections_are_aligned(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tok", [[1, 2, 3], [4]], masks=[[0, 1, 1], [1]])
    handler = MmapFileHandler(path)
    assert not handler.document(0).flags.owndata and not handler.document(0).flags.writeable
    assert all(s["offset"] % 64 == 0 for s in handler.header["sections"].values())
    view = handler.document(1)
    handler.close()
    assert view.tolist() == [4]  # a view outlives its handler


def test_no_documents_and_empty_documents(tmp_path: Path) -> None:
    with MmapFileHandler(write(tmp_path / "none.tok", [])) as none:
        none.verify()
        assert len(none) == 0 and list(none.pieces("tokens")) == []
        with pytest.raises(IndexError):
            none.document(0)
    with MmapFileHandler(write(tmp_path / "empty.tok", [[], [5], []])) as empty:
        empty.verify()
        assert [len(empty.document(i)) for i in range(3)] == [0, 1, 0]
        with pytest.raises(IndexError):
            empty.document(-1)


def test_a_handler_reopens_in_another_process(tmp_path: Path) -> None:
    handler = MmapFileHandler(write(tmp_path / "a.tok", [[1, 2], [3]]))
    # What multiprocessing does to an argument; no pickle is ever stored.
    again = pickle.loads(pickle.dumps(handler))
    assert again.document(1).tolist() == [3]


def test_truncation_is_detected_at_open(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tok", [[1, 2, 3]] * 50, masks=[[0, 1, 1]] * 50).read_bytes()
    cut = tmp_path / "cut.tok"
    for length in (0, 5, 4000, 4096, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(TokenFileError):
            MmapFileHandler(cut)
    with pytest.raises(TokenFileError, match="cut short"):
        MmapFileHandler(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(TokenFileError, match="too long"):
        MmapFileHandler(cut)
    with pytest.raises(TokenFileError, match="cannot open"):
        MmapFileHandler(tmp_path / "missing.tok")
    cut.write_bytes(b"PK\x03\x04" + bytes(5000))
    with pytest.raises(TokenFileError, match="not a token file"):
        MmapFileHandler(cut)


def test_verify_detects_a_flipped_bit_in_every_section(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tok", [[1, 2, 3]] * 50, masks=[[0, 1, 1]] * 50)
    whole = path.read_bytes()
    sections = MmapFileHandler(path).header["sections"]
    for name, section in sections.items():
        damaged = bytearray(whole)
        damaged[section["offset"] + 16] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(TokenFileError, match=rf"section {name}|offsets go backwards"):
            MmapFileHandler(path).verify()
    for position in (8, 12, 20, 100, 4000, 4095):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(TokenFileError):
            MmapFileHandler(path)


def test_rejects_wrong_version_and_inconsistent_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tok", [[1, 2, 3]])
    whole = path.read_bytes()
    rewrite_header(path, {}, version=2)
    with pytest.raises(TokenFileError, match="format version 2"):
        MmapFileHandler(path)
    sections = MmapFileHandler(write(tmp_path / "b.tok", [[1, 2, 3]])).header["sections"]
    huge = {**sections, "tokens": {**sections["tokens"], "count": 2**60}}
    below = {**sections, "tokens": {**sections["tokens"], "offset": -64}}
    odd = {**sections, "tokens": {**sections["tokens"], "dtype": "object"}}
    for change in (
        {"sections": huge},
        {"sections": huge, "n_tokens": 2**60},
        {"sections": below},
        {"sections": odd},
        {"sections": {"tokens": sections["tokens"]}},
        {"sections": None},
        {"n_documents": -1},
        {"n_documents": 10**9},
        {"n_tokens": 2, "sections": {**sections, "tokens": {**sections["tokens"], "count": 2}}},
        {"stage": "rm"},
        {"vocab_size": 70_000},
        {"fingerprint": None},
    ):
        path.write_bytes(whole)
        rewrite_header(path, change)
        with pytest.raises(TokenFileError):
            MmapFileHandler(path)


def test_resume_refuses_parts_that_lost_data(tmp_path: Path) -> None:
    path = tmp_path / "a.tok"
    settings_of = {"vocab_size": 10, "stage": "pt", "fingerprint": ""}
    writer = TokenFileWriter(path, **settings_of)  # type: ignore[arg-type]
    writer.append(np.array([1, 2]), np.array([2]), None, 2)
    state = writer.flush()
    writer.abandon()
    assert not path.exists()
    os.truncate(tmp_path / "a.tok.partial", HEADER_BYTES + 1)
    with pytest.raises(TokenFileError, match="were written before"):
        TokenFileWriter(path, state=state, **settings_of)  # type: ignore[arg-type]


def sparse_file(path: Path, n_tokens: int) -> Path:
    """A valid token file of one document that is nearly all hole; its checksums are not real."""
    offset = HEADER_BYTES + 2 * n_tokens
    header = {
        "stage": "pt",
        "vocab_size": 1000,
        "fingerprint": "",
        "n_tokens": n_tokens,
        "n_documents": 1,
        "n_bytes": 0,
        "sections": {
            "tokens": {"dtype": "uint16", "offset": HEADER_BYTES, "count": n_tokens, "crc32": 0},
            "doc_offsets": {"dtype": "uint64", "offset": offset, "count": 2, "crc32": 0},
        },
    }
    with open(path, "wb") as file:
        file.write(encode_header(header))
        try:
            file.truncate(offset + 16)
        except OSError:
            pytest.skip("this file system has no room for a sparse file")
        file.seek(offset)
        file.write(struct.pack("<QQ", 0, n_tokens))
    if not hasattr(os, "statvfs") or path.stat().st_blocks * 512 > GIGABYTE:
        path.unlink()
        pytest.skip("this file system does not store holes as holes")
    return path


def iterate_within(handler: MmapFileHandler, start: int, stop: int, limit: int) -> int:
    process = psutil.Process()
    before = process.memory_info().rss
    n = 0
    for view in handler.pieces("tokens", start, stop):
        assert not view.any()
        n += len(view)
        assert process.memory_info().rss - before < limit
    return n


@pytest.mark.skipif(sys.platform != "linux", reason="madvise frees pages at once on Linux only")
def test_a_20_gb_file_needs_200_mb(tmp_path: Path) -> None:
    n_tokens = 10 * GIGABYTE
    with MmapFileHandler(sparse_file(tmp_path / "big.tok", n_tokens)) as handler:
        assert handler.path.stat().st_size > 20 * GIGABYTE
        part = GIGABYTE // 4  # tokens: 512 MB, enough to break the limit if pages stayed
        assert iterate_within(handler, 0, part, 200 << 20) == part
        assert iterate_within(handler, n_tokens - part, n_tokens, 200 << 20) == part


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="madvise frees pages at once on Linux only")
def test_the_whole_20_gb_file_needs_200_mb(tmp_path: Path) -> None:
    n_tokens = 10 * GIGABYTE
    with MmapFileHandler(sparse_file(tmp_path / "big.tok", n_tokens)) as handler:
        assert iterate_within(handler, 0, n_tokens, 200 << 20) == n_tokens


def test_token_dtype_boundaries() -> None:
    assert token_dtype(65_536).itemsize == 2
    assert token_dtype(65_537).itemsize == 4
