"""Collecting rankings: a real model directory, real files, valid and invalid input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import CONTEXT, random_model, tokenizer

from khaosz.cli.collect import Collected, collect, parse_ranking, ranked_prompts
from khaosz.data.records.preference import load_pairs, to_pairs
from khaosz.errors import DataError, GenerationError, KhaoszError, ModelError
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.huggingface import save_model

torch.set_num_threads(1)

# No deadline and no too_slow check: both would measure the load of the machine, not our code.
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PARAMS = SamplingParams(max_tokens=8, temperature=1.0)
QUESTIONS = ["春眠不觉晓", "the lazy dog?", "处处闻啼鸟 <|end|>"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model [x]"
    save_model(random_model(tokenizer().vocab_size), directory)
    tokenizer().save(directory)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text, "id": 1}, ensure_ascii=False) for text in QUESTIONS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Session:
    """A session without a terminal: lines in, text out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path) -> None:
        self.monkeypatch, self.model, self.prompts = monkeypatch, model, prompts
        self.output = ""

    def collect(
        self, typed: str, out: Path, *, stdin: type[io.StringIO] = io.StringIO, **options: Any
    ) -> Collected:
        self.monkeypatch.setattr(sys, "stdin", stdin(typed))
        file = io.StringIO()
        console = Console(file=file, width=200, highlight=False, emoji=False)
        try:
            return collect(
                self.model,
                self.prompts,
                out,
                **{"n": 3, "params": PARAMS, "console": console, **options},
            )
        finally:
            self.output = file.getvalue()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, model_dir: Path, prompts: Path) -> Session:
    return Session(monkeypatch, model_dir, prompts)


def read(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    assert raw.endswith(b"\n")
    records = [json.loads(line) for line in raw.splitlines()]
    assert all(record.pop("created") > 1.7e9 for record in records)
    return records


def test_rankings_become_records(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rankings.jsonl"
    result = session.collect("b>a=c\ns\nC > b > A\n", out)
    assert result == Collected(ranked=2, skipped=1)
    first, last = read(out)
    assert first["prompt"] == [{"role": "user", "content": QUESTIONS[0]}]
    assert last["prompt"] == [{"role": "user", "content": QUESTIONS[2]}]
    assert (first["ranking"], last["ranking"]) == ([1, [0, 2]], [2, 1, 0])
    assert first["model"] == str(session.model)
    assert (first["sampling"]["n"], first["sampling"]["temperature"]) == (3, 1.0)
    assert first["sampling"]["max_tokens"] == 8
    for record in (first, last):
        assert len(record["finish_reasons"]) == 3
        assert set(record["finish_reasons"]) <= {"stop", "length"}
        # The record says how its answers were made; what was shown is not the order of sampling.
        params = SamplingParams(**{**record["sampling"], "stop": ()})
        generator = Generator.from_directory(session.model)
        ids = generator.chat_ids(record["prompt"])
        again = [each.text for each in generator.generate_batch([ids], params)]
        assert sorted(record["answers"]) == sorted(again)
    assert "春眠不觉晓".encode() in out.read_bytes()
    assert len(to_pairs(first)) == 2 and len(to_pairs(last)) == 3
    # The file is what training reads.
    data = load_pairs(out, tokenizer(), CONTEXT)
    assert data.report.kept == 5
    assert tokenizer().decode(data.train[0].chosen_ids[:-1]) == first["answers"][1]


def test_prompt_and_answers_are_shown_before_the_ranking(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    # Some answers stop, some reach the limit.
    params = SamplingParams(max_tokens=8, temperature=1.0, logit_bias={tokenizer().end_id: 4.0})
    session.collect("a>b>c>d>e>f\n", out, n=6, params=params)
    (record,) = read(out)
    shown = session.output.split("ranking> ")[0]
    assert "3 records, 3 kept" in shown and "1 of 3" in shown
    assert f"user: {QUESTIONS[0]}" in shown
    positions = [shown.index(f"\n{letter}: ") for letter in "ABCDEF"]
    assert positions == sorted(positions)
    assert set(record["finish_reasons"]) == {"stop", "length"}
    for letter, answer, reason in zip(
        "ABCDEF", record["answers"], record["finish_reasons"], strict=True
    ):
        note = "" if reason == "stop" else f" [{reason}]"
        visible = "".join(c if c.isprintable() else f"⟨{ord(c):x}⟩" for c in answer)
        assert f"{letter}: {visible}{note}\n" in shown
    assert "ranking> a>b>c>d>e>f\n" in session.output  # echoed, without a terminal
    assert f"{out}: 1 ranked, 2 remaining" in session.output


def test_order_depends_on_the_seed_and_the_prompt_alone(session: Session, tmp_path: Path) -> None:
    typed = "a>b>c\n" * 3
    outs = [tmp_path / f"{name}.jsonl" for name in ("one", "two", "other")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        session.collect(typed, out, seed=seed)
    one, two, other = map(read, outs)
    assert one == two
    assert [r["answers"] for r in one] != [r["answers"] for r in other]
    # Skipping or quitting before does not change what the third prompt is answered.
    out = tmp_path / "later.jsonl"
    session.collect("s\nq\n", out)
    session.collect("s\ns\na>b>c\n", out)
    assert read(out) == one[2:]
    # Blind: the order in which answers were sampled is not always the one they are shown in.
    generator = Generator.from_directory(session.model)
    sampled = []
    for record in one + other:
        params = SamplingParams(**{**record["sampling"], "stop": ()})
        answers = generator.generate_batch([generator.chat_ids(record["prompt"])], params)
        sampled.append([each.text for each in answers])
    assert sampled != [record["answers"] for record in one + other]


def test_second_call_continues(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert session.collect("a>b>c\nq\n", out) == Collected(ranked=1, remaining=2)
    before = out.read_bytes()
    assert session.collect("", out) == Collected(ranked_before=1, remaining=2)
    assert out.read_bytes() == before
    # Skipped prompts are shown again, ranked ones are not.
    assert session.collect("s\nb>a>c\n", out) == Collected(ranked=1, skipped=1, ranked_before=1)
    assert out.read_bytes().startswith(before)
    assert session.collect("a=b=c\n", out) == Collected(ranked=1, ranked_before=2)
    assert session.collect("a>b>c\n", out) == Collected(ranked_before=3)
    assert len(read(out)) == 3


def test_duplicate_prompt_is_shown_once(session: Session, tmp_path: Path) -> None:
    session.prompts.write_text('{"prompt": "the dog"}\n{"prompt": "the dog "}\n', encoding="utf-8")
    result = session.collect("a>b>c\na>b>c\n", tmp_path / "r.jsonl")
    assert result == Collected(ranked=1, ranked_before=1)


def test_invalid_entries_are_asked_again(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    typed = ["", "hello [b]", "a>b", "a>b>c>d", "a>a>b>c", "a,b,c", "a>>b>c", "S", "a>b>c", "Q"]
    assert session.collect("\n".join(typed) + "\n", out) == Collected(
        ranked=1, skipped=1, remaining=1
    )
    hints = [line for line in session.output.splitlines() if "best first" in line]
    assert len(hints) == 7
    assert hints[1].startswith("'hello[b]' is not an answer (best first")
    assert hints[2].startswith("'c' is missing")
    assert hints[3].startswith("'d' is not an answer")
    assert hints[4].startswith("'a' occurs twice")
    assert hints[5].endswith("like a>b>c; s: skip, u: undo, q: quit)")


@pytest.mark.parametrize(
    ("entry", "ranking"),
    [
        ("b>a=c>d", [1, [0, 2], 3]),
        ("  D > C>b\t> A ", [3, 2, 1, 0]),
        ("a=b=c=d", [[0, 1, 2, 3]]),
        ("ｂ＞ａ＝ｃ＞ｄ", [1, [0, 2], 3]),
        ("B》A=C〉D", [1, [0, 2], 3]),
    ],
)
def test_parse_ranking(entry: str, ranking: list[Any]) -> None:
    assert parse_ranking(entry, 4) == ranking


def test_every_ranking_can_be_typed() -> None:
    for order in permutations("abc"):
        for signs in (">>", ">=", "=>", "=="):
            entry = "".join(f"{a}{b}" for a, b in zip(order, [*signs, ""], strict=True))
            pairs = to_pairs(
                {"prompt": "q", "answers": ["a", "b", "c"], "ranking": parse_ranking(entry, 3)}
            )
            better = {(pair.chosen, pair.rejected) for pair in pairs}
            for i, j in ((0, 1), (0, 2), (1, 2)):
                assert ((order[i], order[j]) in better) == (">" in signs[i:j])
            assert len(better) == sum(">" in signs[i:j] for i, j in ((0, 1), (0, 2), (1, 2)))


@settings(QUICK)
@given(st.text(max_size=8) | st.text(alphabet="abcq>= ＞", max_size=8), st.integers(2, 26))
def test_any_entry_is_a_ranking_or_an_error(entry: str, n: int) -> None:
    try:
        ranking = parse_ranking(entry, n)
    except DataError as error:
        assert str(error) and error.hint is not None and "\n" not in str(error) + error.hint
        return
    named = [i for at in ranking for i in (at if isinstance(at, list) else [at])]
    assert sorted(named) == list(range(n))


def test_truncated_last_line_is_removed(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    session.collect("a>b>c\nb>a>c\n", out)
    whole, answers = out.read_bytes(), [each["answers"] for each in read(out)]
    first = whole.index(b"\n") + 1
    console = Console(file=io.StringIO())
    both = ranked_prompts(out, console)
    assert len(both) == 2
    for end in range(first + 1, len(whole) - 1, 7):
        out.write_bytes(whole[:end])
        assert len(ranked_prompts(out, console)) == 1, end
        assert out.read_bytes() == whole[:first], end
    # Only the line end is missing: the record is kept.
    out.write_bytes(whole[:-1])
    assert ranked_prompts(out, console) == both
    assert out.read_bytes() == whole
    # Truncated inside the first line: the session starts again from an empty file.
    out.write_bytes(whole[: first // 2])
    assert session.collect("a>b>c\nb>a>c\nq\n", out) == Collected(ranked=2, remaining=1)
    assert [each["answers"] for each in read(out)] == answers
    assert f"{out}: line 1 was truncated and is removed" in session.output


@pytest.mark.parametrize(
    "content",
    [
        b"not ours\n",
        b'{"prompt": "q"}\n{"text": "x"}\n',
        b'{"prompt": "q"}\nnot ours',
        b"\xff\xfe\x00",
        b'[\n{"prompt": "q"}\n]\n',
        b'{"text": "no line end"}',
    ],
)
def test_file_with_other_content_is_rejected_unchanged(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "r.jsonl"
    out.write_bytes(content)
    with pytest.raises(DataError, match=r"r\.jsonl, line \d is not a ranking") as error:
        ranked_prompts(out, Console(file=io.StringIO()))
    assert error.value.hint is not None
    assert out.read_bytes() == content


class Interrupted(io.StringIO):
    """Input that ends with Ctrl-C."""

    def readline(self, size: int | None = -1) -> str:
        line = super().readline(-1 if size is None else size)
        if not line:
            raise KeyboardInterrupt
        return line


def test_ctrl_c_keeps_the_rankings(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert session.collect("a>b>c\n", out, stdin=Interrupted) == Collected(ranked=1, remaining=2)
    assert len(read(out)) == 1


def test_identical_or_blank_answers_are_not_shown(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    greedy = SamplingParams(max_tokens=8, temperature=1.0, top_k=1)
    assert session.collect("a>b>c\n" * 3, out, params=greedy) == Collected(identical=3)
    blank = {tokenizer().encode(text)[0]: 100.0 for text in (" ", "\n")}
    params = SamplingParams(max_tokens=4, temperature=5.0, logit_bias=blank)
    assert session.collect("a>b>c\n" * 3, out, params=params) == Collected(identical=3)
    assert "ranking>" not in session.output and not out.exists()


def test_control_characters_are_escaped(session: Session, tmp_path: Path) -> None:
    record = {"prompt": "\x1b[2Jthe [bold]dog\u202e"}
    session.prompts.write_text(json.dumps(record) + "\n", encoding="utf-8")
    session.collect("a>b>c\n", tmp_path / "r.jsonl")
    assert "user: ⟨1b⟩[2Jthe [bold]dog⟨202e⟩\n" in session.output
    assert read(tmp_path / "r.jsonl")[0]["prompt"][0]["content"] == record["prompt"]


def test_all_messages_of_the_prompt_are_shown(session: Session, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "the fox"},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "lazy"},
        {"role": "user", "content": "晓？"},
    ]
    session.prompts.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    session.collect("a>b>c\n", tmp_path / "r.jsonl")
    assert "system: the fox\nuser: dog\nassistant: lazy\nuser: 晓？\nA: " in session.output
    assert read(tmp_path / "r.jsonl")[0]["prompt"] == messages


def test_invalid_arguments_are_rejected_before_sampling(session: Session, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    cases: list[tuple[type[KhaoszError], str, dict[str, Any]]] = [
        (GenerationError, "n must be between 2 and 26", {"n": 1}),
        (GenerationError, "n must be between 2 and 26", {"n": 27}),
        (GenerationError, "the same answer 3 times", {"params": SamplingParams(temperature=0)}),
    ]
    for kind, reason, options in cases:
        with pytest.raises(kind, match=reason):
            session.collect("a>b>c\n", out, **options)
    with pytest.raises(DataError, match=r"does not end in \.jsonl"):
        session.collect("a>b>c\n", tmp_path / "r.json")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="directory"):
        session.collect("a>b>c\n", tmp_path / "folder.jsonl")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="cannot write"):
        session.collect("", tmp_path / "file" / "r.jsonl")  # before anything is ranked
    session.prompts = tmp_path / "none.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        session.collect("a>b>c\n", out)
    session.model = tmp_path / "no model"
    with pytest.raises(ModelError):
        session.collect("a>b>c\n", out)
    assert not out.exists()


def test_through_a_pipe(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    code = (
        "import sys\nfrom khaosz.cli.collect import collect\n"
        "from khaosz.inference.sampling import SamplingParams\n"
        "print(collect(*sys.argv[1:], n=3, params=SamplingParams(8, 1.0)))\n"
    )

    def run(typed: bytes) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(model_dir), str(prompts), str(out)],
            input=typed,
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "COLUMNS": "200"},
            cwd=Path(__file__).parents[2],
            timeout=120,
            check=False,
        )
        assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
        return done.stdout.decode()

    shown = run("ｃ＞ａ＝ｂ\n".encode())
    assert "Collected(ranked=1, skipped=0, ranked_before=0, identical=0, remaining=2)" in shown
    assert read(out)[0]["ranking"] == [2, [0, 1]]
    # Invalid UTF-8 is one invalid entry, not the end of the session.
    shown = run(b"\xff\xfe\n")
    assert "invalid utf-8" in shown and "ranked_before=1, identical=0, remaining=2" in shown
