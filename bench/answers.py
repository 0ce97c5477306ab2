"""Are questions about documents answered, cited and refused? Questions of our own and of CMRC 2018.

    python -m bench answers MODEL --language zh --cmrc cmrc2018_dev_a.json --out answers.jsonl
    python -m bench answers --floor --cmrc cmrc2018_dev_a.json      (no model: what is never asked)
    python -m bench answers --quotes --cmrc cmrc2018_dev_a.json     (no model: sentences as answers)

Documents and questions are in `bench/questions/`: 100 answerable and 100 unanswerable questions per
language, of which 50 are on another subject altogether ("far") and 50 on the subject of a document
("near"). Of the Chinese answerable ones, 60 are ours and 40 are drawn from CMRC 2018, whose file is
not part of the repository (`--cmrc`); they are asked of a knowledge base of all its passages.
Answers are appended to `--out` as they come, and what is there is not asked again.

An answer is right if it contains an expected one after normalisation (`evaluation.answers`), and
cited if a passage that it cites is of the right document and contains the answer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.machine import as_markdown, describe
from khaosz.evaluation.answers import Graded, Question, contains_answer, graded_answers, report
from khaosz.rag import KnowledgeBase
from khaosz.rag.answer import PASSAGES, ask, strip_markers
from khaosz.rag.models.chat_models import open_chat_model
from khaosz.rag.quote import PASSAGES as QUOTE_PASSAGES
from khaosz.rag.relevance import has_relevant

QUESTIONS = Path(__file__).parent / "questions"
CMRC_ANSWERS = 40
KINDS = ("answerable", "near", "far")


def own(language: str) -> tuple[dict[str, str], dict[str, list[Question]]]:
    """Documents by name, and questions by kind."""
    return read_questions(QUESTIONS / f"{language}.toml")


def read_questions(file: Path) -> tuple[dict[str, str], dict[str, list[Question]]]:
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    documents = {each["name"]: each["text"].strip() + "\n" for each in data["documents"]}
    answerable = [
        Question(question, tuple(answers.split("|")), each["name"])
        for each in data["documents"]
        for question, answers in each["questions"]
    ]
    far, near = (list(map(Question, data["unrelated"][kind])) for kind in ("far", "near"))
    return documents, {"answerable": answerable, "near": near, "far": far}


def cmrc(path: Path) -> tuple[dict[str, str], list[Question]]:
    records = json.loads(path.read_text(encoding="utf-8"))
    documents = {each["context_id"]: each["context_text"] for each in records}
    questions = [
        Question(
            qa["query_text"], tuple(dict.fromkeys(map(str, qa["answers"]))), each["context_id"]
        )
        for each in records
        for qa in each["qas"]
    ]
    return documents, questions


def contracts(language: str) -> tuple[dict[str, str], list[Question]]:
    """Forty documents that differ only in their numbers, and a question about each."""
    documents, questions = {}, []
    for i in range(1, 41):
        month, fee = i % 12 + 1, i * 37
        if language == "zh":
            text = f"合同编号 {i}：甲方为第{i}公司，到期日 2027 年 {month} 月 3 日，费用 {fee} 元。"
            asked = f"合同 {i} 什么时候到期？", f"第{i}号合同多少钱？", f"合同{i}到期日"
        else:
            text = f"Contract number {i} with company {i} ends in month {month}. Fee: {fee} yuan."
            asked = (
                f"When does contract {i} end?",
                f"How much does contract {i} cost?",
                f"contract {i}",
            )
        documents[f"contract-{i}.md"] = text
        questions.append(Question(asked[i % 3], (), f"contract-{i}.md"))
    return documents, questions


def base_of(documents: dict[str, str], embedder: str | None) -> KnowledgeBase:
    base = KnowledgeBase(":memory:", embedder=embedder)
    for name, text in documents.items():
        base.add_text(text, name=name)
    return base


def refused(base: KnowledgeBase, questions: Sequence[Question]) -> int:
    """How many questions are refused before a model is asked."""
    return sum(
        not has_relevant(base, each.question, base.search(each.question, PASSAGES))
        for each in questions
    )


def quoted(
    base: KnowledgeBase, questions: Sequence[Question], k: int = QUOTE_PASSAGES
) -> tuple[int, int]:
    """How many of the quoted sentences contain an expected answer, and how many questions get
    none."""
    replies = [ask(base, each.question, None, k=k) for each in questions]
    texts = ["".join(reply) for reply in replies]
    right = sum(
        contains_answer(strip_markers(text), each.answers)
        for text, each in zip(texts, questions, strict=True)
    )
    return right, sum(reply.quote is None for reply in replies)


def quotes(options: argparse.Namespace) -> None:
    for language in ("zh", "en"):
        documents, kinds = own(language)
        base = base_of(documents, options.embedder)
        parts = {kind: (base, questions) for kind, questions in kinds.items()}
        if language == "zh" and options.cmrc is not None:
            stored, questions = cmrc(options.cmrc)
            parts["CMRC"] = base_of(stored, options.embedder), questions
        for kind, (base, questions) in parts.items():
            right, none = quoted(base, questions)
            values = {"task": "quotes", "language": language, "questions": kind}
            counts = {"asked": len(questions), "right": right, "no answer": none}
            print(json.dumps(values | counts, ensure_ascii=False), flush=True)


def floor(options: argparse.Namespace) -> None:
    for language in ("zh", "en"):
        documents, kinds = own(language)
        base = base_of(documents, options.embedder)
        parts = {kind: (base, questions) for kind, questions in kinds.items()}
        similar, questions = contracts(language)
        parts["forty contracts"] = base_of(similar, options.embedder), questions
        if language == "zh" and options.cmrc is not None:
            stored, questions = cmrc(options.cmrc)
            parts["CMRC"] = base_of(stored, options.embedder), questions
        for kind, (base, questions) in parts.items():
            print(
                json.dumps(
                    {
                        "task": "floor",
                        "embedder": options.embedder,
                        "language": language,
                        "questions": kind,
                        "asked": len(questions),
                        "refused": refused(base, questions),
                    },
                    ensure_ascii=False,
                ),
                flush=True,
            )


def parts_of(options: argparse.Namespace) -> list[tuple[str, KnowledgeBase, list[Question]]]:
    documents, kinds = own(options.language)
    base = base_of(documents, options.embedder)
    parts = [(kind, base, kinds[kind]) for kind in KINDS]
    if options.language == "zh" and options.cmrc is not None:
        stored, questions = cmrc(options.cmrc)
        drawn = random.Random(0).sample(questions, CMRC_ANSWERS)
        parts.insert(1, ("answerable", base_of(stored, options.embedder), drawn))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench answers", description=__doc__)
    parser.add_argument("model", nargs="?", help="a model directory or .gguf file")
    parser.add_argument("--language", choices=("zh", "en"), default="zh")
    parser.add_argument("--cmrc", type=Path, help="CMRC 2018 as JSON, for the Chinese questions")
    parser.add_argument("--embedder")
    parser.add_argument("--out", type=Path, default=Path("answers.jsonl"))
    parser.add_argument("-k", type=int, default=PASSAGES, help="passages in a prompt")
    parser.add_argument("--every", type=int, default=1, help="ask only every n-th question")
    parser.add_argument("--floor", action="store_true", help="ask no model")
    parser.add_argument("--quotes", action="store_true", help="quote sentences, without a model")
    options = parser.parse_args()
    print(as_markdown(describe()), file=sys.stderr)
    if options.floor:
        floor(options)
        return
    if options.quotes:
        quotes(options)
        return
    if options.model is None:
        parser.error("a model is needed, or --floor or --quotes")
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    answered = {(each.pop("kind"), each["question"]): each for each in records}
    model = open_chat_model(options.model)
    graded: dict[str, list[Graded]] = {kind: [] for kind in KINDS}
    for kind, base, questions in parts_of(options):
        for each in questions[:: options.every]:
            if (done := answered.get((kind, each.question))) is not None:
                done.pop("seconds")
                graded[kind].append(Graded(**done))
                continue
            started = time.perf_counter()
            (answer,) = graded_answers(base, model, [each], k=options.k)
            graded[kind].append(answer)
            seconds = round(time.perf_counter() - started, 1)
            record = {"kind": kind, **asdict(answer), "seconds": seconds}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for kind, answers in graded.items():
        print(f"{kind}: {report(answers).format()}")


if __name__ == "__main__":
    main()
