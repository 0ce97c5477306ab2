"""Preferences given on the page, as training records.

Each is one JSON line of DATA/preferences.jsonl, in the format of `khaosz preference collect`:
`{"prompt", "answers", "ranking", ...}`. A ranking of K answers is one record. The reader makes all
of its K(K-1)/2 pairs and keeps them in one batch, which Ouyang et al. 2022 (arXiv:2203.02155,
section 3.5) found necessary; adjacent pairs alone would drop the surest one, best over worst.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import Field, model_validator

from khaosz.data.rankings.merge import merge
from khaosz.data.rankings.ranking_file import read_rankings, take_back
from khaosz.data.records.preference import prompt_key, to_pairs, to_prompt
from khaosz.data.records.readers import parse_line
from khaosz.data.tokenizer.training_text import refuse_surrogates
from khaosz.errors import DataError
from khaosz.files import append, locked
from khaosz.serve.errors import ApiError, errors, map_disk_full
from khaosz.serve.messages import MAX_MESSAGES, RequestModel
from khaosz.serve.replies import Reply, exported, json_lines
from khaosz.serve.schema import Sampling, Seed

FILE = "preferences.jsonl"
MAX_ANSWERS = 26  # as in the terminal
MAX_PROMPTS = 100_000  # of one question which are ranked
MAX_DISPUTES = 50  # of an agreement
_CHUNK = 1 << 16

Text = Annotated[str, Field(min_length=1)]
Annotator = Annotated[
    str,
    Field(min_length=1, max_length=64, pattern=r"^[^\s\x00-\x1f]([^\x00-\x1f]*[^\s\x00-\x1f])?$"),
]
Finish = Literal["stop", "length", "tool_calls"]


class PromptMessage(RequestModel):
    role: Literal["system", "user", "assistant"]
    content: Text


class SampledWith(Sampling):
    """How the answers were sampled: parameters of /v1/chat/completions."""


class AnswerSource(RequestModel):
    """What gave an answer. `seed` is that of its request."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    seed: Seed | None = None
    sampling: SampledWith | None = None

    def record(self) -> dict[str, Any]:
        refuse_surrogates(self.model)
        sampling = self.sampling.model_dump(exclude_none=True) if self.sampling else {}
        return {
            "model": self.model,
            "sampling": sampling if self.seed is None else {**sampling, "seed": self.seed},
        }


class PreferenceRequest(RequestModel):
    """`messages` ends with the user's turn. Either `chosen` and `rejected`, or `ranked`: the best
    answer first, equal ones in a list. `finish_reasons`: of the answers, in the same order;
    `sources`: what gave each, several where models gave the same text, instead of `model`."""

    messages: Annotated[list[PromptMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    chosen: Text | None = None
    rejected: Text | None = None
    ranked: (
        Annotated[
            list[Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_ANSWERS)]],
            Field(min_length=2, max_length=MAX_ANSWERS),
        ]
        | None
    ) = None
    finish_reasons: Annotated[list[Finish], Field(max_length=MAX_ANSWERS)] | None = None
    model: Annotated[str, Field(max_length=512)] | None = None
    seed: Seed | None = None
    sampling: SampledWith | None = None
    annotator: Annotator | None = None
    sources: (
        Annotated[
            list[Annotated[list[AnswerSource], Field(min_length=1, max_length=MAX_ANSWERS)]],
            Field(max_length=MAX_ANSWERS),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _check_answers(self) -> PreferenceRequest:
        pair = (self.chosen is not None, self.rejected is not None)
        if self.ranked is None and pair != (True, True):
            raise ValueError("give chosen and rejected, or ranked")
        if self.ranked is not None and any(pair):
            raise ValueError("give chosen and rejected, or ranked, not both")
        answers = [text for level in self.levels for text in level]
        if not 2 <= len(answers) <= MAX_ANSWERS:
            raise ValueError(f"{len(answers)} answers, not 2 to {MAX_ANSWERS}")
        if len({*answers}) < len(answers):
            raise ValueError("two answers are the same")
        if self.finish_reasons is not None and len(self.finish_reasons) != len(answers):
            raise ValueError(
                f"{len(self.finish_reasons)} finish_reasons for {len(answers)} answers"
            )
        if self.sources is not None and len(self.sources) != len(answers):
            raise ValueError(f"{len(self.sources)} sources for {len(answers)} answers")
        return self

    @property
    def levels(self) -> list[list[str]]:
        if self.ranked is None:
            assert self.chosen is not None and self.rejected is not None
            return [[self.chosen], [self.rejected]]
        return [[level] if isinstance(level, str) else level for level in self.ranked]

    def record(self) -> dict[str, Any]:
        """Raises `DataError` and `ApiError` for a record that training could not use."""
        ranking: list[int | list[int]] = []
        answers: list[str] = []
        for level in self.levels:
            numbers = list(range(len(answers), len(answers) + len(level)))
            ranking.append(numbers[0] if len(numbers) == 1 else numbers)
            answers += level
        texts = [*(message.content for message in self.messages), *answers]
        for text in (*texts, self.model or "", self.annotator or ""):
            refuse_surrogates(text)
        prompt = [message.model_dump() for message in self.messages]
        record: dict[str, Any] = {"prompt": prompt, "answers": answers, "ranking": ranking}
        if not to_pairs(record):
            raise ApiError(400, "all answers are ranked equal", param="ranked")
        if not all(answer.strip() for answer in answers):
            raise ApiError(400, "an answer is empty", param="ranked" if self.ranked else None)
        sampling = self.sampling.model_dump(exclude_none=True) if self.sampling else {}
        if self.seed is not None:
            sampling["seed"] = self.seed
        sources = None
        if self.sources is not None:
            sources = [[source.record() for source in same] for same in self.sources]
        more = {
            "finish_reasons": self.finish_reasons,
            "model": self.model,
            "sources": sources,
            "annotator": self.annotator,
        }
        record |= {key: value for key, value in more.items() if value is not None}
        return record | ({"sampling": sampling} if sampling else {}) | {"created": int(time.time())}


class Preferences(Reply):
    """`file`: in the folder of --data; `peers`: names of models of other servers (--peer)."""

    object: Literal["preferences"]
    count: int
    file: str
    peers: list[str]


class PreferenceAdded(Reply):
    """`pairs`: training pairs of the record; `count`: records in the file."""

    object: Literal["preference"]
    pairs: int
    count: int


class RankedRequest(RequestModel):
    prompts: Annotated[
        list[Annotated[list[PromptMessage], Field(min_length=1, max_length=MAX_MESSAGES)]],
        Field(max_length=MAX_PROMPTS),
    ]
    annotator: Annotator | None = None


class RankedPrompts(Reply):
    """`ranked`: of each prompt, whether the annotator has ranked answers to it."""

    object: Literal["preferences.ranked"]
    ranked: list[bool]


class PreferenceTaken(Reply):
    """The ranking that was taken back: its prompt; `count`: records that are left."""

    object: Literal["preference.deleted"]
    messages: list[dict[str, Any]]
    count: int


class PairAgreement(Reply):
    """`same`: the share of `comparisons` that two annotators order or tie alike."""

    annotators: list[str]
    items: int
    comparisons: int
    same: float


class ModelRow(Reply):
    """`rate`: wins over comparisons with other models, a tie counts half; `score`: of
    Bradley-Terry."""

    model: str
    comparisons: int
    wins: float
    rate: float
    interval: list[float] | None
    score: float | None


class ConsensusCount(Reply):
    records: int
    pairs: int
    pairs_without_majority: int


class DisputedItem(Reply):
    """`rankings`: by annotator, numbers of `candidates`, best first, ties in a list."""

    id: str
    prompt: list[dict[str, Any]]
    candidates: list[str]
    models: list[list[str]]
    rankings: dict[str, list[int | list[int]]]
    discordance: float


class AgreementReport(Reply):
    """As `khaosz preference merge --json`, with the most disputed items."""

    object: Literal["preferences.agreement"]
    rankings: int
    superseded: int
    items: int
    shared_items: int
    annotators: dict[str, int]
    alpha: float | None
    alpha_interval: list[float] | None
    agreement: list[PairAgreement]
    models: list[ModelRow]
    disputed: int
    consensus: ConsensusCount
    disputes: list[DisputedItem]


class PreferenceFile:
    """Thread-safe. Other programs may append to the file too."""

    def __init__(self, path: Path) -> None:
        """Repairs an incomplete last line. Raises `DataError` for a file that cannot be used."""
        self.path = path
        self._lock = threading.Lock()
        self._counted = self._count = 0  # bytes that were scanned, and lines in them
        try:
            if path.exists():
                self._repair()
        except OSError as error:
            raise DataError(f"{path} cannot be used: {error.strerror or error}") from None

    def _is_last_line_open(self) -> bool:
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def _repair(self) -> None:
        """A last line without a line break gets one if it is complete JSON. Otherwise it is moved
        to another file: its request was never answered."""
        with self.path.open("r+b") as file:
            end = sum(len(part) for part in _whole_lines(self.path))
            file.seek(end)
            torn = file.read()
            if not torn:
                return
            try:
                json.loads(torn)
                file.write(b"\n")
            except ValueError:
                append(self.path.with_suffix(".torn"), torn + b"\n")
                file.truncate(end)
            file.flush()
            os.fsync(file.fileno())

    def append(self, record: dict[str, Any]) -> int:
        """Append a line, or nothing; it is on the disk when this returns. Returns the number of
        records. Raises `ApiError` where the disk is full."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock, map_disk_full(), locked(self.path):
            if self._is_last_line_open():  # by an editor, or a program that was killed
                self._repair()
                self._counted = self._count = 0
            append(self.path, line)
            return self._count_lines()

    def take_back(self, annotator: str | None) -> dict[str, Any] | None:
        """Remove the last record of an annotator, durably; None if there is none."""
        with self._lock, map_disk_full():
            taken = take_back(self.path, annotator)
            self._counted = self._count = 0
            return taken

    def count(self) -> int:
        with self._lock:
            return self._count_lines()

    def _count_lines(self) -> int:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._counted:  # it was replaced
            self._counted = self._count = 0
        if size > self._counted:
            with self.path.open("rb") as file:
                file.seek(self._counted)
                while part := file.read(min(_CHUNK, size - self._counted)):
                    self._count += part.count(b"\n")
                    self._counted += len(part)
        return self._count

    def ranked_by(self, annotator: str | None) -> set[str]:
        """The keys of the prompts that an annotator has ranked, or without a name, whose rankings
        have none. Lines that are not rankings are passed over."""
        keys = set()
        for line in b"".join(self.lines()).splitlines():
            record = parse_line(line)
            if isinstance(record, dict) and record.get("annotator") == annotator:
                with suppress(DataError):
                    keys.add(prompt_key(to_prompt(record).prompt))
        return keys

    def lines(self) -> Iterator[bytes]:
        """The complete lines, in pieces of any length."""
        return _whole_lines(self.path) if self.path.exists() else iter(())


def preference_routes(file: PreferenceFile, peers: Iterable[str] = ()) -> APIRouter:
    """The routes are not async, so FastAPI runs them in threads: they wait for the disk."""
    router, names = APIRouter(), list(peers)

    @router.post(
        "/v1/preferences",
        status_code=201,
        response_model=PreferenceAdded,
        responses=errors(400, 507),
    )
    def add_preference(request: PreferenceRequest) -> dict[str, Any]:
        """Add a preference. It is on the disk when this returns."""
        record = request.record()
        return {
            "object": "preference",
            "pairs": len(to_pairs(record)),
            "count": file.append(record),
        }

    @router.get("/v1/preferences", response_model=Preferences, responses=errors())
    def preferences() -> dict[str, Any]:
        shown = {"count": file.count(), "file": file.path.name, "peers": names}
        return {"object": "preferences", **shown}

    @router.post("/v1/preferences/ranked", response_model=RankedPrompts, responses=errors(400))
    def ranked(request: RankedRequest) -> dict[str, Any]:
        """Which prompts an annotator has ranked."""
        keys = file.ranked_by(request.annotator)
        prompts = [[message.model_dump() for message in each] for each in request.prompts]
        return {
            "object": "preferences.ranked",
            "ranked": [prompt_key(each) in keys for each in prompts],
        }

    @router.delete(
        "/v1/preferences/last", response_model=PreferenceTaken, responses=errors(400, 404, 507)
    )
    def take_back_preference(annotator: Annotator | None = None) -> dict[str, Any]:
        """Take the last ranking of an annotator back, or without a name the last that has none."""
        if (record := file.take_back(annotator)) is None:
            raise ApiError(404, "no ranking to take back", param="annotator")
        messages = to_prompt(record).prompt
        return {"object": "preference.deleted", "messages": messages, "count": file.count()}

    @router.get("/v1/preferences/agreement", response_model=AgreementReport, responses=errors(409))
    def agreement() -> dict[str, Any]:
        """How far annotators agree, which models win, and the most disputed items."""
        try:
            merged = merge(read_rankings([file.path]) if file.path.exists() else [])
        except DataError as error:
            raise ApiError(409, str(error)) from None
        report = {"object": "preferences.agreement", **merged.body()}
        return {**report, "disputes": merged.disputes()[:MAX_DISPUTES]}

    @router.get(
        "/v1/preferences/export",
        response_class=StreamingResponse,
        responses={**exported("One record per line, in the format of `khaosz train`."), **errors()},
    )
    def export_preferences() -> StreamingResponse:
        """All of them, as JSON lines."""
        return json_lines(file.lines(), FILE)

    return router


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The file up to its last line break, in pieces."""
    rest = b""
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            lines, newline, end = part.rpartition(b"\n")
            if newline:
                yield rest + lines + newline
                rest = end
            else:
                rest += end
