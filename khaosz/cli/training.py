"""Commands that train and evaluate: train, demo, doctor, lora, eval."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from khaosz.cli.output import (
    AllowUnread,
    Columns,
    Device,
    Json,
    OutFolder,
    Window,
    check_choice,
    parse_columns,
    print_notes,
    print_result,
    progress_console,
    resolve_device,
    say,
)

if TYPE_CHECKING:
    from khaosz.config import TrainConfig

training_app = typer.Typer()
eval_app = typer.Typer(help="Evaluate a model.", no_args_is_help=True)
lora_app = typer.Typer(help="Merge LoRA adapters.", no_args_is_help=True)


@training_app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, overrides the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from OUT/last.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Continue a finished run to a greater length.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and derive everything; write nothing.")
    ] = False,
    allow_unread: AllowUnread = False,
) -> None:
    """Train with a recipe: `khaosz train pt data=texts.jsonl`."""
    from khaosz.config import load_stages
    from khaosz.trainer.checks import check_stages, read_data
    from khaosz.trainer.outcome import next_commands
    from khaosz.trainer.run import run_stages

    if allow_unread:
        overrides = [*(overrides or []), "allow_unread=true"]
    configs = [_with_paths(config) for config in load_stages(recipe, overrides)]
    if dry_run:
        for stage in check_stages(configs, resume=resume or extend):
            say("\n".join(stage.lines()))
            for line in read_data(stage.config):
                say(f"  {line}")
        return
    context = None
    for context in run_stages(configs, resume=resume, extend=extend):
        if context.signal:
            raise typer.Exit(128 + context.signal)
        if context.parallel.is_main:
            say(str(context.config.out / "last"))
    if context is not None and context.parallel.is_main and context.complete:
        for command in next_commands(context):
            say(f"next:  {command}", err=True)
    if context is not None and not context.parallel.is_main:
        # Nothing is left to write. Threads of PyTorch abort a process now and then as it ends.
        sys.stderr.flush()
        os._exit(0)


def _with_paths(config: TrainConfig) -> TrainConfig:
    """Paths instead of the names of pulled models."""
    from khaosz.interop.local_models import named_path, trainable_model

    changes = {}
    for key in ("init_from", "reference", "reward_model"):
        model: Path | None = getattr(config, key)
        if model is None:
            continue
        keeps = config.keeps_file and not model.exists()
        if (path := named_path(str(model)) if keeps else trainable_model(model)) != model:
            say(f"{key}: {model} is {path}", err=True)
            changes[key] = path
    return config.updated(**changes) if changes else config


@training_app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print.")] = None,
) -> None:
    """List the shipped recipes, or print one: `khaosz recipes pt > mine.toml`."""
    from khaosz.config import find_recipe, shipped_recipes

    if name is not None:
        say(find_recipe(Path(name)).read_text(encoding="utf-8"), nl=False)
        return
    for known, first in shipped_recipes().items():
        say(f"{known:<10} {first}")


@eval_app.command("bpb")
def eval_bpb(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    file: Annotated[Path, typer.Argument(help="Texts: jsonl, csv, parquet, txt, ...")],
    window: Window = None,
    limit: Annotated[int | None, typer.Option(help="Maximum documents to score.")] = None,
    column: Columns = None,
    allow_unread: AllowUnread = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure bits per byte on texts; comparable across tokenizers."""
    from khaosz.evaluation import bits_per_byte

    with progress_console().status("scoring"):
        result = bits_per_byte(
            model,
            file,
            window=window,
            limit=limit,
            device=resolve_device(device),
            columns=parse_columns(column),
            allow_unread=allow_unread,
        )
    print_notes(result.report)
    by_lang = ", ".join(f"{lang} {value:.4f}" for lang, value in result.by_lang.items())
    print_result(
        as_json,
        vars(result),
        f"{result.bits_per_byte:.4f} bits per byte ({by_lang});"
        f" {result.bytes:,} bytes, {result.tokens:,} tokens",
    )


@training_app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Time budget, without downloads.")] = 9.0,
    out: OutFolder = Path("runs/demo"),
    offline: Annotated[
        bool, typer.Option("--offline", help="Use the built-in sample only.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="Acts to run, with commas: documents, model, assistant.")
    ] = "",
    skip: Annotated[str, typer.Option(help="Acts to leave out, with commas.")] = "",
    model: Annotated[
        str | None,
        typer.Option(help="Model of the assistant: a file, or a name that is fetched if needed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the demo in three acts: answers from documents, a model trained here, an assistant."""
    from khaosz.demo.assistant import can_ask
    from khaosz.demo.run import ACTS, run_demo
    from khaosz.demo.training import DemoStopped

    def confirm(question: str) -> bool:
        return typer.confirm(question, err=True)

    named = {"only": only.split(",") if only else [], "skip": skip.split(",") if skip else []}
    for option, names in named.items():
        for name in names:
            check_choice(option, name, tuple(ACTS))
    acts = [act for act in named["only"] or ACTS if act not in named["skip"]]
    try:
        reached = run_demo(
            minutes=minutes, out=out, offline=offline, acts=acts, model=model,
            confirm=confirm if can_ask() else None, console=progress_console(),
        )  # fmt: skip
    except DemoStopped as stop:
        raise typer.Exit(128 + stop.number) from None
    print_result(as_json, reached, "")


@training_app.command()
def doctor(as_json: Json = False) -> None:
    """Show this machine's devices and speed, and what a run will use."""
    from khaosz.doctor import examine, format_report

    report = examine()
    print_result(as_json, report, format_report(report))


@eval_app.command("preference")
def eval_preference(
    model: Annotated[Path, typer.Argument(help="Reward model or policy.")],
    file: Annotated[Path, typer.Argument(help="Pairs: jsonl, json, parquet.")],
    reference: Annotated[
        Path | None, typer.Option(help="Model the policy started from; default: use likelihoods.")
    ] = None,
    window: Window = None,
    column: Columns = None,
    allow_unread: AllowUnread = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how often a model agrees with human preferences: a reward model by its reward, a
    policy by its log-probability relative to the reference."""
    from khaosz.evaluation import preference_accuracy

    with progress_console().status("scoring"):
        result = preference_accuracy(
            model,
            file,
            reference=reference,
            window=window,
            device=resolve_device(device),
            columns=parse_columns(column),
            allow_unread=allow_unread,
        )
    print_notes(result.report)
    print_result(as_json, vars(result), result.format())


@eval_app.command("retrieval")
def eval_retrieval(
    file: Annotated[Path, typer.Argument(help="Pairs as for stage=embed: jsonl, json, parquet.")],
    embedder: Annotated[str | None, typer.Option(help="As for `rag add`; default: BM25.")] = None,
    column: Columns = None,
    allow_unread: AllowUnread = False,
    as_json: Json = False,
) -> None:
    """Measure how often a query retrieves its passage from all passages of the file."""
    from khaosz.evaluation import retrieval_accuracy
    from khaosz.rag.models.embedders import open_embedder

    with progress_console().status("searching"):
        result = retrieval_accuracy(
            file,
            open_embedder(embedder) if embedder else None,
            columns=parse_columns(column),
            allow_unread=allow_unread,
        )
    print_notes(result.report)
    print_result(
        as_json,
        vars(result),
        f"{result.accuracy:.1%} ranked first, mean reciprocal rank {result.mrr:.3f};"
        f" {result.queries:,} queries, {result.passages:,} passages, {result.skipped:,} records"
        f" skipped; {result.found_by}",
    )


@eval_app.command("grounded")
def eval_grounded(
    model: Annotated[
        str, typer.Argument(help="Model directory, .gguf file or http://host/v1#model.")
    ],
    file: Annotated[
        Path,
        typer.Argument(
            help="Records written by `khaosz data grounded`; with --kb, questions as JSON lines:"
            " question, answer (alternatives, or null), doc."
        ),
    ],
    kb: Annotated[
        str | None,
        typer.Option("--kb", help="Ask the questions of this knowledge base, as `rag ask` does."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --kb: write each graded answer to this JSONL file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum records to evaluate.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how often a model quotes the right passage, cites it, and refuses correctly."""
    from khaosz.errors import ConfigError
    from khaosz.evaluation import groundedness
    from khaosz.evaluation.answers import graded_answers, read_questions, report, write_graded
    from khaosz.rag import KnowledgeBase
    from khaosz.rag.models.chat_models import open_chat_model
    from khaosz.rag.store import open_store

    if kb is None:
        if out is not None:
            raise ConfigError("--out needs --kb")
        with progress_console().status("answering"):
            chat_model = open_chat_model(model, device=resolve_device(device))
            result = groundedness(chat_model, file, limit=limit)
        print_result(as_json, vars(result), result.format())
        return
    questions = read_questions(file, limit)
    with (
        KnowledgeBase(open_store(kb, new=False)) as base,
        progress_console().status("answering"),
    ):
        chat_model = open_chat_model(model, device=resolve_device(device))
        answers = report(write_graded(graded_answers(base, chat_model, questions), out))
    print_result(as_json, vars(answers), answers.format())


@lora_app.command("merge")
def lora_merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory (PEFT layout).")],
    out: OutFolder,
    base: Annotated[
        Path | None, typer.Option(help="Base model; default: the one the adapter names.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge into other weights than it was trained on.")
    ] = False,
) -> None:
    """Merge an adapter into its base model and write a model directory."""
    from khaosz.interop.adapter import merge_adapter

    say(merge_adapter(adapter, out, base=base, any_base=any_base))
