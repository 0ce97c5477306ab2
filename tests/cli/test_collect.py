"""Collecting rankings: a real model directory, real files, and what a person types, good or bad."""

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
from random_models import CONTEXT, random_model, tokenizer
from rich.console import Console

from khaosz.cli.collect import Collected, collect, parse_ranking, ranked_prompts
from khaosz.data.records.preference import load_pairs, to_pairs
from khaosz.errors import DataError, GenerationError, KhaoszError, ModelError
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.interop import save_model

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


class Desk:
    """One person at a terminal that is not one: lines in, text out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Path, prompts: Path) -> None:
        self.monkeypatch, self.model, self.prompts = monkeypatch, model, prompts
        self.shown = ""

    def collect(
        self, typed: str, out: Path, *, stdin: type[io.StringIO] = io.StringIO, **given: Any
    ) -> Collected:
        self.monkeypatch.setattr(sys, "stdin", stdin(typed))
        file = io.StringIO()
        console = Console(file=file, width=200, highlight=False, emoji=False)
        try:
            return collect(
                self.model,
                self.prompts,
                out,
                **{"n": 3, "params": PARAMS, "console": console, **given},
            )
        finally:
            self.shown = file.getvalue()


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, model_dir: Path, prompts: Path) -> Desk:
    return Desk(monkeypatch, model_dir, prompts)


def read(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    assert raw.endswith(b"\n")
    return [json.loads(line) for line in raw.splitlines()]


def test_rankings_become_records(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rankings.jsonl"
    done = desk.collect("b>a=c\ns\nC > b > A\n", out)
    assert done == Collected(ranked=2, skipped=1)
    first, last = read(out)
    assert first["prompt"] == [{"role": "user", "content": QUESTIONS[0]}]
    assert last["prompt"] == [{"role": "user", "content": QUESTIONS[2]}]
    assert (first["ranking"], last["ranking"]) == ([1, [0, 2]], [2, 1, 0])
    assert first["model"] == str(desk.model)
    assert (first["sampling"]["n"], first["sampling"]["temperature"]) == (3, 1.0)
    assert first["sampling"]["max_tokens"] == 8
    for record in (first, last):
        assert len(record["finish_reasons"]) == 3
        assert set(record["finish_reasons"]) <= {"stop", "length"}
        # The record says how its answers were made; what was shown is not the order of sampling.
        params = SamplingParams(**{**record["sampling"], "stop": ()})
        generator = Generator.from_directory(desk.model)
        ids = generator.chat_ids(record["prompt"])
        again = [each.text for each in generator.generate_batch([ids], params)]
        assert sorted(record["answers"]) == sorted(again)
    assert "春眠不觉晓".encode() in out.read_bytes()
    assert len(to_pairs(first)) == 2 and len(to_pairs(last)) == 3
    # The file is what training reads.
    data = load_pairs(out, tokenizer(), CONTEXT)
    assert data.report.kept == 5
    assert tokenizer().decode(data.train[0].chosen_ids[:-1]) == first["answers"][1]


def test_everything_is_shown_before_it_is_asked(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    # Some answers end by themselves, some at the limit.
    params = SamplingParams(max_tokens=8, temperature=1.0, logit_bias={tokenizer().end_id: 5.0})
    desk.collect("a>b>c>d>e>f\n", out, n=6, params=params)
    (record,) = read(out)
    shown = desk.shown.split("ranking> ")[0]
    assert "3 records, 3 kept" in shown and "1 / 3" in shown
    assert f"user: {QUESTIONS[0]}" in shown
    places = [shown.index(f"\n{letter}: ") for letter in "ABCDEF"]
    assert places == sorted(places)
    assert set(record["finish_reasons"]) == {"stop", "length"}
    for letter, answer, reason in zip(
        "ABCDEF", record["answers"], record["finish_reasons"], strict=True
    ):
        note = "" if reason == "stop" else f" [{reason}]"
        visible = "".join(c if c.isprintable() else f"⟨{ord(c):x}⟩" for c in answer)
        assert f"{letter}: {visible}{note}\n" in shown
    assert "ranking> a>b>c>d>e>f\n" in desk.shown  # echoed, as no terminal did
    assert f"{out}: 1 ranked, 2 left" in desk.shown


def test_the_order_depends_on_the_seed_and_the_prompt_alone(desk: Desk, tmp_path: Path) -> None:
    typed = "a>b>c\n" * 3
    outs = [tmp_path / f"{name}.jsonl" for name in ("one", "two", "other")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        desk.collect(typed, out, seed=seed)
    one, two, other = map(read, outs)
    assert one == two
    assert [r["answers"] for r in one] != [r["answers"] for r in other]
    # Skipping or quitting before does not change what the third prompt is answered.
    out = tmp_path / "later.jsonl"
    desk.collect("s\nq\n", out)
    desk.collect("s\ns\na>b>c\n", out)
    assert read(out) == one[2:]
    # Blind: the order in which answers were sampled is not always the one they are shown in.
    generator = Generator.from_directory(desk.model)
    sampled = []
    for record in one + other:
        params = SamplingParams(**{**record["sampling"], "stop": ()})
        answers = generator.generate_batch([generator.chat_ids(record["prompt"])], params)
        sampled.append([each.text for each in answers])
    assert sampled != [record["answers"] for record in one + other]


def test_a_second_call_goes_on(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert desk.collect("a>b>c\nq\n", out) == Collected(ranked=1, left=2)
    before = out.read_bytes()
    assert desk.collect("", out) == Collected(passed_over=1, left=2)
    assert out.read_bytes() == before
    # Skipped ones are asked again, ranked ones are not.
    assert desk.collect("s\nb>a>c\n", out) == Collected(ranked=1, skipped=1, passed_over=1)
    assert out.read_bytes().startswith(before)
    assert desk.collect("a=b=c\n", out) == Collected(ranked=1, passed_over=2)
    assert desk.collect("a>b>c\n", out) == Collected(passed_over=3)
    assert len(read(out)) == 3


def test_the_same_prompt_is_asked_once(desk: Desk, tmp_path: Path) -> None:
    desk.prompts.write_text('{"prompt": "the dog"}\n{"prompt": "the dog "}\n', encoding="utf-8")
    done = desk.collect("a>b>c\na>b>c\n", tmp_path / "r.jsonl")
    assert done == Collected(ranked=1, passed_over=1)


def test_wrong_entries_are_asked_again(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    typed = ["", "hello [b]", "a>b", "a>b>c>d", "a>a>b>c", "a,b,c", "a>>b>c", "S", "a>b>c", "Q"]
    assert desk.collect("\n".join(typed) + "\n", out) == Collected(ranked=1, skipped=1, left=1)
    hints = [line for line in desk.shown.splitlines() if "best first" in line]
    assert len(hints) == 7
    assert hints[1].startswith("'hello[b]' is no answer (best first")
    assert hints[2].startswith("'c' is missing")
    assert hints[3].startswith("'d' is no answer")
    assert hints[4].startswith("'a' is twice")
    assert hints[5].endswith("like a>b>c; s skips, q quits)")


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
def test_rankings_as_they_are_typed(entry: str, ranking: list[Any]) -> None:
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
def test_any_entry_is_a_ranking_or_a_reason(entry: str, n: int) -> None:
    try:
        ranking = parse_ranking(entry, n)
    except DataError as error:
        assert str(error) and error.hint is not None and "\n" not in str(error) + error.hint
        return
    named = [i for at in ranking for i in (at if isinstance(at, list) else [at])]
    assert sorted(named) == list(range(n))


def test_a_torn_last_line_is_taken_off(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    desk.collect("a>b>c\nb>a>c\n", out)
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    console = Console(file=io.StringIO())
    both = ranked_prompts(out, console)
    assert len(both) == 2
    for end in range(first + 1, len(whole) - 1):
        out.write_bytes(whole[:end])
        assert len(ranked_prompts(out, console)) == 1, end
        assert out.read_bytes() == whole[:first], end
    # Only the line end is missing: nothing is lost.
    out.write_bytes(whole[:-1])
    assert ranked_prompts(out, console) == both
    assert out.read_bytes() == whole
    # Cut inside the first line, nothing is left; and the session goes on from there.
    out.write_bytes(whole[: first // 2])
    assert desk.collect("a>b>c\nb>a>c\nq\n", out) == Collected(ranked=2, left=1)
    assert out.read_bytes() == whole
    assert f"{out}: line 1 was cut short and is taken off" in desk.shown


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
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "r.jsonl"
    out.write_bytes(content)
    with pytest.raises(DataError, match=r"r\.jsonl, line \d is no ranking") as caught:
        ranked_prompts(out, Console(file=io.StringIO()))
    assert caught.value.hint is not None
    assert out.read_bytes() == content


class Interrupted(io.StringIO):
    """A person who ranks what was typed and then presses Ctrl-C."""

    def readline(self, size: int | None = -1) -> str:
        line = super().readline(-1 if size is None else size)
        if not line:
            raise KeyboardInterrupt
        return line


def test_ctrl_c_keeps_what_was_ranked(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert desk.collect("a>b>c\n", out, stdin=Interrupted) == Collected(ranked=1, left=2)
    assert len(read(out)) == 1


def test_answers_that_leave_no_choice(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    greedy = SamplingParams(max_tokens=8, temperature=1.0, top_k=1)
    assert desk.collect("a>b>c\n" * 3, out, params=greedy) == Collected(alike=3)
    blank = {tokenizer().encode(text)[0]: 100.0 for text in (" ", "\n")}
    params = SamplingParams(max_tokens=4, temperature=5.0, logit_bias=blank)
    assert desk.collect("a>b>c\n" * 3, out, params=params) == Collected(alike=3)
    assert "ranking>" not in desk.shown and not out.exists()


def test_text_cannot_steer_the_terminal(desk: Desk, tmp_path: Path) -> None:
    record = {"prompt": "\x1b[2Jthe [bold]dog\u202e"}
    desk.prompts.write_text(json.dumps(record) + "\n", encoding="utf-8")
    desk.collect("a>b>c\n", tmp_path / "r.jsonl")
    assert "user: ⟨1b⟩[2Jthe [bold]dog⟨202e⟩\n" in desk.shown
    assert read(tmp_path / "r.jsonl")[0]["prompt"][0]["content"] == record["prompt"]


def test_the_whole_prompt_is_shown(desk: Desk, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "the fox"},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "lazy"},
        {"role": "user", "content": "晓？"},
    ]
    desk.prompts.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    desk.collect("a>b>c\n", tmp_path / "r.jsonl")
    assert "system: the fox\nuser: dog\nassistant: lazy\nuser: 晓？\nA: " in desk.shown
    assert read(tmp_path / "r.jsonl")[0]["prompt"] == messages


def test_mistakes_are_named_before_anything_is_asked(desk: Desk, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    wrong: list[tuple[type[KhaoszError], str, dict[str, Any]]] = [
        (GenerationError, "n must be between 2 and 26", {"n": 1}),
        (GenerationError, "n must be between 2 and 26", {"n": 27}),
        (GenerationError, "the same answer 3 times", {"params": SamplingParams(temperature=0)}),
    ]
    for kind, reason, given_ in wrong:
        with pytest.raises(kind, match=reason):
            desk.collect("a>b>c\n", out, **given_)
    with pytest.raises(DataError, match=r"does not end in \.jsonl"):
        desk.collect("a>b>c\n", tmp_path / "r.json")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="directory"):
        desk.collect("a>b>c\n", tmp_path / "folder.jsonl")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="cannot write"):
        desk.collect("a>b>c\n", tmp_path / "file" / "r.jsonl")
    desk.prompts = tmp_path / "none.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        desk.collect("a>b>c\n", out)
    desk.model = tmp_path / "no model"
    with pytest.raises(ModelError):
        desk.collect("a>b>c\n", out)
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
    assert "Collected(ranked=1, skipped=0, passed_over=0, alike=0, left=2)" in shown
    assert read(out)[0]["ranking"] == [2, [0, 1]]
    # Bytes that are not text are one wrong entry, not the end of the session.
    shown = run(b"\xff\xfe\n")
    assert "these bytes are not utf-8" in shown and "passed_over=1, alike=0, left=2" in shown
