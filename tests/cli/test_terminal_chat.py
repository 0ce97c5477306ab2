"""The terminal chat, with a real console, a real model and, where it counts, a real process."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scripted_model import CONTEXT, SAID, model, model_directory, run_khaosz, tokenizer

from khaosz.cli.models import newest_model
from khaosz.cli.terminal.chat import answer, say
from khaosz.cli.terminal.commands import COMMANDS
from khaosz.cli.terminal.conversation import Conversation, Ended, Events, Part, Settings, Source
from khaosz.cli.terminal.local import LocalPartner
from khaosz.errors import (
    DataError,
    GenerationError,
    KhaoszError,
    ModelError,
    ServerError,
    TokenizerError,
)
from khaosz.inference.generator import Generator as Model
from khaosz.interop import save_model

torch.set_num_threads(1)


class Terminal:
    """One conversation on a console that writes to memory."""

    def __init__(self, max_tokens: int = 24) -> None:
        self.console = Console(file=io.StringIO(), width=60, highlight=False, emoji=False)
        self.generator = Model(model(), tokenizer())
        self.partner = LocalPartner(self.generator, "tiny")
        self.conversation = Conversation(Settings(max_tokens, temperature=0.0))

    def shown(self) -> str:
        """What appeared since the last call."""
        file = self.console.file
        assert isinstance(file, io.StringIO)
        text = file.getvalue()
        file.seek(0)
        file.truncate()
        return text

    def say(self, message: str) -> str:
        answer(self.conversation, message, self.partner, self.console)
        return self.shown()

    def do(self, line: str) -> str:
        assert say(line, self.conversation, self.partner, self.console)
        return self.shown()


class Telling:
    """Whoever says what it is told to."""

    name, about = "telling", "nowhere"

    def __init__(self, *events: Part | Ended | BaseException) -> None:
        self.events, self.closed = events, False

    def answer(self, conversation: Conversation, message: str) -> Events:
        try:
            for event in self.events:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.closed = True

    def models(self) -> list[str]:
        return []

    def choose(self, name: str) -> None:
        raise ModelError(f"no model '{name}'")

    def bases(self) -> list[str]:
        return []

    def open_base(self, name: str) -> None:
        raise DataError(f"no base '{name}'")

    def check(self, settings: Settings) -> None:
        pass

    def close(self) -> None:
        pass


def quiet() -> Console:
    return Console(file=io.StringIO(), width=60, highlight=False, emoji=False)


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(*parts: Part, ended: Ended | None = None) -> str:
    """What an answer of these parts looks like."""
    console = quiet()
    answer(Conversation(Settings()), "?", Telling(*parts, ended or Ended("stop")), console)
    return told(console)


def test_an_answer_is_shown_as_it_is_and_remembered() -> None:
    terminal = Terminal()
    assert terminal.say("你好") == SAID + "\n"
    assert terminal.conversation.turns == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": SAID},
    ]


def test_what_looks_like_markup_is_text() -> None:
    assert Terminal().say("hi") == SAID + "\n"
    assert shown(Part("[b]ok[/b] "), Part(":smile:")) == "[b]ok[/b] :smile:\n"


def test_what_a_terminal_would_obey_is_left_out() -> None:
    # Of the answer and of a document's name: here a clipboard and a cleared screen.
    text = shown(
        Part("a\x1b]52;c;aGk=\x07b\r\x9b2Jc\n"),
        ended=Ended("stop", (Source(1, "x\x1b[2Jy.md", None, 0, 9),)),
    )
    assert text == "a]52;c;aGk=b2Jc\n\n[1] x[2Jy.md  0-9\n"


def test_thoughts_are_dimmed_and_not_remembered() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, emoji=False)
    conversation = Conversation(Settings())
    parts = Part("hm", thought=True), Part("Yes."), Ended("stop")
    answer(conversation, "?", Telling(*parts), console)
    assert told(console) == "\x1b[2mhm\x1b[0m\n\nYes.\n"
    assert conversation.turns[-1]["content"] == "Yes."


def test_sources_stand_behind_the_answer() -> None:
    source = Source(2, "手册.pdf", 7, 1200, 1300)
    assert shown(Part("是[2]。"), ended=Ended("stop", (source,))) == (
        "是[2]。\n[2] 手册.pdf, p. 7  1,200-1,300\n"
    )
    assert "names no source" in shown(ended=Ended("stop", (source,), cited=False))


def test_an_answer_that_fails_midway_is_not_kept() -> None:
    conversation = Conversation(Settings())
    with pytest.raises(ServerError):
        answer(conversation, "?", Telling(Part("so far"), ServerError("gone")), quiet())
    assert conversation.turns == []


def test_an_interrupted_answer_is_kept_as_far_as_it_went() -> None:
    conversation = Conversation(Settings())
    partner = Telling(Part("so far"), KeyboardInterrupt(), Part("never"))
    console = quiet()
    answer(conversation, "?", partner, console)
    assert told(console) == "so far [interrupted]\n"
    assert conversation.turns[-1]["content"] == "so far"
    assert partner.closed


def test_an_answer_that_met_its_limit_says_so() -> None:
    terminal = Terminal(max_tokens=4)
    assert terminal.say("hi") == "Yes, [length]\n"


def test_the_oldest_exchange_is_forgotten_aloud_when_the_context_is_full() -> None:
    terminal = Terminal()
    assert terminal.say("a" * 20) == SAID + "\n"
    assert terminal.say("b" * 20) == SAID + "\n"
    shown = terminal.say("c" * 20)
    assert shown.startswith("(context full: the oldest 1 exchanges are forgotten)\n")
    assert [turn["content"] for turn in terminal.conversation.turns] == [
        "b" * 20,
        SAID,
        "c" * 20,
        SAID,
    ]
    ids = terminal.generator.chat_ids(terminal.conversation.messages)
    assert len(ids) <= CONTEXT


def test_a_message_that_cannot_be_answered_changes_nothing() -> None:
    terminal = Terminal()
    terminal.say("hi")
    before = list(terminal.conversation.turns)
    with pytest.raises(GenerationError, match="the model's context is 96"):
        terminal.say("a" * 100)
    with pytest.raises(TokenizerError, match="surrogate"):
        terminal.say("\udcff")
    assert terminal.conversation.turns == before
    terminal.conversation.settings = Settings(max_tokens=1)
    assert terminal.say("hi") != ""


def test_special_tokens_in_a_message_are_text() -> None:
    terminal = Terminal()
    terminal.say("<|end|>")
    ids = terminal.generator.chat_ids(terminal.conversation.turns[:1])
    assert ids.count(tokenizer().end_id) == 1


def test_help_lists_the_commands_there_are() -> None:
    terminal = Terminal()
    shown = terminal.do("/help")
    for verb in COMMANDS:
        assert verb in shown
        if verb != "/exit":
            assert "unknown command" not in terminal.do(verb)


def test_an_unknown_command_is_named() -> None:
    shown = Terminal().do("/hlep [red]now")
    assert shown == "unknown command /hlep; /help lists them\n"


@pytest.mark.parametrize("line", ["/exit", "/quit"])
def test_exit_leaves(line: str) -> None:
    terminal = Terminal()
    assert not say(line, terminal.conversation, terminal.partner, terminal.console)


def test_reset_forgets_and_system_restarts() -> None:
    terminal = Terminal()
    terminal.say("hi")
    terminal.do("/reset")
    assert terminal.conversation.messages == []
    terminal.say("hi")
    terminal.do("/system Be brief.")
    assert terminal.conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert terminal.say("hi") == SAID + "\n"
    terminal.do("/reset")
    assert terminal.conversation.messages == [{"role": "system", "content": "Be brief."}]
    terminal.do("/system")
    assert terminal.conversation.messages == []


def test_retry_answers_the_last_message_again() -> None:
    terminal = Terminal(max_tokens=4)
    assert terminal.do("/retry") == "nothing to answer again\n"
    terminal.say("hi")
    terminal.do("/set max_tokens 24")
    assert terminal.do("/retry") == SAID + "\n"
    assert terminal.conversation.turns == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": SAID},
    ]


def test_a_retry_that_fails_keeps_the_answer_there_was() -> None:
    terminal = Terminal()
    terminal.say("hi")
    before = list(terminal.conversation.turns)
    terminal.conversation.system = "a" * 100
    with pytest.raises(GenerationError):
        terminal.do("/retry")
    assert terminal.conversation.turns == before


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.5", "temperature", 0.5),
        ("/set top_p 0.9", "top_p", 0.9),
        ("/set top_k 40", "top_k", 40),
        ("/set min_p 0.1", "min_p", 0.1),
        ("/set repetition_penalty 1.2", "repetition_penalty", 1.2),
        ("/set max_tokens  7", "max_tokens", 7),
        ("/set seed 3", "seed", 3),
    ],
)
def test_set_changes_one_setting(line: str, name: str, value: float) -> None:
    terminal = Terminal()
    assert terminal.do(line) == ""
    assert getattr(terminal.conversation.settings, name) == value


def test_set_refuses_what_cannot_be() -> None:
    terminal = Terminal()
    before = terminal.conversation.settings
    assert terminal.do("/set").startswith("settings: max_tokens 24, temperature 0.0, top_p 0.9")
    assert terminal.do("/set warmth 3").startswith("settings: max_tokens 24")
    assert terminal.do("/set top_k 1.5") == "top_k takes a number, not '1.5'\n"
    assert terminal.do("/set seed [b]") == "seed takes a number, not '[b]'\n"
    for line in ("/set temperature -1", "/set top_p nan", f"/set seed {2**70}"):
        with pytest.raises(KhaoszError, match=" must be "):
            terminal.do(line)
    assert terminal.conversation.settings == before


def test_save_writes_the_conversation(tmp_path: Path) -> None:
    terminal = Terminal()
    terminal.do("/system 简短。")
    terminal.say("你好")
    path = tmp_path / "a [b] chat.json"
    terminal.console.width = 400
    assert terminal.do(f"/save {path}") == f"saved {path}\n"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == {"messages": terminal.conversation.messages}
    assert "你好" in path.read_text(encoding="utf-8")
    assert terminal.do("/save") == "/save FILE\n"
    with pytest.raises(KhaoszError, match="could not write"):
        terminal.do(f"/save {tmp_path / '[b]' / 'none.json'}")


def run_chat(directory: Path, lines: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    return run_khaosz("chat", str(directory), "--device", "cpu", *options, lines=lines)


def test_a_whole_conversation_through_a_pipe(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model [x]")
    saved = tmp_path / "chat.json"
    lines = [
        "/help",
        "",
        "你好",
        "/frobnicate",
        "/set temperature -1",
        "a" * 200,
        "/reset",
        "  again  ",
        f"/save {saved}",
    ]
    done = run_chat(directory, "\n".join(lines).encode(), "--temperature", "0")
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    assert f"{directory}  context {CONTEXT} tokens" in out
    assert "/retry" in out
    assert out.replace("\r\n", "\n").count(SAID) == 2
    assert "unknown command /frobnicate" in out
    assert "temperature must be between 0 and 100 (got -1.0)" in out
    assert f"the model's context is {CONTEXT} (shorten the prompt" in out
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"] == [
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": SAID},
    ]


def test_bytes_that_are_not_text_do_not_end_it(tmp_path: Path) -> None:
    done = run_chat(model_directory(tmp_path), b"\xff\xfe\n", "--temperature", "0")
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr and b"not understood" in done.stdout


def test_the_newest_model_is_found(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model was trained here") as caught:
        newest_model(tmp_path / "runs")
    assert caught.value.hint is not None and "khaosz demo" in caught.value.hint
    runs = tmp_path / "runs"
    for age, name in ((300, "last"), (100, "a/last"), (200, "demo/sft/last")):
        save_model(model(), runs / name)
        stamp = (runs / name / "model.safetensors").stat().st_mtime - age
        os.utime(runs / name / "model.safetensors", (stamp, stamp))
    (runs / "torn" / "last").mkdir(parents=True)
    (runs / "torn" / "last" / "config.json").write_text("{}", encoding="utf-8")
    assert newest_model(runs) == runs / "a" / "last"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no conversation"),
        ("[1]", "holds no conversation"),
        ('{"messages": [{"role": "user"}]}', "holds no conversation"),
        ('{"messages": [{"role": "user", "content": null}]}', "not text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 is the assistant's"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends with a question"),
        ("\udcff", "holds no conversation"),
    ],
)
def test_load_refuses_what_is_no_conversation(tmp_path: Path, text: str, why: str) -> None:
    terminal = Terminal()
    terminal.say("hi")
    before = list(terminal.conversation.turns)
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=why):
        terminal.do(f"/load {path}")
    with pytest.raises(KhaoszError, match="could not read"):
        terminal.do(f"/load {tmp_path / 'none.json'}")
    assert terminal.conversation.turns == before


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    terminal = Terminal()
    terminal.do("/system Be brief.")
    terminal.say("hi")
    saved = terminal.conversation.messages
    terminal.do(f"/save {tmp_path / 'a.json'}")
    terminal.do("/system")
    assert "1 exchanges" in terminal.do(f"/load {tmp_path / 'a.json'}")
    assert terminal.conversation.messages == saved
