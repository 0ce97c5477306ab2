"""Commands that run or write a model: generate, chat, serve, convert, quantize, init, bench."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from khaosz.cli.models import chosen_model
from khaosz.cli.output import (
    AllowUnread,
    Context,
    Device,
    Json,
    MaxTokens,
    ModelPath,
    NoMemoryCheck,
    print_json,
    print_result,
    progress_console,
    resolve_device,
    say,
)
from khaosz.interop.local_models import default_model, find_model, named_path

model_app = typer.Typer()
bench_app = typer.Typer(help="Benchmark a model on this machine.", no_args_is_help=True)
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="The same bits alone, in a batch or cached; slower."),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]

# Without these, a model is sampled as it wants to be.
OwnTemperature = Annotated[float | None, typer.Option(help="0: greedy. Default: the model's own.")]
OwnTopP = Annotated[float | None, typer.Option(help="Nucleus sampling; 1: off.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0: off.")]
MinP = Annotated[float | None, typer.Option(help="Share of the top probability; 0: off.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Over prompt and answer; 1: off.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Over the answer; 0: off.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Over the answer; 0: off.")]
Think = Annotated[
    bool | None,
    typer.Option("--think/--no-think", help="Switch thinking, where the chat template can."),
]
ThinkingBudget = Annotated[int | None, typer.Option(help="Maximum tokens of thoughts.")]


@model_app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    chat: Annotated[str | None, typer.Option(help="Message to answer.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    max_tokens: MaxTokens = 128,
    temperature: OwnTemperature = None,
    top_k: TopK = None,
    top_p: OwnTopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    think: Think = None,
    thinking_budget: ThinkingBudget = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; repeatable.")
    ] = None,
    json_schema: Annotated[Path | None, typer.Option(help="JSON schema of the output.")] = None,
    regex: Annotated[str | None, typer.Option(help="Pattern that the output must match.")] = None,
    prompt_lookup: Annotated[
        bool,
        typer.Option(
            "--prompt-lookup", "--lookup", help="Draft tokens from the prompt: faster for quotes."
        ),
    ] = False,
    deterministic: Deterministic = False,
    context: Context = None,
    no_memory_check: NoMemoryCheck = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text, or answer a message."""
    from khaosz.errors import GenerationError
    from khaosz.inference.generator import Generator
    from khaosz.inference.sampling import SamplingParams

    if (prompt is None) == (chat is None):
        raise GenerationError("give either --prompt TEXT or --chat TEXT")
    options: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "thinking_budget": thinking_budget,
    }  # fmt: skip
    asked = {name: value for name, value in options.items() if value is not None}
    asked |= {
        "max_tokens": max_tokens,
        "stop": tuple(stop or ()),
        "json_schema": None if json_schema is None else _read_text("--json-schema", json_schema),
        "regex": regex,
    }
    SamplingParams(**asked)  # before the model is loaded
    generator = Generator.from_directory(
        model,
        device=resolve_device(device),
        deterministic=deterministic,
        prompt_lookup=prompt_lookup,
        context=context,
        memory_check=not no_memory_check,
    )
    if prompt is not None:
        ids = generator.prompt_ids(prompt)
    else:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": str(chat)})
        kwargs = generator.thinking.template_kwargs(None, think)
        ids = generator.chat_ids(messages, template_kwargs=kwargs)
    text, piece = "", None
    for piece in generator.stream(ids, generator.params(**asked)):
        text += piece.text
        if not as_json:
            say(piece.text, nl=False)
    assert piece is not None
    if as_json:
        print_json({"text": text, "tokens": piece.tokens, "finish_reason": piece.finish_reason})
    else:
        say()


@model_app.command()
def chat(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Model directory, .gguf file or name; default: the last trained or pulled.",
            parser=named_path,
            metavar="[MODEL]",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Server to chat with, such as http://127.0.0.1:8000/v1.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", help="Name of a local model, or of the server's.")
    ] = None,
    docs: Annotated[
        str | None, typer.Option(help="Knowledge base to answer from: a file, or the server's.")
    ] = None,
    temperature: OwnTemperature = None,
    top_p: OwnTopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum new tokens.", show_default="1024")
    ] = None,
    seed: Seed = None,
    think: Think = None,
    thinking_budget: ThinkingBudget = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    deterministic: Deterministic = False,
    context: Context = None,
    no_memory_check: NoMemoryCheck = False,
    device: Device = "auto",
) -> None:
    """Chat with a model in the terminal; /help lists the commands."""
    from khaosz.cli.terminal.conversation import ChatBackend, Conversation, Settings
    from khaosz.cli.terminal.defaults import read_defaults
    from khaosz.cli.terminal.loop import run_chat
    from khaosz.errors import ConfigError

    if model is not None and (url is not None or name is not None):
        other = "--model" if url is None else "--url"
        raise ConfigError(f"give a model path or {other}, not both")
    if url is not None and deterministic:
        raise ConfigError(
            "--deterministic has no effect with --url", hint="start the server with it"
        )
    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "min_p": min_p, "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        "seed": seed, "think": think, "thinking_budget": thinking_budget, "system": system,
    }  # fmt: skip
    kept = read_defaults() | {name: v for name, v in options.items() if v is not None}
    system = kept.pop("system", None)
    settings = Settings(**kept)
    conversation = Conversation(settings, system, documents=docs)
    backend: ChatBackend
    if url is not None:  # without importing torch
        from khaosz.cli.terminal.server_backend import ServerBackend

        backend = ServerBackend(url, name)
    else:
        from khaosz.cli.terminal.local_backend import LocalBackend, sampling
        from khaosz.interop.models import default_name
        from khaosz.rag.store import open_store

        sampling(settings, {})  # before the model is loaded
        if docs is not None:
            open_store(docs, new=False).close()
        path = model or (find_model(name) if name else chosen_model(ask=True))
        if model is None and name is None:
            say(f"model: {default_name(path)} ({path})", err=True)
        backend = LocalBackend.from_path(
            path,
            device=resolve_device(device),
            deterministic=deterministic,
            context=context,
            memory_check=not no_memory_check,
        )
        say(backend.generator.memory_line)
        backend.check_room(conversation)
    with closing(backend):
        if docs is not None:
            backend.open_knowledge_base(docs)
        run_chat(backend, conversation)


@model_app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model directories, .gguf files or names, or NAME=PATH; default: the last trained"
            " or pulled, or none yet. The first is loaded at start, others on first use.",
            metavar="[MODEL]...",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="Adapter of the first model: NAME=DIR; of another: MODEL:NAME=DIR."),
    ] = None,
    embedder: Annotated[
        list[str] | None,
        typer.Option(help="For /v1/embeddings and knowledge bases: NAME=SOURCE; see `rag add`."),
    ] = None,
    reranker: Annotated[
        list[str] | None,
        typer.Option(help="For /v1/rerank and knowledge bases: NAME=SOURCE; see `rag search`."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Model of another server whose answers are ranked beside those here:"
            " NAME=http://host/v1#model; its key is KHAOSZ_API_KEY or OPENAI_API_KEY."
        ),
    ] = None,
    data: Annotated[
        Path,
        typer.Option(help="Directory for documents, conversations and rankings."),
    ] = Path("khaosz-data"),
    runs: Annotated[Path, typer.Option(help="Directory of training runs to show.")] = Path("runs"),
    max_upload: Annotated[int, typer.Option(help="Maximum MB per document.", min=1)] = 256,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that clients must send; safer as KHAOSZ_API_KEY.", envvar="KHAOSZ_API_KEY"
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Additional allowed origin (CORS), such as https://chat.example.org or"
            " app://obsidian.md."
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Maximum requests per model, running and queued.", min=1)
    ] = 128,
    max_batch: Annotated[int, typer.Option(help="Maximum sequences per step.", min=1)] = 64,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds per request, time in the queue included.")
    ] = 600.0,
    memory_limit: Annotated[
        float | None,
        typer.Option(help="GB for weights and prefix caches; idle models are unloaded to fit."),
    ] = None,
    deterministic: Deterministic = False,
    context: Context = None,
    no_memory_check: NoMemoryCheck = False,
    device: Device = "auto",
) -> None:
    """Serve models to local programs over an HTTP API compatible with OpenAI's."""
    from khaosz.errors import ConfigError
    from khaosz.serve.models import Limits
    from khaosz.serve.run import Address
    from khaosz.serve.run import serve as run

    if memory_limit is not None and not 0 < memory_limit <= 1e6:
        raise ConfigError(f"--memory-limit is {memory_limit:g}, not a number of GB above 0")
    memory = None if memory_limit is None else int(memory_limit * (1 << 30))
    run(
        models or _default_models(),
        loras=lora or (),
        embedders=embedder or (),
        rerankers=reranker or (),
        peers=peer or (),
        data=data,
        runs=runs,
        max_upload=max_upload << 20,
        address=Address(host, port, api_key, tuple(origin or ())),
        device=resolve_device(device),
        deterministic=deterministic,
        limits=Limits(max_queue, max_batch, memory, context, not no_memory_check),
        timeout=request_timeout,
        source=os.environ.get("KHAOSZ_MODEL_SOURCE") or None,
        announce=say,
    )


def _default_models() -> list[str]:
    """The default model, if there is one: the page fetches the first."""
    from khaosz.errors import ModelError

    try:
        return [str(default_model())]
    except ModelError:
        return []


@model_app.command()
def convert(
    source: ModelPath,
    target: Annotated[Path, typer.Argument(help="Output: a .gguf file or a directory.")],
    to: Annotated[
        str | None, typer.Option(help="GGUF tensor type: F16, F32, BF16, Q8_0, Q4_0 or Q4_1.")
    ] = None,
) -> None:
    """Convert a Hugging Face directory to a .gguf file, or back."""
    from khaosz.interop.models import convert as convert_model

    say(convert_model(source, target, kind=to))


@model_app.command()
def quantize(
    model: ModelPath,
    to: Annotated[
        str, typer.Option(help="int8 (Q8_0), int4 (Q4_1), q4_k_m, q6_k, or a GGUF type.")
    ] = "int4",
    out: Annotated[Path | None, typer.Option(help="Output .gguf file.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Held-out texts; default: the built-in sample.")
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="Texts: columns that they use count more (q4_k_m, q6_k)."),
    ] = None,
    report: Annotated[bool, typer.Option(help="Measure the loss of quality.")] = True,
    allow_unread: AllowUnread = False,
    as_json: Json = False,
) -> None:
    """Write a quantised .gguf file, and measure its loss of quality on held-out text."""
    from khaosz.inference.quantize import format_quality, quantize_model

    result = quantize_model(
        model,
        to=to,
        out=out,
        data=data,
        report=report,
        console=progress_console(),
        allow_unread=allow_unread,
        imatrix=imatrix,
    )
    print_result(as_json, result, format_quality(result))


@model_app.command()
def init(
    size: Annotated[str, typer.Option(help="nano, mini, small, base, 1b, 7b or 13b.")],
    out: Annotated[Path, typer.Option(help="Output directory or .gguf file.")],
    to: Annotated[str, typer.Option(help="GGUF tensor type.")] = "Q4_0",
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a model with random weights, to test the speed and memory of a size."""
    from khaosz.inference.quantize import write_random_model

    say(write_random_model(size, out, kind=to, seed=seed, console=progress_console()))


@bench_app.command("infer")
def bench_infer(
    model: ModelPath,
    rounds: Annotated[int, typer.Option(help="Rounds; the result is the median.")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the speed of prefill (512 tokens) and of decode (64 more tokens)."""
    from khaosz.inference.measure import measure_inference

    result = measure_inference(model, device=resolve_device(device), rounds=rounds)
    text = "\n".join(f"{name:24} {value}" for name, value in result.items())
    print_result(as_json, result, text)


def _read_text(option: str, path: Path) -> str:
    from khaosz.errors import ConfigError
    from khaosz.files import disk_error

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {path}: not a text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{option} {disk_error(error, path)}") from None
