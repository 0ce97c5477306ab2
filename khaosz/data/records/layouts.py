"""One table of the record layouts that are read. Adding a layout is one row of `LAYOUTS`.

A stage reads records of its kinds: SFT conversations, reward models and DPO comparisons and rated
answers, the embedder query-passage records. A record is read by the first row of such a kind whose
keys it has, so a record that fits two layouts is always read by the same one. Null columns count
as absent; so do an empty list and a number in place of messages, where another row fits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import chain, combinations, product
from typing import TYPE_CHECKING, Any, Literal

from khaosz.data.records.turns import (
    LeftOut,
    Message,
    has_reasoning,
    read_tools,
    read_turns,
    text_of,
)
from khaosz.errors import DataError, one_line

if TYPE_CHECKING:  # document loaders import this module under a limit of memory
    from khaosz.config import ColumnsConfig

Fields = dict[str, Any]
Kind = Literal["text", "chat", "comparison", "rated", "prompt", "passages"]

TURNS = (
    *("messages", "conversations", "conversation", "dialog", "dialogue", "chat"),
    "context_messages",  # OpenRLHF
)
QUESTIONS = ("prompt", "instruction", "question", "query", "problem", "input")
ANSWERS = ("completion", "output", "response", "solution", "answer")
SYSTEMS = ("system", "system_prompt")
LABELS = ("label", "kto_tag")
SCORES = ("helpfulness", "score", "rating")
QUERIES, POSITIVES = ("query", "anchor"), ("positive", "positives", "pos")
_PROMPTS = ("prompt", *TURNS, *QUESTIONS[1:], "context", "history")
_JOINED = {"instruction": ("input", "context"), "question": ("context",)}  # Alpaca, Dolly
_NEGATIVE = re.compile(r"negatives?|neg|negative_\d+")
_WITHIN_WORD = re.compile(r"[A-Za-z0-9]{2}")
_LABEL_TEXTS = {"true": True, "false": False, "1": True, "0": False}


@dataclass
class Conversation:
    """A chat that ends with an assistant turn, ready for `encode_chat`. `weights`: one per
    assistant turn, 0 where it is not trained on; None trains on all."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    weights: list[int] | None = None


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. Pairs of one ranking share a `group` and belong in one batch
    (Ouyang et al. 2022, arXiv:2203.02155, section 3.5); `shared`: by several rankings, in which
    the same two answers may be compared more than once."""

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None = None
    group: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Rated:
    """One answer with its label or score, to compare with the other answers to its prompt."""

    prompt: list[Message]
    answer: str
    score: float


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
    keys = _key_list(fields)
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
    telling = [keys for keys in row.keys if keys != _PROMPTS] or row.keys
    missing = sum(not fields.keys() & set(keys) for keys in telling)
    matched = len(row.keys) - len(row.missing(fields))
    is_usual = row.read is _compared and bool(fields.keys() & set(_PROMPTS))
    return missing / len(telling), not is_usual, -matched, len(row.keys)


def _key_list(fields: Fields) -> str:
    """The keys of a record, for a message: escaped, and not all of many."""
    keys = [one_line(str(key))[:40] for key in list(fields)[:12]]
    return ", ".join(keys + ["..."] * (len(fields) > 12)) or "(none)"


def named(record: Any, columns: ColumnsConfig | None = None) -> Fields:
    """The columns that are not null, under the names that the table knows. Raises DataError for a
    record that is not an object or lacks a column named in `columns`."""
    if not isinstance(record, dict):
        raise DataError(f"record is a {type(record).__name__}, not an object")
    fields = {key: value for key, value in record.items() if value is not None}
    if columns is None or not any(vars(columns).values()):
        return fields
    sources = column_names(columns)
    for known, source in sources.items():
        if source not in record and known not in ("system", "tools", "negative"):
            keys = _key_list(record)
            raise DataError(f"no column {source}, which [columns] names, with keys {keys}")
    moved = {known: fields[source] for known, source in sources.items() if source in fields}
    replaced = set(sources.values()) | {
        name
        for group in _RIVALS
        if any(known in sources for known in group[0])
        for name in group[1]
    }
    fields = {key: value for key, value in fields.items() if key not in replaced} | moved
    if columns.role or columns.content or columns.roles:
        fields = {key: _renamed(value, columns) for key, value in fields.items()}
    return fields


# What a named column replaces: other spellings of the same thing.
_RIVALS = (
    (("messages", "prompt"), (*TURNS, *_PROMPTS)),
    (("completion",), ANSWERS),
    (("system",), SYSTEMS),
    (("label",), LABELS),
    (("score",), SCORES),
    (("query",), QUERIES),
    (("positive",), POSITIVES),
)


def column_names(columns: ColumnsConfig) -> dict[str, str]:
    """Known name -> column of the data."""
    values = columns.model_dump(exclude={"role", "content", "roles"}, exclude_none=True)
    return {"completion" if key == "response" else key: value for key, value in values.items()}


def _renamed(value: Any, columns: ColumnsConfig) -> Any:
    """Messages with `role` and `content` under these names, and known roles."""
    if isinstance(value, list):
        return [_renamed(item, columns) for item in value]
    if not isinstance(value, dict):
        return value
    turn = dict(value)
    for known, source in (("role", columns.role), ("content", columns.content)):
        if source is not None and source in turn:
            turn[known] = turn.pop(source)
    for key in ("role", "from", "speaker"):
        role = turn.get(key)
        if isinstance(role, str) and role in columns.roles:
            turn[key] = columns.roles[role]
    return turn


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
    return frozenset((*keys, *others, *negatives, *LABELS, *ANSWERS, *_PROMPTS))


# Prompts


def prompt_of(fields: Fields, *, answered: bool = False) -> tuple[list[Message], list[str]]:
    """Messages that end with a user or tool turn, and the keys that they are from; trailing
    assistant turns are dropped if it is `answered`. Raises DataError."""
    key = next((key for key in _PROMPTS if key in fields and _asks(key, fields[key])), None)
    if key is None:
        raise DataError(
            f"unknown layout with keys {_key_list(fields)}; nearest is a prompt, without"
            f" {' or '.join(_PROMPTS[:3])}"
        )
    used = [key]
    value = fields[key]
    if isinstance(value, str) and key in _JOINED:
        more = [k for k in _JOINED[key] if isinstance(fields.get(k), str)]
        used += more
        value = "\n".join(part for part in (value, *(fields[k] for k in more)) if part)
        if not value.strip():
            raise LeftOut("empty instruction")
    turns = read_turns(value, key, text_role=None if key in TURNS else "user")
    if key != "history" and fields.get("history"):
        used.append("history")
        turns = read_turns(fields["history"], "history") + turns
    system = next((fields[key] for key in SYSTEMS if fields.get(key)), None)
    if system is not None and [turn["role"] for turn in turns[:1]] != ["system"]:
        turns.insert(0, {"role": "system", "content": text_of(system)})
    while answered and turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise DataError("the prompt does not end with a user or tool turn")
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise LeftOut("empty prompt")
    return turns, used


def _asks(key: str, value: Any) -> bool:
    """`context` is messages in HelpSteer3 and a text beside a question elsewhere; `history` is the
    post in SHP and earlier pairs elsewhere."""
    if key == "context":
        return isinstance(value, list)
    return isinstance(value, str) if key == "history" else True


# Conversations


def _conversation(fields: Fields) -> Conversation:
    """Messages; an answer in a column of its own is the last one where they end with a user."""
    key = next(key for key in TURNS if key in fields)
    turns = read_turns(fields[key], key, weights=True)
    system = next((fields[key] for key in SYSTEMS if fields.get(key)), None)
    if system is not None and [turn["role"] for turn in turns[:1]] != ["system"]:
        turns.insert(0, {"role": "system", "content": text_of(system)})
    answer = next((key for key in ANSWERS if key in fields), None)
    if answer is not None and turns and turns[-1]["role"] in ("user", "tool"):
        turns += read_turns(fields[answer], answer, text_role="assistant")
    _refuse_undesirable(fields)
    return _answered(turns, fields)


def _question_and_answer(fields: Fields) -> Conversation:
    answer = next(key for key in ANSWERS if key in fields)
    turns = prompt_of(fields)[0] + read_turns(fields[answer], answer, text_role="assistant")
    _refuse_undesirable(fields)
    return _answered(turns, fields)


def _refuse_undesirable(fields: Fields) -> None:
    key = next((key for key in LABELS if key in fields), None)
    if key is not None and _label(fields[key]) is False:
        raise LeftOut(f"the answer is labelled undesirable ({key})")


def _answered(messages: list[Message], fields: Fields) -> Conversation:
    """Turns after the last assistant turn are dropped: nothing in them is trained."""
    last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise DataError("no assistant turn")
    messages = messages[: last + 1]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not all(m.get("content", "").strip() or m.get("tool_calls") for m in answers):
        raise LeftOut("empty assistant turn")
    weights = [message.pop("weight", 1) for message in answers]
    if not any(weights):
        raise LeftOut("every assistant turn has weight 0")
    tools = read_tools(fields.get("tools", fields.get("functions")))
    return Conversation(messages, tools, None if all(weights) else weights)


# Comparisons


def _compared(fields: Fields, better: str = "chosen", worse: str = "rejected") -> list[Pair]:
    """Two answers, or two whole conversations that differ in their last answer alone."""
    refuse_tools(fields)
    chosen, rejected = (
        read_turns(fields[key], key, text_role="assistant") for key in (better, worse)
    )
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    shared = chosen[:n]
    asked = next((key for key in _PROMPTS if key in fields and _asks(key, fields[key])), None)
    if any(turns and turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
        repeated = [] if asked is None else read_turns(fields[asked], asked, text_role="user")
        # Some datasets repeat the prompt, its last turn or the better chat in another column.
        is_part = repeated == shared[-len(repeated) :] or (shared and repeated[:n] == shared)
        if repeated and not is_part:
            raise DataError(f"{better} and {worse} do not begin with the prompt")
        prompt = prompt_of({"prompt": shared} | {k: fields[k] for k in SYSTEMS if k in fields})[0]
    elif asked is not None:
        prompt = prompt_of(fields)[0] + shared
    elif set(fields) == {better, worse} and isinstance(fields[better], str):
        return [_continued(fields[better], str(fields[worse]))]
    else:
        prompt = shared
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise DataError("the prompt does not end with a user or tool turn")
    margin = fields.get("margin")
    if margin is not None and (type(margin) not in (int, float) or not abs(margin) < 1e30):  # NaN
        raise DataError("margin is not a finite number")
    margin = None if margin is None else float(margin)
    return [Pair(prompt, _answer(chosen[n:], better), _answer(rejected[n:], worse), margin)]


def _continued(chosen: str, rejected: str) -> Pair:
    """TRL's implicit prompt of plain texts: what both begin with, up to a whole word."""
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    while n and any(_WITHIN_WORD.fullmatch(text[n - 1 : n + 1]) for text in (chosen, rejected)):
        n -= 1
    prompt = chosen[:n].rstrip()
    if not prompt:
        raise DataError("no prompt: chosen and rejected have no beginning in common")
    n = len(prompt)
    return Pair([{"role": "user", "content": prompt}], chosen[n:], rejected[n:])


def _openai_pair(fields: Fields) -> list[Pair]:
    return _compared(fields, "preferred_output", "non_preferred_output")


def _last_turn_and_rejected(fields: Fields) -> list[Pair]:
    """ms-swift: a conversation, and a worse answer than its last one."""
    key = next(key for key in TURNS if key in fields)
    turns = read_turns(fields[key], key)
    split = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": fields["rejected_response"]}
    others = {k: v for k, v in fields.items() if k != key and k not in split}
    return _compared(others | split)


def _ranking(fields: Fields) -> list[Pair]:
    """K(K-1)/2 pairs of K answers, fewer where some are ranked equal; only those in `pairs`, as
    [better, worse], where it is there. Pairs of all records with the same `ranking_group` weigh as
    one ranking."""
    refuse_tools(fields)
    prompt = prompt_of(fields)[0]
    texts, levels = ranking_levels(fields)
    chosen = None
    if "pairs" in fields:
        place = {answer: n for n, level in enumerate(levels) for answer in level}
        try:
            chosen = {(better, worse) for better, worse in fields["pairs"]}
            ordered = all(place[better] < place[worse] for better, worse in chosen)
        except (TypeError, ValueError, KeyError):
            ordered = False
        if not ordered:
            raise DataError("pairs is not a list of [better, worse] in the order of ranking")
    pairs = ranked_pairs(prompt, texts, levels, chosen)
    if isinstance(group := fields.get("ranking_group"), str):
        return [replace(pair, group=group, shared=True) for pair in pairs]
    return pairs


def ranking_levels(fields: Fields) -> tuple[list[str], list[list[int]]]:
    """The answers of a ranking, and their numbers, best first, ties together. Raises DataError."""
    answers, ranking = fields["answers"], fields["ranking"]
    if not isinstance(answers, list) or not isinstance(ranking, list):
        raise DataError("answers or ranking is not a list")
    levels = [level if isinstance(level, list) else [level] for level in ranking]
    indices = list(chain(*levels))
    if not all(type(i) is int for i in indices) or sorted(indices) != list(range(len(answers))):
        raise DataError("ranking does not name every answer once", hint="such as [2, [0, 3], 1]")
    return [_text_answer(answer) for answer in answers], levels


def _two_answers(
    fields: Fields, first: str, second: str, preference: Callable[[Fields], float]
) -> list[Pair]:
    """`preference`: above 0 where the first answer is better, 0 where both are equal."""
    refuse_tools(fields)
    side = preference(fields)
    if not side:
        raise LeftOut("both answers are rated equal")
    better, worse = (first, second) if side > 0 else (second, first)
    others = {key: value for key, value in fields.items() if key not in (first, second)}
    return _compared(others | {"chosen": fields[better], "rejected": fields[worse]})


def _ratings(fields: Fields, key: str, score: Callable[[Any, int], float]) -> list[Pair]:
    """A list of answers, each with a score: UltraFeedback and the like."""
    refuse_tools(fields)
    answers = fields[key]
    if not isinstance(answers, list):
        raise DataError(f"{key} is not a list of answers")
    texts = [_text_answer(answer) for answer in answers]
    return ranked_pairs(
        prompt_of(fields)[0], texts, levels_of(score(a, n) for n, a in enumerate(answers))
    )


def levels_of(scores: Iterable[float]) -> list[list[int]]:
    """Numbers of the answers by score, the best first, equal ones together."""
    levels: dict[float, list[int]] = {}
    for number, score in enumerate(scores):
        levels.setdefault(score, []).append(number)
    return [levels[score] for score in sorted(levels, reverse=True)]


def ranked_pairs(
    prompt: list[Message],
    texts: list[str],
    levels: Sequence[Sequence[int]],
    chosen: Container[tuple[int, int]] | None = None,
) -> list[Pair]:
    """The pairs of a ranking, or those of `chosen`."""
    group = blake2b(json.dumps([prompt, texts, levels]).encode(), digest_size=16).hexdigest()
    return [
        Pair(prompt, texts[better], texts[worse], group=group)
        for above, below in combinations(levels, 2)
        for better, worse in product(above, below)
        if chosen is None or (better, worse) in chosen
    ]


def _overall(answer: Any, _: int) -> float:
    """UltraFeedback: the mean rating of the aspects. `overall_score` has known faults (10 for 1),
    and is used where nothing else is."""
    if not isinstance(answer, dict):
        raise DataError("an answer has no rating")
    aspects = answer.get("annotations")
    ratings = [
        aspect["Rating"]
        for aspect in (aspects.values() if isinstance(aspects, dict) else ())
        if isinstance(aspect, dict) and aspect.get("Rating") not in (None, "N/A")
    ]
    if ratings:
        return sum(_number(rating, "Rating") for rating in ratings) / len(ratings)
    for key in ("fine-grained_score", "overall_score", "score", "rating"):
        if answer.get(key) is not None:
            return _number(answer[key], key)
    if answer.get("rank") is not None:  # Nectar
        return -_number(answer["rank"], "rank")
    raise DataError("an answer has no rating")


def _parallel_ratings(fields: Fields) -> list[Pair]:
    """Distilabel: a list of answers beside a list of ratings."""
    ratings = fields["ratings"]
    if not isinstance(ratings, list) or len(ratings) != len(fields["generations"]):
        raise DataError("generations and ratings differ in length")
    return _ratings(fields, "generations", lambda _, n: _number(ratings[n], "ratings"))


def _labelled(fields: Fields) -> Rated:
    """KTO: an answer that is desirable or not."""
    key = next(key for key in LABELS if key in fields)
    label = _label(fields[key])
    if label is None:
        raise DataError(f"{key} is neither true nor false")
    return _rated(fields, float(label))


def _scored(fields: Fields) -> Rated:
    """HelpSteer: an answer with a score; compared by helpfulness."""
    key = next(key for key in SCORES if key in fields)
    return _rated(fields, _number(fields[key], key))


def _rated(fields: Fields, score: float) -> Rated:
    refuse_tools(fields)
    key = next((key for key in ANSWERS if key in fields), None)
    if key is None:  # the last turn of a conversation
        turns = _conversation({k: v for k, v in fields.items() if k not in LABELS}).messages
        return Rated(prompt_of({"prompt": turns[:-1]})[0], _answer(turns[-1:], "it"), score)
    answer = _answer(read_turns(fields[key], key, text_role="assistant"), key)
    return Rated(prompt_of(fields)[0], answer, score)


def _label(value: Any) -> bool | None:
    """A boolean, 0 or 1, or the text of one; None for anything else."""
    if isinstance(value, str):
        return _LABEL_TEXTS.get(value.strip().lower())
    return bool(value) if type(value) in (bool, int, float) and value in (0, 1) else None


def _number(value: Any, key: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{key} is not a number")
    return number


def _answer(turns: list[Message], key: str) -> str:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise DataError(f"{key} is not one assistant turn after the prompt")
    if turns[0].get("tool_calls"):
        raise DataError(f"{key} calls a tool, and only text is compared")
    if has_reasoning(turns[0]):
        raise DataError(f"{key} has reasoning, and only its text would be compared")
    return str(turns[0]["content"])


def _text_answer(answer: Any) -> str:
    if isinstance(answer, dict) and "role" not in answer:
        key = next((key for key in ("text", "content", *ANSWERS) if key in answer), None)
        answer = answer if key is None else answer[key]
    return _answer(read_turns(answer, "an answer", text_role="assistant"), "an answer")


def refuse_tools(fields: Fields) -> None:
    asked = fields.get("input")
    tools = fields.get("tools", asked.get("tools") if isinstance(asked, dict) else None)
    if read_tools(tools):
        raise DataError("tools are not read from preference records")


# Texts


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


def _winner(fields: Fields) -> float:
    return {"model_a": 1.0, "model_b": -1.0}.get(str(fields["winner"]), 0.0)


def _keys(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


def _verdict(first: str, second: str, key: str, sign: float, zero: float = 0.0) -> Any:
    """A row's reader: the first answer is better where `sign * (value - zero)` is above 0."""
    return partial(
        _two_answers,
        first=first,
        second=second,
        preference=lambda fields: sign * (_number(fields[key], key) - zero),
    )


_ASKED = (_PROMPTS,)
LAYOUTS: tuple[Layout, ...] = (
    Layout("text", "a text (text)", _keys("text"), _text),
    Layout("chat", "a conversation (messages)", (TURNS,), _conversation),
    Layout("chat", "a prompt and its answer", (_PROMPTS, ANSWERS), _question_and_answer),
    # Comparisons of answers to one prompt.
    Layout("comparison", "a ranking", (*_ASKED, *_keys("answers", "ranking")), _ranking),
    Layout("comparison", "chosen and rejected", _keys("chosen", "rejected"), _compared),
    Layout(
        "comparison",
        "chosen_response and rejected_response",
        (*_ASKED, *_keys("chosen_response", "rejected_response")),
        partial(_compared, better="chosen_response", worse="rejected_response"),
    ),
    Layout(
        "comparison",
        "OpenAI's preferred_output and non_preferred_output",
        (("input",), *_keys("preferred_output", "non_preferred_output")),
        _openai_pair,
    ),
    Layout(
        "comparison",
        "messages and rejected_response",
        (TURNS, *_keys("rejected_response")),
        _last_turn_and_rejected,
    ),
    Layout(
        "comparison",
        "SHP",
        (*_ASKED, *_keys("human_ref_A", "human_ref_B", "labels")),
        _verdict("human_ref_A", "human_ref_B", "labels", 1, 0.5),
    ),
    Layout(
        "comparison",
        "HelpSteer3",
        (*_ASKED, *_keys("response1", "response2", "overall_preference")),
        _verdict("response1", "response2", "overall_preference", -1),
    ),
    Layout(
        "comparison",
        "HelpSteer2 preferences",
        (*_ASKED, *_keys("response_1", "response_2", "preference_strength")),
        _verdict("response_1", "response_2", "preference_strength", -1),
    ),
    Layout(
        "comparison",
        "PKU-SafeRLHF",
        (*_ASKED, *_keys("response_0", "response_1", "better_response_id")),
        _verdict("response_0", "response_1", "better_response_id", -1, 0.5),
    ),
    Layout(
        "comparison",
        "Chatbot Arena",
        _keys("conversation_a", "conversation_b", "winner"),
        partial(_two_answers, first="conversation_a", second="conversation_b", preference=_winner),
    ),
    Layout(
        "comparison",
        "rated completions (UltraFeedback)",
        (*_ASKED, *_keys("completions")),
        partial(_ratings, key="completions", score=_overall),
    ),
    Layout(
        "comparison",
        "ranked answers (Nectar)",
        (*_ASKED, *_keys("answers")),
        partial(_ratings, key="answers", score=_overall),
    ),
    Layout(
        "comparison",
        "generations and ratings",
        (*_ASKED, *_keys("generations", "ratings")),
        _parallel_ratings,
    ),
    # One answer each, compared with other records of the same prompt.
    Layout("rated", "a labelled answer (KTO)", (_PROMPTS, ANSWERS, LABELS), _labelled),
    Layout("rated", "a labelled conversation (KTO)", (TURNS, LABELS), _labelled),
    Layout("rated", "an answer with a score (HelpSteer)", (_PROMPTS, ANSWERS, SCORES), _scored),
    Layout("passages", "a query and its passages", (QUERIES, POSITIVES), _passages),
    Layout("prompt", "a prompt", _ASKED, lambda fields: prompt_of(fields, answered=True)[0]),
)
