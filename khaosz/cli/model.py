"""Verbs that run a model: generate, chat, serve, pull, convert, quantize, init, bench."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from khaosz.cli.models import default_model, model_named
from khaosz.cli.output import (
    Device,
    Json,
    answer,
    chosen_device,
    print_json,
    progress_console,
)

model_app = typer.Typer()
API_KEY = "KHAOSZ_API_KEY"
bench_app = typer.Typer(help="Time a model on this machine.", no_args_is_help=True)


@model_app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Model directory or .gguf file.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    chat: Annotated[str | None, typer.Option(help="A message to answer.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="A JSON schema (file) that the output must fit.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="What the output must match.")] = None,
    lookup: Annotated[
        bool, typer.Option("--lookup", help="Draft tokens from the prompt: sooner where it quotes.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits whatever runs beside it; slower.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text or answer a message."""
    from khaosz.errors import GenerationError
    from khaosz.inference.generator import Generator
    from khaosz.inference.sampling import SamplingParams

    if (prompt is None) == (chat is None):
        raise GenerationError("give one of --prompt TEXT and --chat TEXT")
    params = SamplingParams(
        max_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        json_schema=None if json_schema is None else _read_text(json_schema),
        regex=regex,
    )
    generator = Generator.from_directory(
        model, device=chosen_device(device), deterministic=deterministic, lookup=lookup
    )
    if prompt is not None:
        ids = generator.prompt_ids(prompt)
    else:
        messages = [{"role": "system", "content": system}] if system else []
        ids = generator.chat_ids([*messages, {"role": "user", "content": chat}])
    pieces = generator.stream(ids, params)
    text, piece = "", None
    for piece in pieces:
        text += piece.text
        if not as_json:
            typer.echo(piece.text, nl=False)
    assert piece is not None
    if as_json:
        print_json({"text": text, "tokens": piece.tokens, "finish_reason": piece.finish_reason})
    else:
        typer.echo()


@model_app.command()
def chat(
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory or .gguf; default: the newest trained here, or pulled."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Talk to a server there, such as http://127.0.0.1:8000/v1.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", help="A model by its name: the server's, or one here.")
    ] = None,
    docs: Annotated[
        str | None, typer.Option(help="Answer from this knowledge base: a file, or the server's.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 0.9,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="1: off. Without it: 1.1; of a server its own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Per answer.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal; /help inside lists the commands."""
    from khaosz.cli.terminal.chat import converse
    from khaosz.cli.terminal.conversation import Conversation, Partner, Settings
    from khaosz.errors import ConfigError

    if model is not None and (url is not None or name is not None):
        other = "--model" if url is None else "--url"
        raise ConfigError(f"give a model's path or {other}, not both")
    if repetition_penalty is None:
        repetition_penalty = 1.1 if url is None else 1.0
    settings = Settings(
        max_tokens, temperature, top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    partner: Partner
    if url is not None:  # needs no torch
        from khaosz.cli.terminal.server import ServerPartner

        partner = ServerPartner(url, name)
    else:
        from khaosz.cli.terminal.local import LocalPartner

        path = model or (model_named(name) if name else default_model())
        partner = LocalPartner.from_path(path, device=chosen_device(device))
    with closing(partner):
        partner.check(settings)
        if docs is not None:
            partner.open_base(docs)
        converse(partner, Conversation(settings, system, documents=docs))


@model_app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Directories or .gguf files, or NAME=PATH; default: the newest trained here, or"
            " pulled. The first is loaded at once, others when they are asked for.",
            metavar="[MODEL]...",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="An adapter, NAME=DIR; of another than the first: MODEL:NAME=DIR."),
    ] = None,
    embedder: Annotated[
        list[str] | None,
        typer.Option(help="For /v1/embeddings and knowledge bases: NAME=SOURCE; see `rag add`."),
    ] = None,
    reranker: Annotated[
        list[str] | None,
        typer.Option(help="For /v1/rerank and knowledge bases: NAME=SOURCE; see `rag search`."),
    ] = None,
    data: Annotated[
        Path,
        typer.Option(help="Folder of what the service keeps: documents, conversations, rankings."),
    ] = Path("khaosz-data"),
    runs: Annotated[Path, typer.Option(help="Folder of the training runs that are shown.")] = Path(
        "runs"
    ),
    max_upload: Annotated[int, typer.Option(help="MB of a document.", min=1)] = 256,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="That clients must send; better in the environment.", envvar=API_KEY),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Pages, or a proxy, that may use it too: https://chat.example.org."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Requests that a model holds at most, answering and waiting.", min=1)
    ] = 128,
    max_batch: Annotated[int, typer.Option(help="Sequences answered in one step.", min=1)] = 64,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds for a request, waiting included.")
    ] = 600.0,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GB for weights and kept caches; idle models go when it is short."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Serve models over HTTP as OpenAI's API does, to this machine."""
    from khaosz.serve.models import Limits
    from khaosz.serve.run import Address
    from khaosz.serve.run import serve as run

    memory = None if memory_limit is None else int(memory_limit * (1 << 30))
    run(
        models or [str(default_model())],
        loras=lora or (),
        embedders=embedder or (),
        rerankers=reranker or (),
        data=data,
        runs=runs,
        max_upload=max_upload << 20,
        address=Address(host, port, api_key, tuple(origin or ())),
        device=chosen_device(device),
        limits=Limits(max_queue, max_batch, memory),
        timeout=request_timeout,
        announce=typer.echo,
    )


@model_app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="smollm2, a local path, hf:OWNER/NAME[/FILE.gguf], ms:...")
    ],
) -> None:
    """Fetch an open model onto this machine."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from khaosz.interop.pull import pull as fetch

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=progress_console()) as bars:
        tasks: dict[str, Any] = {}

        def show(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total or None)
            bars.update(tasks[file], completed=done, total=total or None)

        path = fetch(name, show)
    typer.echo(f"{path}\nTalk to it:  khaosz chat {path}")


@model_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Model directory or .gguf file.")],
    target: Annotated[Path, typer.Argument(help="The other of the two.")],
    to: Annotated[
        str | None, typer.Option(help="Type inside a .gguf: F16, F32, BF16, Q8_0, Q4_0, Q4_1.")
    ] = None,
) -> None:
    """Turn a Hugging Face directory into a .gguf file, or the other way round."""
    from khaosz.interop import convert as carry_over

    typer.echo(carry_over(source, target, kind=to))


@model_app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Model directory or .gguf file.")],
    to: Annotated[str, typer.Option(help="int8 (Q8_0), int4 (Q4_1), or a GGUF type.")] = "int4",
    out: Annotated[Path | None, typer.Option(help="The .gguf to write.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Held-out texts; default: the built-in sample.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Measure what it costs.")] = True,
    as_json: Json = False,
) -> None:
    """Write a quantised .gguf, and measure what it costs on held-out text."""
    from khaosz.inference.quantize import format_quality, quantize_model

    result = quantize_model(
        model, to=to, out=out, data=data, report=report, console=progress_console()
    )
    answer(as_json, result, format_quality(result))


@model_app.command()
def init(
    size: Annotated[str, typer.Option(help="nano, mini, small, base, 1b, 7b or 13b.")],
    out: Annotated[Path, typer.Option(help="Directory, or .gguf file, to write.")],
    to: Annotated[str, typer.Option(help="Type inside a .gguf.")] = "Q4_0",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a model of random weights, to try the speed and memory of a size."""
    from khaosz.inference.quantize import write_random_model

    typer.echo(write_random_model(size, out, kind=to, seed=seed, console=progress_console()))


@bench_app.command("infer")
def bench_infer(
    model: Annotated[Path, typer.Argument(help="Model directory or .gguf file.")],
    rounds: Annotated[int, typer.Option(help="Medians of this many.")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How fast a model answers here: prefill of 512 tokens, decode of 64 behind them."""
    from khaosz.inference.measure import measure_inference

    found = measure_inference(model, device=chosen_device(device), rounds=rounds)
    answer(as_json, found, "\n".join(f"{name:24} {value}" for name, value in found.items()))


def _read_text(path: Path) -> str:
    from khaosz.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
