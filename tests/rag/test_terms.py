"""Terms of Chinese and English, and how SQLite reads them."""

from __future__ import annotations

import sqlite3
from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khaosz.rag.terms import stem, term_counter, terms


def test_chinese_is_characters_and_pairs() -> None:
    assert sorted(terms("北京大学")) == sorted(["北", "京", "大", "学", "北京", "京大", "大学"])


def test_pairs_do_not_cross_punctuation() -> None:
    assert "京上" not in terms("北京，上海") and "北京" in terms("北京，上海")


def test_mixed_runs_are_split_where_the_script_changes() -> None:
    assert sorted(terms("GPT模型v2")) == sorted(["gpt", "模", "型", "模型", "v2"])


@pytest.mark.parametrize(
    ("a", "b"),
    [("ＡＢＣ１２", "abc12"), ("ﬁle", "FILE"), ("Straße", "STRASSE"), ("㍿", "株式会社")],
)
def test_width_case_and_ligatures_are_folded(a: str, b: str) -> None:
    assert terms(a) == terms(b)


@pytest.mark.parametrize(
    ("word", "stemmed"),
    [
        *(("queries", "query"), ("files", "file"), ("classes", "classe"), ("cats", "cat")),
        *(("class", "class"), ("status", "status"), ("is", "is"), ("gas", "gas")),
        *(("shoes", "shoe"), ("trees", "tree"), ("eies", "eie")),
    ],
)
def test_plurals(word: str, stemmed: str) -> None:
    assert stem(word) == stemmed


def fts5_of(text: str) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE t USING fts5(x, tokenize='unicode61 remove_diacritics 0')")
    db.execute("INSERT INTO t VALUES (?)", (text,))
    db.execute("CREATE VIRTUAL TABLE v USING fts5vocab(t, row)")
    return db


def tokens_in(db: sqlite3.Connection) -> int:
    return db.execute("SELECT coalesce(sum(cnt), 0) FROM v").fetchone()[0]


@cache
def is_letter_in_sqlite(letter: str) -> bool:
    """Whether SQLite, with an older Unicode, classes it as a letter as Python does: it does not for
    317 letters of New Tai Lue, Cham and other rare scripts."""
    return tokens_in(fts5_of(" ".join(set(terms(letter))))) == len(set(terms(letter)))


@given(st.text(st.characters(codec="utf-8").filter(is_letter_in_sqlite)))
def test_fts5_reads_each_term_as_one_token(text: str) -> None:
    distinct = sorted(set(terms(text)))
    db = fts5_of(" ".join(distinct))
    for term in distinct:
        assert db.execute("SELECT count(*) FROM t WHERE t MATCH ?", (f'"{term}"',)).fetchone()[0]
    assert tokens_in(db) == len(distinct)


@given(
    st.lists(
        st.sampled_from([*"哈京京北aＳ s，ﬁ'", "dogs", "dog ", "哈哈", "バ", "ば゛"]), max_size=40
    ),
    st.lists(st.sampled_from(["哈", "哈哈", "京北", "dog", "as", "fi", "s", "バ", "none"])),
)
def test_term_counter_counts_as_terms_does(pieces: list[str], query_terms: list[str]) -> None:
    text = "".join(pieces)
    expected = {term: n for term, n in Counter(terms(text)).items() if term in query_terms}
    assert term_counter(query_terms)(text) == expected
