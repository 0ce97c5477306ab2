"""A recipe from start to finish: place, tokenizer, data, model, plan, loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from khaosz.config import (
    ModelConfig,
    TrainConfig,
    preset,
    save_config,
    size_for_minutes,
)
from khaosz.config.presets import Derived, nearest_size, training_numbers
from khaosz.data.dataset import TokenDataset
from khaosz.data.prepare import PreparedData
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import CheckpointError, ConfigError
from khaosz.interop import load_config, load_model
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext, setup_parallel
from khaosz.trainer.calibration import apply_plan, calibrate, rows_per_step
from khaosz.trainer.callback import (
    Callback,
    Checkpointing,
    EarlyStop,
    ProgressLine,
    Samples,
    Validation,
    matmul_peak,
)
from khaosz.trainer.checkpoint import (
    SavedState,
    check_same_run,
    load_state,
    resolve,
    restore,
)
from khaosz.trainer.corpus import prepared_data, tokenizer_for, validation_data
from khaosz.trainer.loggers import ExternalLogger, JsonLines, LossCurve
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.strategy import build_strategy
from khaosz.trainer.train_context import Progress, TrainContext
from khaosz.trainer.trainer import Trainer
from khaosz.trainer.validation import evaluate_on, sample_text


@dataclass(frozen=True)
class Start:
    """Where a run starts from: nothing, another model, or its own checkpoint."""

    config: TrainConfig
    checkpoint: Path | None = None
    saved: SavedState | None = None


def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> TrainContext:
    """Train as `config` says and return the finished context; progress goes to `console`.

    Raises a `KhaoszError` for everything that can't work; earlier output stays intact.
    """
    parallel = setup_parallel(config.parallel)
    console = console or Console(stderr=True)
    console.quiet = console.quiet or not parallel.is_main
    try:
        start = _find_start(config, resume)
        if start.saved is not None:
            torch.set_num_threads(start.saved.plan.threads)
        context, trainer = _build(start, parallel, console)
        if context.progress.step >= context.plan.total_steps:
            console.print(f"nothing left to do: {config.out} is trained to its last step")
            return context
        return trainer.run()
    finally:
        parallel.close()


def run_stages(
    configs: list[TrainConfig], *, resume: bool = False, console: Console | None = None
) -> Iterator[TrainContext]:
    """Run stages one after the other, each context handed out when its stage is done.

    With `resume`, finished stages are passed over, a begun one goes on and the rest start; a stop
    asked for during one stage ends them all.
    """
    for config in configs:
        begun = resolve(config.out / "last") is not None
        context = run(config, resume=resume and (begun or len(configs) == 1), console=console)
        yield context
        if context.stopping:
            return


def _find_start(config: TrainConfig, resume: bool) -> Start:
    last = resolve(config.out / "last")
    if not resume:
        if last is not None:
            raise CheckpointError(
                f"{config.out} already holds a run",
                hint="go on with --resume, or choose another out=",
            )
        return Start(config)
    if last is None:
        raise CheckpointError(f"{config.out}: nothing to resume", hint="start without --resume")
    return Start(check_same_run(config, last), last, load_state(last))


def _build(
    start: Start,
    parallel: ParallelContext,
    console: Console,
) -> tuple[TrainContext, Trainer]:
    config, saved = start.config, start.saved
    config.out.mkdir(parents=True, exist_ok=True)
    initial = start.checkpoint or config.init_from
    config, derived = resolve_config(config, parallel)
    tokenizer = tokenizer_for(config, initial, parallel, console)
    prepared = prepared_data(config, tokenizer, parallel, console)
    config, model, more = _model(config, initial, tokenizer, parallel)
    for number in [*derived, *more]:
        console.print(
            f"  {number.name} = {number.value}  [dim]{number.reason}[/dim]", highlight=False
        )
    assert config.window is not None
    dataset = TokenDataset.open(
        prepared,
        config.window,
        mix=config.mix,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
        plan_dir=config.out / ".plans",
    )
    _show_stats(dataset, console)
    if saved is None:
        rows, micro = rows_per_step(config, parallel)
    else:
        rows, micro = saved.plan.rows, saved.plan.micro_rows
        _check_place(saved, dataset, parallel, console)
    strategy = build_strategy(config, dataset, rows, micro, parallel)
    model.gradient_checkpointing = config.gradient_checkpointing
    plan = (
        saved.plan if saved else calibrate(model, config, parallel, strategy, rows, micro, console)
    )
    compute = apply_plan(plan, model, config)
    context = TrainContext(
        config=config,
        model=model,
        tokenizer=tokenizer,
        parallel=parallel,
        plan=plan,
        optimizers=build_optimizers(model, config, dtype=compute.dtype),
        windows=dataset.windows,
        progress=saved.progress if saved else Progress(),
    )
    if start.checkpoint is not None:
        restore(context, start.checkpoint)
    else:
        torch.manual_seed(config.seed)
    if parallel.is_main:
        save_config(config, config.out / "train_config.json")
    validation = validation_data(config, prepared, tokenizer, parallel, console)
    callbacks = _callbacks(context, validation, console)
    return context, Trainer(context, strategy, compute, callbacks)


def _check_place(
    saved: SavedState, dataset: TokenDataset, parallel: ParallelContext, console: Console
) -> None:
    """A resumed run must find the data it began with; another world size is allowed, and said."""
    if dataset.windows != saved.windows:
        raise CheckpointError(
            f"the data holds {dataset.windows:,} windows, the run began with {saved.windows:,}",
            hint="resume with the data it was started with",
        )
    if parallel.world != saved.world:
        console.print(
            f"  {parallel.world} processes now, {saved.world} before: the same batches,"
            " summed in another order, so not bit-identical"
        )


def resolve_config(
    config: TrainConfig, parallel: ParallelContext
) -> tuple[TrainConfig, list[Derived]]:
    """Fill in what the recipe left open and can be told without the data."""
    derived: list[Derived] = []
    size = config.size
    if size == "auto" or (size is None and config.init_from is None):
        found = size_for_minutes(
            config.max_minutes or 10.0, accelerator=parallel.device.type != "cpu"
        )
        size = str(found.value)
        derived.append(found)
    if config.init_from is not None:
        size = nearest_size(load_config(config.init_from).hidden_size)
    assert size is not None
    return config.updated(size=size), derived


def _model(
    config: TrainConfig, initial: Path | None, tokenizer: Tokenizer, parallel: ParallelContext
) -> tuple[TrainConfig, Transformer, list[Derived]]:
    """The model and the configuration with every number filled in."""
    assert config.size is not None
    numbers = preset(config.size, vocab_size=tokenizer.vocab_size, stage=config.stage)
    derived = numbers.derived
    if initial is not None:
        model = load_model(initial, device=parallel.device)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"{initial} has a vocabulary of {model.config.vocab_size}, the tokenizer"
                f" {tokenizer.vocab_size}",
                hint="leave tokenizer= out: the model brings its own",
            )
        shape = model.config
        derived = [d for d in derived if d.name in ("window", "batch_tokens")]
        derived += training_numbers(shape.hidden_size, config.stage)
    else:
        shape = numbers.model
        if config.window is not None and config.window > shape.max_position_embeddings:
            shape = shape.updated(max_position_embeddings=config.window)
        if config.model:
            shape = ModelConfig.parse({**shape.model_dump(), **config.model}, source="[model]")
        model = Transformer(shape)
        model.initialise(torch.Generator().manual_seed(config.seed))
        model.to(parallel.device)
    given = {d.name: d.value for d in derived}
    changes = {
        name: given[name]
        for name in ("window", "batch_tokens", "lr", "embedding_lr", "weight_decay")
        if getattr(config, name) is None
    }
    if config.optimizer == "adamw" and config.lr is None:
        changes["lr"] = changes.get("embedding_lr", config.embedding_lr)
    kept = [d for d in derived if getattr(config, d.name, None) is None]
    if config.model:
        kept.append(
            Derived(
                "parameters", f"{shape.parameters() / 1e6:,.1f}M", "with the recipe's model table"
            )
        )
    config = config.updated(**changes)
    assert config.window is not None
    if config.window > shape.max_position_embeddings:
        raise ConfigError(
            f"window={config.window} is longer than the model's context"
            f" of {shape.max_position_embeddings}"
        )
    return config, model, kept


def _callbacks(
    context: TrainContext, validation: tuple[PreparedData, str], console: Console
) -> list[Callback]:
    config, plan = context.config, context.plan
    assert config.window is not None
    tenth = max(5, plan.total_steps // 10)  # a short run should train, not look at itself
    every = config.eval_every or tenth
    callbacks: list[Callback] = []
    evaluate = evaluate_on(*validation, config)
    if evaluate is not None:
        callbacks.append(Validation(evaluate, every))
        if config.early_stop is not None:
            callbacks.append(EarlyStop(config.early_stop))
    if context.parallel.is_main:
        flops = context.model.config.flops_per_token(config.window)
        peak = matmul_peak(context.parallel.device, plan.torch_dtype)
        callbacks.append(ProgressLine(console, config.log_every, flops, peak))
        callbacks.append(JsonLines(config.out / "metrics.jsonl", config.log_every))
        callbacks += [ExternalLogger(n, config.out, config.log_every) for n in config.loggers]
        if config.prompts:
            prompts_every = config.sample_every or every
            callbacks.append(Samples(sample_text, config.prompts, prompts_every, console))
    callbacks.append(Checkpointing(config.save_every or tenth))
    if context.parallel.is_main:
        callbacks.append(LossCurve(config.out, console))
    return callbacks


def _show_stats(dataset: TokenDataset, console: Console) -> None:
    stats = dataset.stats
    console.print(
        f"  {stats.documents:,} documents in {stats.windows:,} windows of {dataset.window},"
        f" {stats.fill:.1%} full",
        highlight=False,
    )
    skipped = stats.skipped_short + stats.skipped_long + stats.skipped_untrained
    if stats.cut or skipped:
        console.print(
            f"  longer than the window: {stats.cut:,} cut, {stats.skipped_long:,} skipped;"
            f" {stats.skipped_short:,} too short,"
            f" {stats.skipped_untrained:,} with nothing to learn",
            highlight=False,
        )
