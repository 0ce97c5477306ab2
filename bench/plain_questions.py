"""Plain questions in Chinese and English: right answers, the language kept, nothing cut.

    python -m bench questions MODEL.gguf --llama-cpp /path/to/python --out answers.json
    python -m bench questions MODEL.gguf --only 4

The 40 questions of each language are in `tests/data/plain_questions.jsonl`, with what counts as
right: of each group of patterns, one is found in the answer (Unicode NFKC, without thousands
separators, case ignored; patterns in capitals as they are). They are asked at temperature 0, of
llama.cpp with the same file and prompt text (`--llama-cpp`: an interpreter with llama-cpp-python),
and at the defaults of the model. The terminal, the API and the request of the page are compared at
temperature 0 (`--interfaces`: for how many questions of each language).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import unicodedata
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from bench.machine import as_markdown, describe
from bench.serve import server
from khaosz.cli.terminal.conversation import Conversation, Settings
from khaosz.cli.terminal.local_backend import LocalBackend
from khaosz.data.tokenizer.chat import render_chat
from khaosz.errors import ConfigError
from khaosz.inference.generator import Generator
from khaosz.inference.parts import Part, PartStream

QUESTIONS = Path(__file__).parents[1] / "tests" / "data" / "plain_questions.jsonl"
MAX_TOKENS = 512
_HAN, _LETTER = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Question:
    id: str
    language: str
    kind: str
    question: str
    right: list[list[str]]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.question}]


@dataclass(frozen=True)
class Graded:
    id: str
    text: str
    right: bool
    kept: bool  # the language
    cut: bool
    markers: bool  # a control token of the template is in the text


def load(only: int | None = None) -> list[Question]:
    """The first `only` of each language."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    every = [Question(**json.loads(line)) for line in lines]
    chosen = []
    for language in ("en", "zh"):
        chosen += [each for each in every if each.language == language][:only]
    return chosen


def is_right(question: Question, answer: str) -> bool:
    text = re.sub(r"(?<=\d),(?=\d{3})", "", unicodedata.normalize("NFKC", answer))

    def found(pattern: str) -> bool:
        exact = pattern.isupper() and pattern.isalpha()
        pattern = unicodedata.normalize("NFKC", pattern)
        return re.search(pattern, text, 0 if exact else re.IGNORECASE) is not None

    return all(any(map(found, group)) for group in question.right)


def keeps_language(question: Question, answer: str) -> bool:
    """Whether prose is in the language of the question; a number or a formula is in every one.
    A translation is in the other."""
    han, letters = len(_HAN.findall(answer)), len(_LETTER.findall(answer))
    if question.kind == "translation" or han + letters < 4:
        return True
    return han * 5 > letters if question.language == "zh" else han * 5 < letters


def graded(question: Question, text: str, reason: str, markers: Sequence[str]) -> Graded:
    return Graded(
        question.id,
        text,
        is_right(question, text),
        keeps_language(question, text),
        reason == "length",
        any(marker in text for marker in markers),
    )


def answer_text(text: str) -> str:
    """Without thoughts."""
    stream = PartStream()
    parts = [*stream.feed(text), *stream.finish()]
    return "".join(p.text for p in parts if isinstance(p, Part) and p.kind == "content")


def ours(
    generator: Generator, questions: list[Question], markers: Sequence[str], **asked: Any
) -> list[Graded]:
    results = []
    for question in questions:
        params = generator.params(max_tokens=MAX_TOKENS, **asked)
        answer = generator.chat(question.messages, params)
        text = answer_text(answer.text)
        results.append(graded(question, text, answer.finish_reason, markers))
    return results


def peers(
    python: str,
    model: Path,
    generator: Generator,
    questions: list[Question],
    markers: Sequence[str],
) -> list[Graded]:
    prompts = [render_chat(generator.tokenizer, each.messages, None, True) for each in questions]
    asked = json.dumps({"prompts": prompts, "max_tokens": MAX_TOKENS, "threads": 2})
    command = [python, "-m", "bench.peer_llama_cpp", str(model)]
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise ConfigError(f"llama.cpp failed: {done.stderr.strip()[-300:]}")
    answers = json.loads(done.stdout)
    return [
        graded(question, answer_text(each["text"]), each["reason"], markers)
        for question, each in zip(questions, answers, strict=True)
    ]


def interfaces(model: Path, generator: Generator, questions: list[Question]) -> list[str]:
    """Ids of questions whose answers differ between terminal, API and page, at temperature 0."""
    settings = Settings(max_tokens=MAX_TOKENS, temperature=0.0)
    backend = LocalBackend(generator, str(model))
    different = []
    with server(str(model)) as (_, port):

        def call(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            request = Request(f"http://127.0.0.1:{port}/v1{path}", data, headers, method=method)
            with urlopen(request, timeout=600) as response:
                return json.load(response)

        for question in questions:
            events = backend.answer(Conversation(settings), question.question)
            terminal = "".join(
                event.text
                for event in events
                if isinstance(event, Part) and event.kind == "content"
            )
            body = {"model": "model", "messages": question.messages, "temperature": 0}
            body |= {"max_tokens": MAX_TOKENS}
            api = call("POST", "/chat/completions", body)["choices"][0]["message"]["content"]
            conversation, node = str(uuid.uuid4()), str(uuid.uuid4())
            asked = {"id": node, "parent": None, "role": "user", "content": question.question}
            stored = {"title": "", "nodes": [{**asked, "created": 1}], "selected": node}
            call("PUT", f"/conversations/{conversation}", stored)
            path = f"/conversations/{conversation}/generations"
            generation = call("POST", path, {**body, "parent": node, "truncation": "auto"})
            while generation["state"] in ("queued", "running"):
                time.sleep(0.2)
                generation = call("GET", f"/generations/{generation['id']}")
            if not terminal == api == generation["content"]:
                different.append(question.id)
    return different


def summary(name: str, results: list[Graded]) -> str:
    cells = [name]
    for language in ("en", "zh"):
        mine = [each for each in results if each.id.startswith(language)]
        cells += [f"{sum(each.right for each in mine)}/{len(mine)}"]
    kept = sum(each.kept for each in results)
    cells += [f"{kept}/{len(results)}", str(sum(each.cut for each in results))]
    cells += [str(sum(each.markers for each in results))]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", type=int, help="the first questions of each language")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has it")
    parser.add_argument("--seeds", type=int, default=1, help="runs at the defaults")
    parser.add_argument("--interfaces", type=int, default=4)
    parser.add_argument("--out", type=Path, help="all answers, as JSON")
    options = parser.parse_args()

    generator = Generator.from_directory(options.model)
    questions = load(options.only)
    markers = list(generator.tokenizer.special_ids)
    runs = {"ours, temperature 0": ours(generator, questions, markers, temperature=0.0)}
    if options.llama_cpp:
        runs["llama.cpp, temperature 0"] = peers(
            options.llama_cpp, options.model, generator, questions, markers
        )
    for seed in range(options.seeds):
        name = f"ours, defaults, seed {seed}"
        runs[name] = ours(generator, questions, markers, seed=seed)
    print(as_markdown(describe()))
    print(f"\n{options.model.name}, defaults {dict(generator.sampling)}\n")
    print("| run | right en | right zh | language kept | cut | control tokens |")
    print("|---|---|---|---|---|---|")
    for name, results in runs.items():
        print(summary(name, results))
    print()
    for name, results in runs.items():
        wrong = [each.id for each in results if not each.right]
        print(f"wrong, {name}: {', '.join(wrong) or 'none'}")
    if options.interfaces:
        few = [each for each in questions if int(each.id[3:]) <= options.interfaces]
        different = interfaces(options.model, generator, few)
        told = f"differ: {', '.join(different)}" if different else "are the same"
        print(f"terminal, API and page: {len(few)} answers at temperature 0 {told}")
    if options.out:
        body = {name: [asdict(each) for each in results] for name, results in runs.items()}
        options.out.write_text(json.dumps(body, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
