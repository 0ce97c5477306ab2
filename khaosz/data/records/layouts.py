"""One table of the record layouts that are read. Adding a layout is one row of `LAYOUTS`.

A stage reads records of its kinds: SFT conversations, reward models and DPO comparisons and rated
answers, the embedder query-passage records. A record is read by the first row of such a kind whose
keys it has, so a record that fits two layouts is always read by the same one. Null columns count
as absent; so do an empty list and a number in place of messages, where another row fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from khaosz.data.records.columns import (
    ANSWERS,
    LABELS,
    POSITIVES,
    PROMPTS,
    QUERIES,
    SCORES,
    SYSTEMS,
    TURNS,
    Fields,
    key_list,
    named,
)
from khaosz.data.records.comparisons import (
    overall_rating,
    read_comparison,
    read_labelled,
    read_last_turn_and_rejected,
    read_openai_pair,
    read_parallel_ratings,
    read_ranking,
    read_ratings,
    read_scored,
    read_two_answers,
    verdict,
    winner,
)
from khaosz.data.records.conversations import (
    prompt_of,
    read_conversation,
    read_question_and_answer,
)
from khaosz.errors import DataError

if TYPE_CHECKING:  # document loaders import this module under a limit of memory
    from khaosz.config import ColumnsConfig

Kind = Literal["text", "chat", "comparison", "rated", "prompt", "passages"]

_NEGATIVE = re.compile(r"negatives?|neg|negative_\d+")


@dataclass(frozen=True)
class Texts:
    """A query, the passages that answer it, and hard negatives that do not."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """`keys`: what a record must have, each as the spellings to choose from. `read` gets the
    columns that are not null and raises DataError."""

    kind: Kind
    name: str
    keys: tuple[tuple[str, ...], ...]
    read: Callable[[Fields], Any]

    def missing(self, fields: Fields) -> list[tuple[str, ...]]:
        return [keys for keys in self.keys if not fields.keys() & set(keys)]


def read_record(record: Any, kinds: Sequence[Kind], columns: ColumnsConfig | None = None) -> Any:
    """What the first row of `kinds` that fits makes of a record: a text, a `Conversation`, a list
    of `Pair`s, a `Rated`, messages of a prompt, or `Texts`.

    Raises DataError with the record's keys and the nearest row when none fits, and with what is
    wrong with the values of the row that does.
    """
    fields = named(record, columns)
    full = {
        key: value
        for key, value in fields.items()
        if not (key in TURNS and (value == [] or isinstance(value, int | float)))
    }
    rows = _rows(tuple(kinds))
    for candidate in (full, fields):
        for row in rows:
            if not row.missing(candidate):
                return row.read(candidate)
    raise _unknown(fields, rows)


@lru_cache
def _rows(kinds: tuple[Kind, ...]) -> tuple[Layout, ...]:
    return tuple(row for row in LAYOUTS if row.kind in kinds)


def fitting(
    record: Any, kinds: Sequence[Kind], columns: ColumnsConfig | None = None
) -> Layout | None:
    """The row of `kinds` whose keys this record has, if there is one."""
    fields = named(record, columns)
    return next((row for row in _rows(tuple(kinds)) if not row.missing(fields)), None)


def _unknown(fields: Fields, rows: Sequence[Layout]) -> DataError:
    keys = key_list(fields)
    nearest = min(rows, key=partial(_distance, fields))
    others = (row for row in LAYOUTS if row.kind != "prompt" and not row.missing(fields))
    if _distance(fields, nearest)[0] == 1 and (other := next(others, None)):
        return DataError(
            f"{other.name}, with keys {keys}, is not read by this stage",
            hint="needed is " + " or ".join(row.name for row in rows[:2]),
        )
    lacks = " and ".join(" or ".join(names[:3]) for names in nearest.missing(fields))
    return DataError(
        f"unknown layout with keys {keys}; nearest is {nearest.name}, without {lacks}",
        hint="name the columns in [columns] of the recipe; docs/en/data.md lists all layouts",
    )


def _distance(fields: Fields, row: Layout) -> tuple[float, ...]:
    """The share of the row's keys that is missing; many layouts have a prompt, so that tells
    little. Of a prompt alone the usual comparison is the nearest."""
    telling = [keys for keys in row.keys if keys != PROMPTS] or row.keys
    missing = sum(not fields.keys() & set(keys) for keys in telling)
    matched = len(row.keys) - len(row.missing(fields))
    is_usual = row.read is read_comparison and bool(fields.keys() & set(PROMPTS))
    return missing / len(telling), not is_usual, -matched, len(row.keys)


def _text(fields: Fields) -> str:
    if not isinstance(fields["text"], str):
        raise DataError("text is not a string")
    return str(fields["text"])


def _passages(fields: Fields) -> Texts:
    query = next(fields[key] for key in QUERIES if key in fields)
    positive_key = next(key for key in POSITIVES if key in fields)
    if not isinstance(query, str) or not query.strip():
        raise DataError("query is empty" if isinstance(query, str) else "query is not text")
    positives = _listed(positive_key, fields[positive_key])
    if not positives:
        raise DataError(f"{positive_key} is empty")
    negative_keys = [key for key in fields if _NEGATIVE.fullmatch(str(key))]
    negatives = tuple(dict.fromkeys(chain(*(_listed(key, fields[key]) for key in negative_keys))))
    if set(positives) & set(negatives):
        raise DataError("a negative is the positive")
    return Texts(query, positives, negatives)


def _listed(key: str, value: Any) -> tuple[str, ...]:
    """One text or a list of them."""
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{key} is neither text nor a list of texts")
        if not text.strip():
            raise DataError(f"{key} has an empty text")
    return tuple(dict.fromkeys(texts))


def _keys(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


_ASKED = (PROMPTS,)
LAYOUTS: tuple[Layout, ...] = (
    Layout("text", "a text (text)", _keys("text"), _text),
    Layout("chat", "a conversation (messages)", (TURNS,), read_conversation),
    Layout("chat", "a prompt and its answer", (PROMPTS, ANSWERS), read_question_and_answer),
    # Comparisons of answers to one prompt.
    Layout("comparison", "a ranking", (*_ASKED, *_keys("answers", "ranking")), read_ranking),
    Layout("comparison", "chosen and rejected", _keys("chosen", "rejected"), read_comparison),
    Layout(
        "comparison",
        "chosen_response and rejected_response",
        (*_ASKED, *_keys("chosen_response", "rejected_response")),
        partial(read_comparison, better="chosen_response", worse="rejected_response"),
    ),
    Layout(
        "comparison",
        "OpenAI's preferred_output and non_preferred_output",
        (("input",), *_keys("preferred_output", "non_preferred_output")),
        read_openai_pair,
    ),
    Layout(
        "comparison",
        "messages and rejected_response",
        (TURNS, *_keys("rejected_response")),
        read_last_turn_and_rejected,
    ),
    Layout(
        "comparison",
        "SHP",
        (*_ASKED, *_keys("human_ref_A", "human_ref_B", "labels")),
        verdict("human_ref_A", "human_ref_B", "labels", 1, 0.5),
    ),
    Layout(
        "comparison",
        "HelpSteer3",
        (*_ASKED, *_keys("response1", "response2", "overall_preference")),
        verdict("response1", "response2", "overall_preference", -1),
    ),
    Layout(
        "comparison",
        "HelpSteer2 preferences",
        (*_ASKED, *_keys("response_1", "response_2", "preference_strength")),
        verdict("response_1", "response_2", "preference_strength", -1),
    ),
    Layout(
        "comparison",
        "PKU-SafeRLHF",
        (*_ASKED, *_keys("response_0", "response_1", "better_response_id")),
        verdict("response_0", "response_1", "better_response_id", -1, 0.5),
    ),
    Layout(
        "comparison",
        "Chatbot Arena",
        _keys("conversation_a", "conversation_b", "winner"),
        partial(
            read_two_answers, first="conversation_a", second="conversation_b", preference=winner
        ),
    ),
    Layout(
        "comparison",
        "rated completions (UltraFeedback)",
        (*_ASKED, *_keys("completions")),
        partial(read_ratings, key="completions", score=overall_rating),
    ),
    Layout(
        "comparison",
        "ranked answers (Nectar)",
        (*_ASKED, *_keys("answers")),
        partial(read_ratings, key="answers", score=overall_rating),
    ),
    Layout(
        "comparison",
        "generations and ratings",
        (*_ASKED, *_keys("generations", "ratings")),
        read_parallel_ratings,
    ),
    # One answer each, compared with other records of the same prompt.
    Layout("rated", "a labelled answer (KTO)", (PROMPTS, ANSWERS, LABELS), read_labelled),
    Layout("rated", "a labelled conversation (KTO)", (TURNS, LABELS), read_labelled),
    Layout("rated", "an answer with a score (HelpSteer)", (PROMPTS, ANSWERS, SCORES), read_scored),
    Layout("passages", "a query and its passages", (QUERIES, POSITIVES), _passages),
    Layout("prompt", "a prompt", _ASKED, lambda fields: prompt_of(fields, answered=True)[0]),
)


@lru_cache(maxsize=1)
def known_columns() -> frozenset[str]:
    """Every key that a row reads: the columns of a table that are worth reading."""
    others = (
        "lang",
        "source",
        "tools",
        "functions",
        "margin",
        "pairs",
        "ranking_group",
        *SYSTEMS,
        "context",
        "history",
    )
    negatives = ("negative", "negatives", "neg", *(f"negative_{i}" for i in range(1, 17)))
    keys = chain.from_iterable(chain.from_iterable(row.keys for row in LAYOUTS))
    return frozenset((*keys, *others, *negatives, *LABELS, *ANSWERS, *PROMPTS))
