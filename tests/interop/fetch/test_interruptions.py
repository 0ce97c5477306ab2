"""Interrupted at any moment, a pull leaves nothing that is offered as good and is not."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from hub_server import HubServer, forked

from khaosz.interop.fetch.pull import pull
from khaosz.interop.fetch.store import models_folder, pulled_models

NAMES = ("tiny", "hf:me/tiny:Q8_0", "ms:me/tiny:Q8_0", "hf:me/folder")


def interrupt(hub: HubServer, number: int, contents: list[bytes], folders: list[dict[str, bytes]],
              rng: random.Random) -> None:  # fmt: skip
    """Pull in a process, with faults, and end it at a random moment: every other one by SIGKILL."""
    version = rng.randrange(2)
    hub.add("me/tiny", {"m-Q8_0.gguf": contents[version]})
    hub.add("me/folder", folders[version])
    hub.cuts = [rng.randrange(1, 120_000) for _ in range(rng.randrange(3))]
    hub.sent = {"m-Q8_0.gguf": contents[1 - version]} if rng.random() < 0.1 else {}
    hub.ignores_ranges = rng.random() < 0.2
    hub.pause = rng.choice((0.0, 0.005, 0.02))
    name = NAMES[number % len(NAMES)]

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pull(name)

    process = forked(work)
    time.sleep(rng.uniform(0, 0.4))
    os.kill(process, signal.SIGKILL if number % 2 else rng.choice((signal.SIGINT, signal.SIGTERM)))
    os.waitpid(process, 0)


def check(contents: list[bytes], folders: list[dict[str, bytes]]) -> None:
    """What is offered is whole, and of one revision."""
    for path in pulled_models():
        if path.is_file():
            assert path.read_bytes() in contents, path
        else:
            found = {each.name: each.read_bytes() for each in path.iterdir()}
            found.pop("pulled.json")
            assert found in folders, path


def survive(hub: HubServer, count: int, contents: list[bytes], folders: list[dict[str, bytes]],
            seed: int) -> int:  # fmt: skip
    """Models that were offered after one of the interruptions."""
    rng = random.Random(seed)
    offered = 0
    for number in range(count):
        interrupt(hub, number, contents, folders, rng)
        check(contents, folders)
        offered += len(pulled_models())
    hub.cuts, hub.sent, hub.pause, hub.ignores_ranges = [], {}, 0.0, False
    for name in NAMES:
        pull(name)
        check(contents, folders)
    assert len(pulled_models()) == len(NAMES), "and each can be pulled at last"
    left = [path for path in (models_folder() / ".pulling").rglob("*") if path.is_file()]
    assert not left, left
    return offered


@pytest.fixture
def versions(
    hub: HubServer,
    known: Callable[..., None],
    new_gguf: bytes,
    old_gguf: bytes,
    directory: dict[str, bytes],
) -> tuple[list[bytes], list[dict[str, bytes]]]:
    """Two revisions of a file and of a folder; the catalogue knows the first file."""
    commit = hub.add("me/known", {"tiny.gguf": new_gguf})
    known(new_gguf, huggingface="me/known", revision=commit)
    weights = directory["model.safetensors"]
    later = {
        **directory,
        "model.safetensors": weights[:-4] + b"\0\0\0\0",
        "added_tokens.json": b"{}",
    }
    return [new_gguf, old_gguf], [directory, later]


def test_interrupted_pulls_offer_nothing_broken(
    hub: HubServer, versions: tuple[list[bytes], list[dict[str, bytes]]]
) -> None:
    survive(hub, 8, *versions, seed=1)


@pytest.mark.slow
def test_two_hundred_interrupted_pulls_offer_nothing_broken(
    hub: HubServer, versions: tuple[list[bytes], list[dict[str, bytes]]]
) -> None:
    assert survive(hub, 200, *versions, seed=2) > 200, "some pulls were complete"
