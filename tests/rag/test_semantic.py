"""The semantic splitter with an embedder made here: a sentence is what its words say it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.errors import ConfigError
from khaosz.rag.split.semantic import SemanticSplitter, depths, similarities
from khaosz.rag.split.structure import Chunk

SUBJECTS = {
    "sea": "The sea is deep and salt. Waves of the sea break on rocks. A sea has tides and fish. ",
    "war": "The war took long. Armies of the war lost men. A war has generals and maps. ",
    "tea": "The tea is hot. Leaves of tea dry in the sun. A tea has a scent and colour. ",
    "茶": "茶是热的。春天的茶最香。喝茶的人很多。",
    "海": "海是咸的。人们去看海。海里有很多鱼。",
}


class Embedder:
    """One dimension for each subject named in a sentence; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        self.asked.extend(sentences)
        found = np.full((len(sentences), len(SUBJECTS)), 0.05, dtype=np.float32)
        for row, sentence in zip(found, sentences, strict=True):
            for column, word in enumerate(SUBJECTS):
                row[column] += word in sentence
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def document(*subjects: str) -> str:
    return "".join(SUBJECTS[subject] for subject in subjects)


def split(text: str, **settings: object) -> list[Chunk]:
    return SemanticSplitter(Embedder(), **settings).split(text)  # type: ignore[arg-type]


def test_english_is_split_where_the_subject_changes() -> None:
    chunks = split(document("sea", "war", "tea"), min_chars=0)
    assert [chunk.text for chunk in chunks] == [SUBJECTS[word] for word in ("sea", "war", "tea")]


def test_chinese_is_split_where_the_subject_changes() -> None:
    chunks = split(document("茶", "海", "茶"), min_chars=0)
    assert [chunk.text for chunk in chunks] == [SUBJECTS[word] for word in ("茶", "海", "茶")]


def test_one_subject_is_one_chunk() -> None:
    assert len(split(document("sea") * 3, min_chars=0)) == 1


def test_every_sentence_is_embedded_once() -> None:
    embedder = Embedder()
    text = document("sea", "茶", "war")
    SemanticSplitter(embedder, window=3).split(text)
    assert len(embedder.asked) == 9
    assert "".join(embedder.asked) == text.replace(". ", ".")


def test_threshold_takes_only_gaps_below_it() -> None:
    text = document("sea", "war")
    assert len(split(text, threshold=0.5, min_chars=0)) == 2
    assert len(split(text, threshold=-0.5, min_chars=0)) == 1


def test_high_percentile_takes_only_the_deepest_drop() -> None:
    # The second change is softer: its sentences name the subject before them, too.
    text = document("sea", "war") + "The war and the tea. A war for tea. The tea of war. "
    assert [chunk.start for chunk in split(text, percentile=100, min_chars=0)] == [
        0,
        len(SUBJECTS["sea"]),
    ]


def test_short_groups_join_the_more_similar_neighbour() -> None:
    text = document("sea") + "The war. A war at sea. " + document("tea")
    alone = split(text, min_chars=0, window=1, threshold=0.9)
    assert [len(chunk.text) for chunk in alone][1] == 23
    joined = split(text, min_chars=30, window=1, threshold=0.9)
    assert [chunk.text for chunk in joined] == [
        SUBJECTS["sea"] + "The war. A war at sea. ",
        SUBJECTS["tea"],
    ]


def test_short_groups_stay_if_no_neighbour_fits() -> None:
    text = document("sea") + "The war. A war at sea. " + document("tea")
    sizes = [len(chunk.text) for chunk in split(text, min_chars=30, window=1, threshold=0.9,
                                                max_chars=len(SUBJECTS["sea"]))]  # fmt: skip
    assert sizes == [len(SUBJECTS["sea"]), 23, len(SUBJECTS["tea"])]


def test_short_group_joins_the_neighbour_that_fits() -> None:
    short = "The war. A war. "
    text = document("sea") + short + document("sea")
    chunks = split(text, min_chars=len(short) + 1, window=1, threshold=0.9,
                   max_chars=len(SUBJECTS["sea"]) + len(short) - 1)  # fmt: skip
    assert [chunk.text for chunk in chunks] == [SUBJECTS["sea"], short, SUBJECTS["sea"]]


def test_boundary_is_a_minimum_on_both_sides() -> None:
    cosines = [0.9, 0.1, 0.2, 0.9]
    angles = np.cumsum([0.0, *np.arccos(cosines)])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    splitter = SemanticSplitter(lambda _: vectors, min_chars=0, window=1, threshold=0.5)
    assert [chunk.start for chunk in splitter.split("一句话。" * 5)] == [0, 8]


def test_heading_stays_with_the_heading_under_it() -> None:
    text = "The sea is deep.\n\n# Waves\n\n## Tides\n\nThe tea is hot.\n"
    chunks = split(text, min_chars=0, window=1)
    assert [chunk.text.split("\n")[0] for chunk in chunks] == ["The sea is deep.", "# Waves"]


def test_long_groups_are_cut_at_sentences() -> None:
    chunks = split(document("sea") * 2, max_chars=60, min_chars=10)
    assert all(chunk.text.endswith(". ") and len(chunk.text) <= 60 for chunk in chunks)


def test_chunks_have_their_headings() -> None:
    text = "# Nature\n" + document("sea") + "\n# People\n" + document("war")
    assert [chunk.headings for chunk in split(text, min_chars=20)] == [("Nature",), ("People",)]


def test_texts_without_a_gap() -> None:
    assert split("") == []
    assert split("The sea") == [Chunk(0, 7, "The sea", ())]
    assert split(" \n ") == [Chunk(0, 3, " \n ", ())]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([*SUBJECTS.values(), "sea. ", "茶。", "\n\n", " ", "# a\n", "x" * 30, "”"]),
        max_size=12,
    ).map("".join),
    st.integers(1, 120),
    st.data(),
)
def test_chunks_tile_the_text_within_the_budget(text: str, size: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(0, size))
    at = 0
    for chunk in split(text, max_chars=size, min_chars=least, window=data.draw(st.integers(1, 4))):
        assert chunk.start == at < chunk.end and len(chunk.text) <= size
        assert chunk.text == text[chunk.start : chunk.end]
        at = chunk.end
    assert at == len(text)


def test_similarities_are_cosines_of_window_means() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    for window in (1, 2, 9):
        expected = []
        for gap in range(1, 7):
            before = vectors[max(0, gap - window) : gap].mean(0)
            after = vectors[gap : gap + window].mean(0)
            norms = np.linalg.norm(before) * np.linalg.norm(after)
            expected.append(before @ after / norms)
        # float32 against float64 sums
        np.testing.assert_allclose(similarities(vectors, window), expected, atol=1e-5)


def test_depths_reach_to_the_nearest_peaks() -> None:
    result = depths(np.array([0.9, 0.5, 0.7, 0.2, 0.4, 0.3]))
    np.testing.assert_allclose(result, [0.0, 0.4 + 0.2, 0.0, 0.5 + 0.2, 0.0, 0.1], atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_chars": 0},
        {"max_chars": 10, "min_chars": 11},
        {"min_chars": -1},
        {"window": 0},
        {"percentile": 101},
        {"threshold": 2},
        {"percentile": 90, "threshold": 0.5},
    ],
)
def test_refuses_invalid_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as refused:
        SemanticSplitter(Embedder(), **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value) and refused.value.hint


@pytest.mark.parametrize("shape", [(2, 3), (1,), (0, 3)])
def test_refuses_embed_with_another_shape(shape: tuple[int, ...]) -> None:
    splitter = SemanticSplitter(lambda sentences: np.zeros(shape, dtype=np.float32))
    with pytest.raises(ConfigError, match="embed returned"):
        splitter.split("One. Two. Three.")
