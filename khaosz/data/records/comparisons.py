"""Answers to one prompt, as pairs: compared, ranked, rated or labelled."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import chain, combinations, product
from typing import Any

from khaosz.data.records.columns import ANSWERS, LABELS, PROMPTS, SCORES, SYSTEMS, TURNS, Fields
from khaosz.data.records.conversations import is_prompt, prompt_of, read_conversation, read_label
from khaosz.data.records.turns import LeftOut, Message, has_reasoning, read_tools, read_turns
from khaosz.errors import DataError

_WITHIN_WORD = re.compile(r"[A-Za-z0-9]{2}")


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


def read_comparison(fields: Fields, better: str = "chosen", worse: str = "rejected") -> list[Pair]:
    """Two answers, or two whole conversations that differ in their last answer alone."""
    refuse_tools(fields)
    chosen, rejected = (
        read_turns(fields[key], key, text_role="assistant") for key in (better, worse)
    )
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    shared = chosen[:n]
    asked = next((key for key in PROMPTS if key in fields and is_prompt(key, fields[key])), None)
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


def read_openai_pair(fields: Fields) -> list[Pair]:
    return read_comparison(fields, "preferred_output", "non_preferred_output")


def read_last_turn_and_rejected(fields: Fields) -> list[Pair]:
    """ms-swift: a conversation, and a worse answer than its last one."""
    key = next(key for key in TURNS if key in fields)
    turns = read_turns(fields[key], key)
    split = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": fields["rejected_response"]}
    others = {k: v for k, v in fields.items() if k != key and k not in split}
    return read_comparison(others | split)


def read_ranking(fields: Fields) -> list[Pair]:
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


def read_two_answers(
    fields: Fields, first: str, second: str, preference: Callable[[Fields], float]
) -> list[Pair]:
    """`preference`: above 0 where the first answer is better, 0 where both are equal."""
    refuse_tools(fields)
    side = preference(fields)
    if not side:
        raise LeftOut("both answers are rated equal")
    better, worse = (first, second) if side > 0 else (second, first)
    others = {key: value for key, value in fields.items() if key not in (first, second)}
    return read_comparison(others | {"chosen": fields[better], "rejected": fields[worse]})


def read_ratings(fields: Fields, key: str, score: Callable[[Any, int], float]) -> list[Pair]:
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


def overall_rating(answer: Any, _: int) -> float:
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


def read_parallel_ratings(fields: Fields) -> list[Pair]:
    """Distilabel: a list of answers beside a list of ratings."""
    ratings = fields["ratings"]
    if not isinstance(ratings, list) or len(ratings) != len(fields["generations"]):
        raise DataError("generations and ratings differ in length")
    return read_ratings(fields, "generations", lambda _, n: _number(ratings[n], "ratings"))


def read_labelled(fields: Fields) -> Rated:
    """KTO: an answer that is desirable or not."""
    key = next(key for key in LABELS if key in fields)
    label = read_label(fields[key])
    if label is None:
        raise DataError(f"{key} is neither true nor false")
    return _rated(fields, float(label))


def read_scored(fields: Fields) -> Rated:
    """HelpSteer: an answer with a score; compared by helpfulness."""
    key = next(key for key in SCORES if key in fields)
    return _rated(fields, _number(fields[key], key))


def _rated(fields: Fields, score: float) -> Rated:
    refuse_tools(fields)
    key = next((key for key in ANSWERS if key in fields), None)
    if key is None:  # the last turn of a conversation
        turns = read_conversation({k: v for k, v in fields.items() if k not in LABELS}).messages
        return Rated(prompt_of({"prompt": turns[:-1]})[0], _answer(turns[-1:], "it"), score)
    answer = _answer(read_turns(fields[key], key, text_role="assistant"), key)
    return Rated(prompt_of(fields)[0], answer, score)


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


def winner(fields: Fields) -> float:
    return {"model_a": 1.0, "model_b": -1.0}.get(str(fields["winner"]), 0.0)


def verdict(first: str, second: str, key: str, sign: float, zero: float = 0.0) -> Any:
    """A row's reader: the first answer is better where `sign * (value - zero)` is above 0."""
    return partial(
        read_two_answers,
        first=first,
        second=second,
        preference=lambda fields: sign * (_number(fields[key], key) - zero),
    )
