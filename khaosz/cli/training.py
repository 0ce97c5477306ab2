"""Verbs that train and measure: train, preference, lora, eval, demo, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from khaosz.cli.output import Device, Json, answer, chosen_device, progress_console

training_app = typer.Typer()
eval_app = typer.Typer(help="Measure a model.", no_args_is_help=True)
preference_app = typer.Typer(help="Collect what people prefer.", no_args_is_help=True)
lora_app = typer.Typer(help="Handle LoRA adapters.", no_args_is_help=True)


@training_app.command()
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

    with progress_console().status("scoring"):
        result = bits_per_byte(
            model, file, window=window, limit=limit, device=chosen_device(device)
        )
    by_lang = ", ".join(f"{lang} {value:.4f}" for lang, value in result.by_lang.items())
    answer(
        as_json,
        result.as_dict(),
        f"{result.bits_per_byte:.4f} bits per byte ({by_lang});"
        f" {result.bytes:,} bytes, {result.tokens:,} tokens",
    )


@training_app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Time for everything, set-up aside.")] = 9.0,
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("runs/demo"),
    offline: Annotated[bool, typer.Option("--offline", help="Only the built-in sample.")] = False,
) -> None:
    """The main job: fetch texts, train a tokenizer, pretrain, fine-tune, evaluate, show."""
    from khaosz.demo.run import run_demo

    run_demo(minutes=minutes, out=out, offline=offline, console=progress_console())


@training_app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine offers and what we will use of it."""
    from khaosz.doctor import examine, format_examination

    findings = examine()
    answer(as_json, findings, format_examination(findings))


@preference_app.command("collect")
def preference_collect(
    model: Annotated[Path, typer.Argument(help="Model directory or .gguf file.")],
    prompts: Annotated[Path, typer.Option(help="Records with prompts: jsonl, json, parquet.")],
    out: Annotated[Path, typer.Option(help="The .jsonl to append rankings to.")],
    n: Annotated[int, typer.Option("-n", help="Answers to each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(help="Above 0: answers must differ.")] = 0.9,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Per answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed, same answers.")] = 0,
    device: Device = "auto",
) -> None:
    """Sample answers and rank them blind; run again to go on where you stopped."""
    from khaosz.cli.collect import collect
    from khaosz.inference.sampling import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_p=top_p)
    collect(model, prompts, out, n, seed, params=params, device=chosen_device(device))


@eval_app.command("preference")
def eval_preference(
    model: Annotated[Path, typer.Argument(help="A reward model, or a policy.")],
    file: Annotated[Path, typer.Argument(help="Pairs: jsonl, json, parquet.")],
    reference: Annotated[
        Path | None, typer.Option(help="What the policy started from; without: plain likelihood.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Default: the training length.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How often a model prefers what people preferred: a reward model by its reward, a policy by
    how much likelier it made the answer than its reference does."""
    from khaosz.evaluation import format_preference, preference_accuracy

    with progress_console().status("scoring"):
        found = preference_accuracy(
            model, file, reference=reference, window=window, device=chosen_device(device)
        )
    answer(as_json, found.as_dict(), format_preference(found))


@eval_app.command("retrieval")
def eval_retrieval(
    file: Annotated[Path, typer.Argument(help="Pairs as for stage=embed: jsonl, json, parquet.")],
    embedder: Annotated[
        str | None, typer.Option(help="As for `rag add`; without one: BM25.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How often a query finds its passage among all passages of the file."""
    from khaosz.evaluation import retrieval_accuracy
    from khaosz.rag.models.embed import open_embedder

    with progress_console().status("searching"):
        found = retrieval_accuracy(file, open_embedder(embedder) if embedder else None)
    answer(
        as_json,
        found.as_dict(),
        f"{found.accuracy:.1%} come first, mean reciprocal rank {found.mrr:.3f};"
        f" {found.queries:,} queries, {found.passages:,} passages, {found.skipped:,} records"
        f" skipped; {found.found_by}",
    )


@eval_app.command("grounded")
def eval_grounded(
    model: Annotated[str, typer.Argument(help="As for `rag ask`: directory, .gguf or address.")],
    file: Annotated[Path, typer.Argument(help="Records of `khaosz data grounded`.")],
    limit: Annotated[int | None, typer.Option(help="Records to ask at most.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How often a model answers with the passage's own words, cites it, and refuses rightly."""
    from khaosz.evaluation import groundedness
    from khaosz.rag.models.chat_model import open_chat_model

    with progress_console().status("asking"):
        chosen = open_chat_model(model, device=chosen_device(device))
        found = groundedness(chosen, file, limit=limit)
    answer(as_json, found.as_dict(), found.format())


@lora_app.command("merge")
def lora_merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory (PEFT's layout).")],
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    base: Annotated[
        Path | None, typer.Option(help="Model it belongs to; default: what the adapter names.")
    ] = None,
) -> None:
    """Fold an adapter into its base model: a model directory like any other."""
    from khaosz.interop.adapter import merge_adapter

    typer.echo(merge_adapter(adapter, out, base=base))
