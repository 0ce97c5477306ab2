"""From prepared tokens to batches: what a model would be shown, checked against the documents."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from khaosz.data.batches.batch import IGNORE, Batch
from khaosz.data.batches.dataset import TokenDataset
from khaosz.data.batches.sampler import draws_for
from khaosz.data.shards.manifest import Group, PreparedData
from khaosz.data.shards.mmap import MmapFileHandler, Stage, TokenFileWriter
from khaosz.data.tokenizer import train_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import ConfigError, DataError, TokenFileError

PAD = 0


def group_of(source: str, lang: str, shards: list[MmapFileHandler]) -> Group:
    documents, tokens = sum(map(len, shards)), sum(shard.n_tokens for shard in shards)
    return Group("train", source, lang, shards, documents, tokens, bytes=0)


def prepared_of(stage: Stage, groups: list[Group]) -> PreparedData:
    return PreparedData(Path(), stage, 60_000, "f", groups)


def shard_of(
    path: Path, documents: list[list[int]], masks: list[list[int]] | None = None
) -> MmapFileHandler:
    """A token file in a folder of its own: Windows replaces no file that is still mapped."""
    path = Path(tempfile.mkdtemp(dir=path.parent)) / path.name
    stage: Stage = "pt" if masks is None else "sft"
    writer = TokenFileWriter(path, vocab_size=60_000, stage=stage, fingerprint="f")
    tokens = np.array([t for document in documents for t in document], np.int64)
    mask = None if masks is None else np.array([m for one in masks for m in one], np.uint8)
    writer.append(tokens, np.array([len(d) for d in documents]), mask, n_bytes=0)
    writer.close()
    return MmapFileHandler(path)


def pt_data(folder: Path, documents: list[list[int]], n_shards: int = 1) -> PreparedData:
    shards = [
        shard_of(folder / f"{i}.tok", documents[i::n_shards])
        for i in range(n_shards)
        if documents[i::n_shards]
    ]
    return prepared_of("pt", [group_of("wiki", "en", shards)])


def distinct(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different and never the pad token."""
    fresh = iter(range(1, 60_000))
    return [list(islice(fresh, n)) for n in lengths]


def scored_pairs(batch: Batch) -> Counter[tuple[int, int]]:
    kept = batch.labels != IGNORE
    return Counter(zip(batch.ids[kept].tolist(), batch.labels[kept].tolist(), strict=True))


def check_rows(batch: Batch) -> None:
    """The promises of Batch that hold for every row, whatever is in it."""
    for ids, labels, positions, doc_ids in zip(
        batch.ids.tolist(),
        batch.labels.tolist(),
        batch.positions.tolist(),
        batch.doc_ids.tolist(),
        strict=True,
    ):
        expected, previous = 0, None
        for t, doc in enumerate(doc_ids):
            if doc != previous:
                assert doc == -1 or doc == (0 if previous is None else previous + 1)
                assert previous != -1, "nothing stands behind the padding"
                expected, previous = 0, doc
            assert positions[t] == expected
            expected += 1
            if doc == -1:
                assert (ids[t], labels[t]) == (PAD, IGNORE)
            elif t + 1 < len(ids) and doc_ids[t + 1] == doc and labels[t] != IGNORE:
                assert labels[t] == ids[t + 1], "a label is the next token of the same piece"
        assert any(label != IGNORE for label in labels), "a row without anything to score"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda n: max(n) > 1),
    window=st.integers(1, 17),
    n_shards=st.integers(1, 3),
    rows=st.integers(1, 5),
)
def test_an_epoch_holds_every_pair_of_every_document_once(
    tmp_path: Path, lengths: list[int], window: int, n_shards: int, rows: int
) -> None:
    documents = distinct(lengths)
    data = TokenDataset.open(pt_data(tmp_path, documents, n_shards), window)
    expected = Counter(pair for document in documents for pair in pairwise(document))
    for epoch in (0, 1):
        seen: Counter[tuple[int, int]] = Counter()
        for first in range(0, data.windows, rows):
            last = min(first + rows, data.windows)
            offset = epoch * data.windows
            batch = data.batch(range(offset + first, offset + last))
            assert batch.ids.shape == (last - first, window)
            check_rows(batch)
            seen += scored_pairs(batch)
        assert seen == expected
    assert data.stats.inputs == sum(expected.values())


def test_packed_rows_give_the_documents_back(tmp_path: Path) -> None:
    documents = distinct([5, 9, 3, 2, 12, 7, 4, 4])
    data = TokenDataset.open(pt_data(tmp_path, documents), 12)
    found = []
    for draw in range(data.windows):
        row = data.batch([draw])
        for piece in range(int(row.doc_ids.max()) + 1):
            here = row.doc_ids[0] == piece
            ids, labels = row.ids[0][here].tolist(), row.labels[0][here].tolist()
            assert row.positions[0][here].tolist() == list(range(len(ids)))
            found.append([*ids, labels[-1]])
    assert sorted(found) == documents


def test_a_long_document_is_continued_by_the_next_segment(tmp_path: Path) -> None:
    (document,) = distinct([21])
    data = TokenDataset.open(pt_data(tmp_path, [document]), 8)
    rows = sorted(data.batch([draw]).ids[0].tolist() for draw in range(3))
    assert rows == [document[:8], document[8:16], [*document[16:20], PAD, PAD, PAD, PAD]]
    assert data.batch(range(3)).tokens == 20


def test_exactly_one_window_is_one_window(tmp_path: Path) -> None:
    (document,) = distinct([9])
    data = TokenDataset.open(pt_data(tmp_path, [document]), 8)
    assert data.windows == 1 and data.stats.inputs == 8 and data.stats.fill == 1.0
    for draw in (0, 1, 5):
        row = data.batch([draw])
        assert row.ids.tolist() == [document[:-1]] and row.labels.tolist() == [document[1:]]
        assert row.doc_ids.tolist() == [[0] * 8] and row.positions.tolist() == [list(range(8))]
        assert data.epoch(draw) == draw


def test_padding_of_windows_is_detected_by_doc_ids(tmp_path: Path) -> None:
    data = TokenDataset.open(pt_data(tmp_path, [[PAD, PAD, PAD, 5]]), 6, pad_id=PAD)
    row = data.batch([0])
    assert row.ids.tolist() == [[0, 0, 0, 0, 0, 0]]
    assert row.labels.tolist() == [[0, 0, 5, IGNORE, IGNORE, IGNORE]]
    assert row.doc_ids.tolist() == [[0, 0, 0, -1, -1, -1]]
    assert row.positions.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert TokenDataset.open(pt_data(tmp_path, [[3, 4]]), 3, pad_id=7).batch([0]).ids.tolist() == [
        [3, 7, 7]
    ]


def test_steps_do_not_depend_on_world_size(
    tmp_path: Path,
) -> None:
    prepared = pt_data(tmp_path, distinct([10 + i % 13 for i in range(60)]), n_shards=2)
    data = TokenDataset.open(prepared, 16, seed=3)
    steps = range(data.windows // 6 + 3)  # past the end of the first epoch

    def global_batch(step: int, world: int) -> list[list[int]]:
        parts = [data.batch(draws_for(step, 6, rank, world)).ids.tolist() for rank in range(world)]
        return [parts[i % world][i // world] for i in range(6)]

    whole = [global_batch(step, 1) for step in steps]
    assert [global_batch(step, 2) for step in steps] == whole
    assert [global_batch(step, 3) for step in steps] == whole
    again = TokenDataset.open(prepared, 16, seed=3)
    for step in (len(steps) - 1, 2):
        assert again.batch(draws_for(step, 6, 0, 1)).ids.tolist() == whole[step]
    other = TokenDataset.open(prepared, 16, seed=4)
    assert other.batch(range(6)).ids.tolist() != whole[0]


def test_an_epoch_draws_each_window_once_and_epochs_differ(tmp_path: Path) -> None:
    data = TokenDataset.open(pt_data(tmp_path, distinct([9] * 50)), 8)
    epochs = []
    for epoch in range(3):
        draws = range(epoch * data.windows, (epoch + 1) * data.windows)
        assert {data.epoch(draw) for draw in draws} == {epoch}
        rows = data.batch(draws).ids.tolist()
        assert len({tuple(row) for row in rows}) == data.windows == 50
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]


# --- SFT


def test_the_first_assistant_token_and_the_end_are_scored(tmp_path: Path) -> None:
    text = "What is two and two? It is four. Are you sure? Yes, quite sure of it."
    tokenizer = train_tokenizer(iter([text] * 20), 300)
    messages = [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "It is four."},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "Yes, quite sure."},
    ]
    ids, mask = encode_chat(tokenizer, messages)
    shard = shard_of(tmp_path / "chat.tok", [ids], [mask])
    prepared = prepared_of("sft", [group_of("chat", "en", [shard])])
    data = TokenDataset.open(prepared, len(ids) - 1, pad_id=tokenizer.pad_id)
    row = data.batch([0])
    inputs, labels = row.ids[0].tolist(), row.labels[0].tolist()
    scored = [label for label in labels if label != IGNORE]
    end = tokenizer.special_ids["<|end|>"]
    assert scored == [
        *tokenizer.encode("It is four."),
        end,
        *tokenizer.encode("Yes, quite sure."),
        end,
    ]
    headers = [
        t for t, token in enumerate(inputs) if token == tokenizer.special_ids["<|assistant|>"]
    ]
    assert [labels[t] for t in headers] == [
        tokenizer.encode("It is four.")[0],
        tokenizer.encode("Yes, quite sure.")[0],
    ]
    assert all(labels[t - 1] == IGNORE for t in headers), "the header itself is not trained"
    # One cell less, and the conversation is cut after its first answer, end token included.
    short = TokenDataset.open(prepared, len(ids) - 2, pad_id=tokenizer.pad_id)
    kept = [label for label in short.batch([0]).labels[0].tolist() if label != IGNORE]
    assert kept == [*tokenizer.encode("It is four."), end]
    assert short.stats.cut == 1


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    masks=st.lists(
        st.lists(st.integers(0, 1), min_size=1, max_size=25), min_size=1, max_size=12
    ).filter(lambda masks: any(any(m[1:9]) for m in masks if len(m) <= 9)),
    window=st.integers(8, 20),
)
def test_sft_scores_the_mask_and_nothing_else(
    tmp_path: Path, masks: list[list[int]], window: int
) -> None:
    documents = distinct([len(m) for m in masks])
    shard = shard_of(tmp_path / "a.tok", documents, masks)
    prepared = prepared_of("sft", [group_of("a", "en", [shard])])
    data = TokenDataset.open(prepared, window)
    batch = data.batch(range(data.windows))
    check_rows(batch)
    allowed = Counter(
        (document[t], document[t + 1])
        for document, mask in zip(documents, masks, strict=True)
        for t in range(len(mask) - 1)
        if mask[t + 1]
    )
    seen = scored_pairs(batch)
    assert seen <= allowed
    whole = [
        (document[t], document[t + 1])
        for document, mask in zip(documents, masks, strict=True)
        for t in range(len(mask) - 1)
        if mask[t + 1] and len(mask) <= window + 1
    ]
    assert set(whole) <= set(seen)


# --- mixtures


def mixed(folder: Path) -> PreparedData:
    """Windows of 8: wiki/zh 10, web/zh 30, web/en 5 (half padding), notes/en 20."""
    groups = []
    first = 1
    for source, lang, n, length in [
        ("wiki", "zh", 10, 9),
        ("web", "zh", 30, 9),
        ("web", "en", 5, 6),  # 5 of 8 cells, and two never share a window
        ("notes", "en", 20, 9),
    ]:
        tokens = list(range(first, first + n * length))
        first += n * length
        documents = [tokens[i * length : (i + 1) * length] for i in range(n)]
        shard = shard_of(folder / f"{source}-{lang}.tok", documents)
        groups.append(group_of(source, lang, [shard]))
    return prepared_of("pt", groups)


def tokens_by_group(prepared: PreparedData, batch: Batch) -> dict[str, int]:
    counts = {}
    for group in prepared.groups:
        known = torch.from_numpy(group.shards[0].tokens.astype(np.int64))
        inside = torch.isin(batch.ids, known) & (batch.doc_ids >= 0)
        counts[f"{group.source}/{group.lang}"] = int(inside.sum())
    return counts


@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        ({"zh": 1.0, "en": 3.0}, {"zh": 0.25, "en": 0.75}),
        ({"web/en": 1.0, "wiki": 1.0}, {"web/en": 0.5, "wiki/zh": 0.5}),
        ({"zh": 2.0, "notes": 1.0, "web/en": 1.0}, {"zh": 0.5, "notes/en": 0.25, "web/en": 0.25}),
        ({"zh": 1.0, "en": 0.0}, {"zh": 1.0}),
    ],
)
def test_weights_are_shares_of_tokens(
    tmp_path: Path, mix: dict[str, float], shares: dict[str, float]
) -> None:
    prepared = mixed(tmp_path)
    data = TokenDataset.open(prepared, 8, mix=mix)
    counts = tokens_by_group(prepared, data.batch(range(2048)))
    total = sum(counts.values())
    for key, share in shares.items():
        own = sum(n for name, n in counts.items() if key in (name, name.split("/")[1]))
        # A slot of 1024 is the resolution of the schedule; windows of a key differ in fill.
        assert abs(own / total - share) < 0.01, counts
    named = sum(n for name, n in counts.items() if name in shares or name.split("/")[1] in shares)
    assert named == total, "a group that is not named is never drawn"


def test_within_a_language_every_window_is_drawn_equally_often(tmp_path: Path) -> None:
    prepared = mixed(tmp_path)
    data = TokenDataset.open(prepared, 8, mix={"zh": 1.0, "web/en": 1.0})
    zh = {int(t) for group in prepared.groups[:2] for t in group.shards[0].tokens}
    rows = data.batch(range(400)).ids.tolist()
    firsts = [(draw, row[0]) for draw, row in enumerate(rows) if row[0] in zh]
    per_window = Counter(token for _, token in firsts)
    assert len(per_window) == 40 and max(per_window.values()) - min(per_window.values()) <= 1
    passes = [data.epoch(draw) for draw, _ in firsts]
    assert passes == [i // 40 for i in range(len(firsts))]


def test_unused_groups_are_neither_planned_nor_counted(tmp_path: Path) -> None:
    data = TokenDataset.open(mixed(tmp_path), 8, mix={"wiki": 1.0}, plan_dir=tmp_path / "plans")
    assert data.windows == 10 and data.stats.inputs == 80
    assert len(list((tmp_path / "plans").iterdir())) == 1


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"zh": 1.0, "wikii": 1.0}, "'wikii'"),
        ({"zh": -1.0}, "'zh' the weight -1"),
        ({"zh": float("nan")}, "'zh' the weight nan"),
        ({"zh": 0.0}, "no source a weight"),
        ({}, "no source a weight"),
    ],
)
def test_invalid_mix_is_an_error_with_a_hint(
    tmp_path: Path, mix: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TokenDataset.open(mixed(tmp_path), 8, mix=mix)
    assert caught.value.hint
    if "wikii" in mix:
        assert "'wiki'" in caught.value.hint


# --- nothing to draw


def test_window_without_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a window of 512 leaves nothing.*2 are too short"
    ) as short:
        TokenDataset.open(pt_data(tmp_path, [[1], [2]]), 512)
    assert short.value.hint
    shard = shard_of(tmp_path / "sft.tok", [[1] * 20], [[0] * 18 + [1, 1]])
    prepared = prepared_of("sft", [group_of("chat", "en", [shard])])
    with pytest.raises(DataError, match=r"a window of 4 leaves nothing.*1 too long") as long:
        TokenDataset.open(prepared, 4)
    assert long.value.hint == "use a longer window"
    groups = [*mixed(tmp_path).groups, group_of("tiny", "fr", pt_shards(tmp_path))]
    with pytest.raises(DataError, match="leaves nothing of 'fr'"):
        TokenDataset.open(prepared_of("pt", groups), 8, mix={"zh": 1, "fr": 1})


def pt_shards(folder: Path) -> list[MmapFileHandler]:
    return [shard_of(folder / "tiny.tok", [[1]])]


def test_missing_split_is_an_error_with_a_hint(tmp_path: Path) -> None:
    prepared = pt_data(tmp_path, [[1, 2, 3]])
    with pytest.raises(DataError, match="no 'val' split, only train") as caught:
        TokenDataset.open(prepared, 8, split="val")
    assert caught.value.hint and "val" in caught.value.hint


# --- batches


def test_batch_counts_and_moves(tmp_path: Path) -> None:
    data = TokenDataset.open(pt_data(tmp_path, distinct([6, 9, 4, 9, 9, 5])), 8)
    batch = data.batch(range(5))
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert batch.positions.dtype == batch.doc_ids.dtype == torch.int64
    assert batch.tokens == int((batch.labels != -100).sum()) and type(batch.tokens) is int
    moved = batch.to("meta")
    assert moved.labels.device.type == "meta"
    assert moved.tokens == batch.tokens, "known without asking the device"


@pytest.mark.parametrize("which", ["input", "label"])
def test_token_beyond_the_vocabulary_names_the_file(tmp_path: Path, which: str) -> None:
    """As a damaged file has it. The last token is a label only."""
    prepared = pt_data(tmp_path, distinct([9]))
    path = prepared.groups[0].shards[0].path
    section = prepared.groups[0].shards[0].header["sections"]["tokens"]
    data = bytearray(path.read_bytes())
    at = section["offset"] + (0 if which == "input" else 2 * (section["count"] - 1))
    data[at : at + 2] = b"\xff\xff"
    damaged = tmp_path / "damaged.tok"
    damaged.write_bytes(data)
    groups = [group_of("a", "en", [MmapFileHandler(damaged)])]
    dataset = TokenDataset.open(prepared_of("pt", groups), 8, pad_id=0)
    with pytest.raises(TokenFileError, match=r"damaged\.tok: token id 65535 in a vocabulary of"):
        dataset.batch([0])
