"""The demo's first act: a folder of documents is ingested, and questions are answered by quotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.rag import KnowledgeBase, StructureSplitter
from khaosz.rag.answer import ask

_CHARACTERS = 300  # of a passage
FOLDER = Path(__file__).parent / "documents"


@dataclass(frozen=True)
class Asked:
    """A question about `FOLDER`; a right answer contains `answer`, from the file `doc`."""

    question: str
    answer: str
    doc: str


QUESTIONS = (
    Asked("租房合同什么时候到期？", "2028 年 2 月 29 日", "租房合同.docx"),
    Asked("押金什么时候退还？", "十个工作日", "租房合同.docx"),
    Asked("碎纸机多少钱一台？", "899", "价目表.csv"),
    Asked("电梯检修是哪一天？", "5 月 16 日", "电梯检修通知.txt"),
    Asked("How many days of annual leave do I have?", "22", "leave-rules.md"),
    Asked("How often should I replace the filter?", "eight months", "air-purifier-manual.pdf"),
    Asked("What does E3 on the display mean?", "fan is blocked", "air-purifier-manual.pdf"),
    Asked("How much is a main course for guests?", "6.90", "canteen.html"),
)  # fmt: skip


def open_documents(out: Path, console: Console) -> KnowledgeBase:
    """The knowledge base of `FOLDER` in the folder `out`; only new and changed files are read.
    A file whose reader is not installed is named."""
    out.mkdir(parents=True, exist_ok=True)
    # Short passages: the small model of the third act finds the sentence in them.
    base = KnowledgeBase(out / "documents.kb", splitter=StructureSplitter(max_chars=_CHARACTERS))
    report = base.add([FOLDER])
    files = f"{report.added + report.updated} files read, {report.unchanged} read before"
    console.print(f"  {FOLDER}: {files}", highlight=False, markup=False, soft_wrap=True)
    for problem in report.problems:
        line = f"  {problem.path.name}: {problem.message} ({problem.hint})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return base


def run_documents(out: Path, console: Console) -> dict[str, Any]:
    """Quote the answers of `QUESTIONS` with file and page or line; no model is used."""
    right = 0
    with open_documents(out, console) as base:
        documents = len(base.documents())
        for each in QUESTIONS:
            reply = ask(base, each.question, None)
            text = "".join(reply)
            right += is_right(text, each)
            places = [f"[{number}] {hit.place}" for number, hit in enumerate(reply.passages, 1)]
            show(console, each.question, text, places)
    console.print(f"  {right} of {len(QUESTIONS)} right", highlight=False)
    return {"reached": right > 0, "documents": documents, "questions": len(QUESTIONS),
            "right": right}  # fmt: skip


def is_right(text: str, asked: Asked) -> bool:
    from khaosz.evaluation.answers import contains_answer, strip_markers

    return contains_answer(strip_markers(text), [asked.answer])


def show(console: Console, question: str, text: str, places: Sequence[str] = ()) -> None:
    console.print("  [bold cyan]>[/bold cyan] ", end="")
    console.print(question, markup=False, highlight=False)
    for line in (text, *places):
        console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
