"""The terminal chat, with a real console, a real model and, where needed, a real process."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scripted_model import CONTEXT, SCRIPT, model, model_directory, run_khaosz, tokenizer

from khaosz.cli.output import open_console
from khaosz.cli.terminal.commands import COMMANDS
from khaosz.cli.terminal.conversation import Conversation, Events, Finished, Settings, Source
from khaosz.cli.terminal.defaults import read_defaults
from khaosz.cli.terminal.local_backend import LocalBackend
from khaosz.cli.terminal.loop import answer, handle_input
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import (
    ConfigError,
    DataError,
    GenerationError,
    KhaoszError,
    ModelError,
    ServerError,
    TokenizerError,
)
from khaosz.inference.generator import Generator as Model
from khaosz.inference.generator import Piece
from khaosz.inference.parts import Part
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.huggingface import save_model
from khaosz.interop.local_models import newest_model

torch.set_num_threads(1)


class Terminal:
    """One conversation on a console that writes to memory."""

    def __init__(self, max_tokens: int = 24) -> None:
        self.console = open_console(file=io.StringIO(), width=60, highlight=False, emoji=False)
        self.generator = Model(model(), tokenizer())
        self.backend = LocalBackend(self.generator, "tiny")
        self.conversation = Conversation(Settings(max_tokens, temperature=0.0))

    def take_output(self) -> str:
        """What was printed since the last call."""
        file = self.console.file
        assert isinstance(file, io.StringIO)
        text = file.getvalue()
        file.seek(0)
        file.truncate()
        return text

    def say(self, message: str) -> str:
        answer(self.conversation, message, self.backend, self.console)
        return self.take_output()

    def do(self, line: str) -> str:
        assert handle_input(line, self.conversation, self.backend, self.console)
        return self.take_output()


class ScriptedBackend:
    """Yields or raises these events."""

    name, about = "scripted", "nowhere"

    def __init__(self, *events: Part | Finished | BaseException) -> None:
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
        raise ModelError(f"model '{name}' not found")

    def knowledge_bases(self) -> list[str]:
        return []

    def open_knowledge_base(self, name: str) -> None:
        raise DataError(f"knowledge base '{name}' not found")

    def check(self, settings: Settings) -> None:
        pass

    def close(self) -> None:
        pass


def memory_console() -> Console:
    return open_console(file=io.StringIO(), width=60, highlight=False, emoji=False)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render(*parts: Part, finished: Finished | None = None) -> str:
    """The printed form of an answer."""
    console = memory_console()
    answer(
        Conversation(Settings()),
        "?",
        ScriptedBackend(*parts, finished or Finished("stop")),
        console,
    )
    return output(console)


def test_answer_is_printed_verbatim_and_added_to_turns() -> None:
    terminal = Terminal()
    assert terminal.say("你好") == SCRIPT + "\n"
    assert terminal.conversation.turns == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": SCRIPT},
    ]


def test_markup_is_not_interpreted() -> None:
    assert Terminal().say("hi") == SCRIPT + "\n"
    assert (
        render(Part("content", "[b]ok[/b] "), Part("content", ":smile:")) == "[b]ok[/b] :smile:\n"
    )


def test_control_characters_are_shown() -> None:
    # In the answer and in a document's name: set the clipboard, clear the screen.
    text = render(
        Part("content", "a\x1b]52;c;aGk=\x07b\r\x9b2Jc\n"),
        finished=Finished("stop", (Source(1, "x\x1b[2Jy.md, lines 1-9"),)),
    )
    assert text == "a␛]52;c;aGk=b\\x9b2Jc\n\n[1] x␛[2Jy.md, lines 1-9\n"


def test_reasoning_is_one_dimmed_line_and_not_added_to_turns() -> None:
    console = open_console(file=io.StringIO(), force_terminal=True, width=60, emoji=False)
    conversation = Conversation(Settings())
    parts = Part("reasoning", "hm"), Part("content", "Yes."), Finished("stop")
    answer(conversation, "?", ScriptedBackend(*parts), console)
    assert output(console).endswith("\x1b[2mthought for 0 s  (/thoughts shows them)\x1b[0m\nYes.\n")
    assert conversation.turns[-1]["content"] == "Yes."
    handle_input("/thoughts", conversation, ScriptedBackend(), console)
    assert output(console).endswith("\x1b[2mhm\x1b[0m\n")


def test_sources_follow_the_answer() -> None:
    source = Source(2, "手册.pdf, p. 7")
    assert render(Part("content", "是[2]。"), finished=Finished("stop", (source,))) == (
        "是[2]。\n[2] 手册.pdf, p. 7\n"
    )
    assert "cites no source" in render(finished=Finished("stop", (source,), cited=False))


def test_failed_answer_is_not_added() -> None:
    conversation = Conversation(Settings())
    with pytest.raises(ServerError):
        answer(
            conversation,
            "?",
            ScriptedBackend(Part("content", "so far"), ServerError("gone")),
            memory_console(),
        )
    assert conversation.turns == []


def test_interrupted_answer_is_added_partially() -> None:
    conversation = Conversation(Settings())
    backend = ScriptedBackend(
        Part("content", "so far"), KeyboardInterrupt(), Part("content", "never")
    )
    console = memory_console()
    answer(conversation, "?", backend, console)
    assert output(console) == "so far [interrupted]\n"
    assert conversation.turns[-1]["content"] == "so far"
    assert backend.closed


def test_finish_reason_length_is_printed() -> None:
    terminal = Terminal(max_tokens=4)
    assert terminal.say("hi") == "Yes, [length]\n"


def test_oldest_exchange_is_dropped_when_the_context_is_full() -> None:
    terminal = Terminal()
    assert terminal.say("a" * 20) == SCRIPT + "\n"
    assert terminal.say("b" * 20) == SCRIPT + "\n"
    text = terminal.say("c" * 20)
    assert text.startswith("(context full: the oldest exchange is dropped)\n")
    assert [turn["content"] for turn in terminal.conversation.turns] == [
        "b" * 20,
        SCRIPT,
        "c" * 20,
        SCRIPT,
    ]
    ids = terminal.generator.chat_ids(terminal.conversation.messages)
    assert len(ids) <= CONTEXT


def test_rejected_message_leaves_the_conversation_unchanged() -> None:
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


def test_special_tokens_in_a_message_are_plain_text() -> None:
    terminal = Terminal()
    terminal.say("<|end|>")
    ids = terminal.generator.chat_ids(terminal.conversation.turns[:1])
    assert ids.count(tokenizer().end_id) == 1


def test_help_lists_all_commands() -> None:
    terminal = Terminal()
    text = terminal.do("/help")
    for verb in COMMANDS:
        assert verb in text
        if verb != "/exit":
            assert "unknown command" not in terminal.do(verb)


def test_unknown_command() -> None:
    text = Terminal().do("/hlep [red]now")
    assert text == "unknown command /hlep; /help lists the commands\n"


@pytest.mark.parametrize("line", ["/exit", "/quit"])
def test_exit(line: str) -> None:
    terminal = Terminal()
    assert not handle_input(line, terminal.conversation, terminal.backend, terminal.console)


def test_reset_and_system_clear_the_turns() -> None:
    terminal = Terminal()
    terminal.say("hi")
    terminal.do("/reset")
    assert terminal.conversation.messages == []
    terminal.say("hi")
    terminal.do("/system Be brief.")
    assert terminal.conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert terminal.say("hi") == SCRIPT + "\n"
    terminal.do("/reset")
    assert terminal.conversation.messages == [{"role": "system", "content": "Be brief."}]
    terminal.do("/system")
    assert terminal.conversation.messages == []


def test_retry_answers_the_last_message_again() -> None:
    terminal = Terminal(max_tokens=4)
    assert terminal.do("/retry") == "nothing to retry\n"
    terminal.say("hi")
    terminal.do("/set max_tokens 24")
    assert terminal.do("/retry") == SCRIPT + "\n"
    assert terminal.conversation.turns == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": SCRIPT},
    ]


def test_failed_retry_keeps_the_previous_answer() -> None:
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


def test_set_rejects_invalid_values() -> None:
    terminal = Terminal()
    before = terminal.conversation.settings
    assert terminal.do("/set").startswith("settings: max_tokens 24, temperature 0.0, top_p 1.0")
    assert terminal.do("/set warmth 3").startswith("settings: max_tokens 24")
    assert terminal.do("/set top_k 1.5") == "top_k must be a number, not '1.5'\n"
    assert terminal.do("/set seed [b]") == "seed must be a number, not '[b]'\n"
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
    assert out.replace("\r\n", "\n").count(SCRIPT) == 2
    assert "unknown command /frobnicate" in out
    assert "temperature must be between 0 and 100 (got -1.0)" in out
    assert f"the model's context is {CONTEXT} (shorten the prompt" in out
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"] == [
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": SCRIPT},
    ]


def test_a_context_that_the_template_fills_is_refused_at_the_start(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    for context, options, what in ((3, (), "template takes"), (60, ("--system", "a" * 90), "take")):
        done = run_chat(directory, b"hi\n", "--context", str(context), *options)
        assert done.returncode == 1
        assert f"a context of {context} tokens has no room for a message" in done.stderr.decode()
        assert what in done.stderr.decode()
    done = run_chat(directory, b"a" * 70 + b"\n", "--context", "60")
    said = f"the context is 60 of the model's {CONTEXT} (shorten the prompt, or allow a longer"
    assert said in done.stdout.decode().replace("\n", " ")


def test_invalid_utf8_does_not_end_the_chat(tmp_path: Path) -> None:
    done = run_chat(model_directory(tmp_path), b"\xff\xfe\n", "--temperature", "0")
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr and b"invalid utf-8" in done.stdout


def test_newest_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no trained model found") as error:
        newest_model(tmp_path / "runs")
    assert error.value.hint is not None and "khaosz demo" in error.value.hint
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
        ("", "is not a conversation"),
        ("[1]", "is not a conversation"),
        ('{"messages": [{"role": "user"}]}', "is not a conversation"),
        ('{"messages": [{"role": "user", "content": null}]}', "a message is not text"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "message 1 has role assistant, not user",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends with an unanswered message"),
        ("\udcff", "is not a conversation"),
    ],
)
def test_load_rejects_other_files(tmp_path: Path, text: str, why: str) -> None:
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


def test_load_restores_a_saved_conversation(tmp_path: Path) -> None:
    terminal = Terminal()
    terminal.do("/system Be brief.")
    terminal.say("hi")
    saved = terminal.conversation.messages
    terminal.do(f"/save {tmp_path / 'a.json'}")
    terminal.do("/system")
    assert "1 exchanges" in terminal.do(f"/load {tmp_path / 'a.json'}")
    assert terminal.conversation.messages == saved


def test_thinking_is_switched_where_the_template_can() -> None:
    terminal = Terminal()
    assert terminal.do("/think off") == "this model never thinks: no switch\n"
    assert terminal.do("/think maybe") == "/think on | off\n"
    assert terminal.do("/thoughts") == "the last answer has no thoughts\n"
    by = tokenizer()
    template = by.config["chat_template"] + "{% if enable_thinking is false %}X{% endif %}"
    switched = Tokenizer(by.serialized, {**by.config, "chat_template": template})
    terminal.backend.generator = Model(model(), switched)
    assert terminal.do("/think") == "thinking is off\n"
    assert terminal.do("/think on") == "thinking is on\n"
    assert terminal.do("/think off") == "thinking is off\n"
    prompts: list[list[int]] = []
    stream = terminal.backend.generator.stream

    def recorded(ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        prompts.append(ids)
        return stream(ids, params)

    terminal.backend.generator.stream = recorded  # type: ignore[method-assign, assignment]
    terminal.say("hi")
    assert switched.decode(prompts[0]).endswith("X")


def test_settings_are_kept_for_new_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHAOSZ_CONFIG", str(tmp_path / "config"))
    assert read_defaults() == {}
    terminal = Terminal()
    terminal.console.width = 400
    terminal.do('/system Say "ok"\\n简短。')
    for line in ("/set temperature 0.5", "/set top_k 7", "/set max_tokens default"):
        terminal.do(line)
    assert terminal.do("/set save") == f"saved {tmp_path / 'config' / 'chat.toml'}\n"
    assert read_defaults() == {"temperature": 0.5, "top_k": 7, "system": 'Say "ok"\\n简短。'}
    directory = model_directory(tmp_path / "model")
    lines = b"/set\n/set temperature default\n/set\n"
    done = run_khaosz("chat", str(directory), "--device", "cpu", "--top-k", "9", lines=lines)
    out = " ".join(done.stdout.decode().split())
    assert "sampling: temperature 0.5, top_k 9 (" in out
    assert "sampling: temperature 0.8, top_p 0.95, top_k 9 (" in out and 'system: Say "ok"' in out
    (tmp_path / "config" / "chat.toml").write_text("temprature = 1\n")
    with pytest.raises(ConfigError, match="unknown setting 'temprature'"):
        read_defaults()
    (tmp_path / "config" / "chat.toml").write_text('top_k = "many"\n')
    with pytest.raises(ConfigError, match="top_k is not of type int"):
        read_defaults()


def test_without_a_model_the_command_that_pulls_one_is_named(tmp_path: Path) -> None:
    done = run_khaosz("chat", cwd=tmp_path, KHAOSZ_CACHE=str(tmp_path))
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    said = done.stderr.decode().splitlines()
    assert said[0] == "error: no model found on this machine"
    assert said[1].startswith("hint: khaosz pull ")
