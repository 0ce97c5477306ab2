"""Commands for the preferences of people: collect, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from khaosz.cli.output import (
    AllowUnread,
    Columns,
    Device,
    Json,
    MaxTokens,
    TopP,
    parse_columns,
    print_result,
    resolve_device,
)

preference_app = typer.Typer(help="Collect and merge preferences of people.", no_args_is_help=True)


@preference_app.command("collect")
def preference_collect(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model directories, .gguf files or names; http://host/v1#model; MODEL+ADAPTER or"
            " an adapter's directory. Default: those of --answers.",
            metavar="[MODEL]...",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Records with prompts: jsonl, json, parquet. Default: of --answers."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File (.jsonl) to append rankings to.")] = None,
    annotator: Annotated[
        str | None, typer.Option(help="Your name, kept in the rankings; each ranks all prompts.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="File (.jsonl) of answers, sampled ahead, that several annotators rank; default"
            " for several models: OUT.answers.jsonl."
        ),
    ] = None,
    answers_only: Annotated[
        bool, typer.Option("--answers-only", help="Sample the answers and stop.")
    ] = False,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Answers of each model; default: 4 of one, 1 of each of several."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Above 0, so that answers differ.")] = 0.9,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = 256,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    column: Columns = None,
    allow_unread: AllowUnread = False,
    device: Device = "auto",
) -> None:
    """Rank answers of one or several models blind; run again to continue."""
    from khaosz.cli.collect import collect
    from khaosz.errors import ConfigError
    from khaosz.inference.sampling import SamplingParams

    if not models and answers is None:
        raise ConfigError("no models", hint="name them, or a file of answers with --answers")
    params = SamplingParams(max_tokens, temperature, top_p=top_p)
    collect(
        models or [],
        prompts,
        out,
        n,
        seed,
        annotator=annotator,
        answers=answers,
        answers_only=answers_only,
        params=params,
        device=resolve_device(device),
        columns=parse_columns(column),
        allow_unread=allow_unread,
    )


@preference_app.command("merge")
def preference_merge(
    files: Annotated[list[Path], typer.Argument(help="Rankings (.jsonl) to merge.")],
    out: Annotated[
        Path | None, typer.Option(help="Training records (.jsonl): one consensus per prompt.")
    ] = None,
    keep_all: Annotated[
        bool,
        typer.Option("--keep-all", help="To --out: every ranking; those of a prompt weigh as one."),
    ] = False,
    disputed: Annotated[
        Path | None, typer.Option(help="File (.jsonl) for the disputed items, worst first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge rankings of several annotators: their agreement, wins of models, training records."""
    from khaosz.data.rankings.merge import merge
    from khaosz.data.rankings.ranking_file import read_rankings, write_records
    from khaosz.errors import ConfigError, DataError

    if keep_all and out is None:
        raise ConfigError("--keep-all needs --out")
    for target in (each for each in (out, disputed) if each is not None):
        if target.resolve() in [each.resolve() for each in files] or out == disputed:
            raise ConfigError(f"{target} is read and written", hint="choose another file")
    if not (rankings := read_rankings(files)):
        raise DataError(f"no rankings in {', '.join(map(str, files))}")
    merged = merge(rankings)
    body, lines = merged.body(), merged.lines()
    if disputed is not None:
        write_records(disputed, merged.disputes())
        lines.append(f"{disputed}: the disputed items")
    if out is not None and keep_all:
        records = merged.every_ranking()
        write_records(out, records)
        lines.append(f"{out}: {len(records):,} rankings; those of a prompt weigh as one")
    elif out is not None:
        consensus = merged.consensus()
        write_records(out, consensus.records)
        lines.append(
            f"{out}: {len(consensus.records):,} consensus rankings by mean rank,"
            f" {consensus.pairs:,} pairs; {consensus.dropped:,} pairs without a majority dropped"
        )
    print_result(as_json, body, "\n".join(lines))
