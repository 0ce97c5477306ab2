"""What the service costs: its overhead per token, and many streaming clients for minutes.

    python -m bench serve overhead MODEL --rounds 5          one client against the engine alone
    python -m bench serve load MODEL --clients 64 --minutes 10
    python -m bench serve page MODEL --rounds 5              until the page accepts input

The server is its own process; the engine alone runs the same requests before or after it, never at
the same time. `load` repeats every client's questions once they are answered, greedily, and
compares every answer with the one that the engine alone gives to that question.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import as_markdown, describe
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams

TOPICS = ("rivers", "bread", "the moon", "clocks", "bees", "salt", "bridges", "silk", "maps", "tea")


@contextmanager
def server(model: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port."""
    data = tempfile.TemporaryDirectory()
    command = [sys.executable, "-m", "khaosz", "serve", f"model={model}", "--port", "0", *more]
    command += ["--data", data.name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, int(line.rsplit(":", 1)[1].split("/")[0])
    finally:
        process.terminate()
        process.wait(timeout=60)
        data.cleanup()


def question(client: int, turn: int) -> list[dict[str, str]]:
    topic = TOPICS[(client * 7 + turn) % len(TOPICS)]
    return [{"role": "user", "content": f"Note {client}-{turn}: tell me about {topic}."}]


async def ask(
    port: int, messages: list[dict[str, str]], tokens: int
) -> tuple[str, list[float], dict[str, Any]]:
    """The text, when each event with text came, and the usage."""
    body = json.dumps(
        {
            "model": "model", "messages": messages, "max_tokens": tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    text, times, usage, done = "", [], {}, False
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            break
        chunk = json.loads(line[6:])
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            if choice["delta"].get("content"):
                text += choice["delta"]["content"]
                times.append(time.perf_counter())
    writer.close()
    if not done:
        raise ConnectionError("a stream ended early")
    return text, times, usage


def alone(
    engine: Engine, prompts: Iterator[tuple[Any, list[int]]], batch: int, tokens: int
) -> Iterator[tuple[Any, str, list[float]]]:
    """What `ask` returns, by the engine alone with `batch` requests in flight all the time."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    running: dict[int, tuple[Any, list[str], list[float]]] = {}

    def begin() -> None:
        for key, ids in prompts:
            running[engine.add(ids, params)] = key, [], []
            return

    for _ in range(batch):
        begin()
    while engine.unfinished:
        engine.step()
        now = time.perf_counter()
        for output in engine.take():
            key, texts, times = running[output.request_id]
            if output.text:
                texts.append(output.text)
                times.append(now)
            if output.finish_reason is not None:
                del running[output.request_id]
                yield key, "".join(texts), times
                begin()


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def overhead(options: argparse.Namespace) -> None:
    """Seconds per token between the first and the last one, server and engine alternating."""
    generator = Generator.from_directory(options.model)
    messages = question(0, 0)
    served, own = [], []

    def by_engine() -> float:
        params = SamplingParams(max_tokens=options.tokens, temperature=0.0)
        generator.engine.add(generator.chat_ids(messages), params)
        times = []
        while generator.engine.unfinished:
            generator.engine.step()
            if generator.engine.take():
                times.append(time.perf_counter())
        generator.engine.prefixes.clear()
        return (times[-1] - times[0]) / (len(times) - 1)

    with server(options.model) as (_, port):

        def by_server() -> float:
            _, times, usage = asyncio.run(ask(port, messages, options.tokens))
            # Text of several tokens may come in one event, so tokens are counted by the usage.
            return (times[-1] - times[0]) / (usage["completion_tokens"] - 1)

        by_engine(), by_server()
        for _ in range(options.rounds):
            own.append(by_engine())
            served.append(by_server())
    ratios = [a / b for a, b in zip(served, own, strict=True)]
    print(as_markdown(describe()))
    print(f"engine alone: {1000 * median(own):.2f} ms a token, {[round(1000 * t, 2) for t in own]}")
    print(f"service:      {1000 * median(served):.2f} ms, {[round(1000 * t, 2) for t in served]}")
    print(f"overhead: {100 * (median(ratios) - 1):.1f} % (median of ratios)")


def resident_mb(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


async def load(port: int, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    end = start + 60 * options.minutes
    answers: dict[tuple[int, int], str] = {}
    waits: list[float] = []
    lost: list[str] = []
    memory: list[tuple[float, float]] = []

    async def client(number: int) -> None:
        turn = 0
        while time.perf_counter() < end:
            try:
                text, times, _ = await ask(port, question(number, turn), options.tokens)
            except (OSError, ValueError) as error:
                lost.append(f"{number}-{turn}: {error}")
            else:
                answers[number, turn] = text
                waits.extend(gaps(times))
            turn += 1

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append((time.perf_counter() - start, resident_mb(pid)))
            await asyncio.sleep(5)

    await asyncio.gather(watch(), *(client(i) for i in range(options.clients)))
    return {"answers": answers, "waits": waits, "lost": lost, "memory": memory}


def loaded(options: argparse.Namespace) -> None:
    batch = str(max(64, options.clients))
    with server(options.model, "--max-batch", batch, "--max-queue", "256") as (process, port):
        found = asyncio.run(load(port, process.pid, options))
    answers, memory = found["answers"], found["memory"]
    generator = Generator.from_directory(options.model)
    engine = Engine(generator.engine.runner, generator.tokenizer, max_batch=int(batch))
    turns = max(turn for _, turn in answers) + 1
    asked = ((turn, client) for turn in range(turns) for client in range(options.clients))
    prompts = (
        ((client, turn), generator.chat_ids(question(client, turn))) for turn, client in asked
    )
    waits: list[float] = []
    same = compared = 0
    stop = time.perf_counter() + 60 * options.alone_minutes
    for key, text, times in alone(engine, prompts, options.clients, options.tokens):
        waits.extend(gaps(times))
        if key in answers:
            compared += 1
            same += answers[key] == text
            if answers[key] != text:
                pairs = enumerate(zip(answers[key], text, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), 0)
                parts = [each[max(0, at - 30) : at + 30] for each in (answers[key], text)]
                print(f"  differs {key} at {at}: {parts[0]!r} / {parts[1]!r}", file=sys.stderr)
        if time.perf_counter() > stop:
            break
    warm = [mb for at, mb in memory if at >= 60 * options.minutes / 5]
    growth = 100 * (max(warm[-3:]) / warm[0] - 1)
    print(as_markdown(describe()))
    print(f"{len(answers):,} answers of {options.tokens} tokens at most, {len(found['lost'])} lost")
    for line in found["lost"][:5]:
        print(f"  lost {line}")
    print(f"as the engine alone answers: {same:,} of {compared:,} compared")
    ours, own = median(found["waits"]), median(waits)
    print(f"median gap {1000 * ours:.1f} ms, engine alone {1000 * own:.1f} ms: {ours / own:.3f}x")
    tenths = [round(memory[len(memory) * i // 10][1]) for i in range(10)]
    print(f"resident MB in each tenth of the time: {tenths}")
    print(
        f"resident MB {warm[0]:.0f} after warm-up, {max(warm[-3:]):.0f} at the end: {growth:+.2f} %"
    )


def page(options: argparse.Namespace) -> None:
    """Seconds from asking for the page to a model being chosen and the message box taking text, in
    a browser with an empty cache; bytes transferred."""
    from playwright.sync_api import sync_playwright

    ready = (
        "() => document.activeElement.id === 'message' && document.querySelector('select').value"
    )
    seconds, sizes = [], []
    with server(options.model) as (_, port), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for _ in range(options.rounds):
            tab = browser.new_context().new_page()
            network = tab.context.new_cdp_session(tab)
            network.send("Network.enable")
            came: list[int] = []
            network.on(
                "Network.loadingFinished", lambda e, came=came: came.append(e["encodedDataLength"])
            )
            start = time.perf_counter()
            tab.goto(f"http://127.0.0.1:{port}/", wait_until="commit")
            tab.wait_for_function(ready)
            seconds.append(time.perf_counter() - start)
            sizes.append(sum(came))
            tab.context.close()
        browser.close()
    print(as_markdown(describe()))
    print(f"ready after {median(seconds):.2f} s, {[round(each, 2) for each in seconds]}")
    print(f"{median(sizes) / 1024:.0f} KB came over the wire, API responses included")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=__doc__)
    parser.add_argument("what", choices=("overhead", "load", "page"))
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--alone-minutes", type=float, default=3.0)
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    {"overhead": overhead, "load": loaded, "page": page}[options.what](options)


if __name__ == "__main__":
    main()
