"""What a run is made of: tokenizer, data, model, plan, context, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from khaosz.data.batches.dataset import TokenDataset
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import CheckpointError, ConfigError
from khaosz.files import write_json
from khaosz.interop import load_config, load_model
from khaosz.interop.adapter import load_adapter
from khaosz.model import Transformer
from khaosz.model.lora import add_lora, named_adapters
from khaosz.parallel import ParallelContext
from khaosz.trainer.calibration import apply_plan, calibrate, rows_per_step
from khaosz.trainer.callback import (
    Callback,
    Checkpointing,
    EarlyStop,
    ProgressLine,
    Validation,
    matmul_peak,
)
from khaosz.trainer.checkpoint import ADAPTER, SavedState, restore
from khaosz.trainer.corpus import prepared_data, tokenizer_for, validation_data
from khaosz.trainer.loggers import ExternalLogger, JsonLines, Sample, Samples
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.plots import LossCurve
from khaosz.trainer.strategy import build_strategy
from khaosz.trainer.train_context import Plan, Progress, TrainContext
from khaosz.trainer.trainer import Trainer
from khaosz.trainer.validation import evaluate_on, sample_text


@dataclass(frozen=True)
class Start:
    """Where a run starts from: nothing, another model, or its own checkpoint."""

    config: TrainConfig
    checkpoint: Path | None = None
    saved: SavedState | None = None

    @property
    def model(self) -> Path | None:
        """Whose weights to begin with; adapters are laid over the model they were begun on."""
        return (
            self.config.init_from if self.config.lora else self.checkpoint or self.config.init_from
        )


def build(
    start: Start,
    parallel: ParallelContext,
    console: Console,
) -> tuple[TrainContext, Trainer]:
    saved = start.saved
    start.config.out.mkdir(parents=True, exist_ok=True)
    config, derived = resolve_config(start.config, parallel)
    tokenizer = tokenizer_for(config, start.checkpoint or config.init_from, parallel, console)
    prepared = prepared_data(config, tokenizer, parallel, console)
    config, model, more = starting_model(config, start.model, tokenizer, parallel)
    add_adapters(model, config, start)
    show_derived([*derived, *more], console)
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
        rows, micro = rows_per_step(config, parallel, model.config.hidden_size)
    else:
        rows, micro = saved.plan.rows, saved.plan.micro_rows
        _check_place(saved, dataset, parallel, console)
    strategy = build_strategy(config, dataset, rows, micro, parallel)
    model.gradient_checkpointing = config.gradient_checkpointing
    plan = (
        saved.plan if saved else calibrate(model, config, parallel, strategy, rows, micro, console)
    )
    compute = apply_plan(plan, model, config)
    context = new_context(start, config, model, tokenizer, parallel, plan, dataset.windows)
    begin(context, start)
    held_out = validation_data(config, prepared, tokenizer, parallel, console)
    evaluate = evaluate_on(*held_out, config)
    validation = Validation(evaluate, eval_every(context)) if evaluate is not None else None
    callbacks = standard_callbacks(
        context, console, validation, LossCurve(config.out, console), samples=sample_text
    )
    return context, Trainer(context, strategy, compute, callbacks)


def add_adapters(model: Transformer, config: TrainConfig, start: Start) -> None:
    """Freeze the model and lay the recipe's adapters over it, those of the checkpoint if any."""
    if config.lora is None:
        return
    if start.checkpoint is not None:
        load_adapter(model, start.checkpoint / ADAPTER, base=config.lora.base)
        for layer in named_adapters(model).values():
            layer.config = config.lora
    else:
        add_lora(model, config.lora, torch.Generator().manual_seed(config.seed))


def new_context(
    start: Start,
    config: TrainConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    parallel: ParallelContext,
    plan: Plan,
    examples: int,
) -> TrainContext:
    """A run at its beginning, or where its checkpoint left it; `examples` are what is drawn."""
    return TrainContext(
        config=config,
        model=model,
        tokenizer=tokenizer,
        parallel=parallel,
        plan=plan,
        optimizers=build_optimizers(model, config, dtype=plan.torch_dtype),
        windows=examples,
        progress=start.saved.progress if start.saved else Progress(),
    )


def begin(context: TrainContext, start: Start) -> None:
    """Take up a checkpoint's state, or seed a new run; and write down what is run, and how."""
    if start.checkpoint is not None:
        restore(context, start.checkpoint)
    else:
        torch.manual_seed(context.config.seed)
    if context.parallel.is_main:
        save_config(context.config, context.config.out / "train_config.json")
        write_json(context.config.out / "plan.json", asdict(context.plan))


def show_derived(numbers: list[Derived], console: Console) -> None:
    for number in numbers:
        console.print(
            f"  {number.name} = {number.value}  [dim]{number.reason}[/dim]", highlight=False
        )


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


def starting_model(
    config: TrainConfig,
    initial: Path | None,
    tokenizer: Tokenizer,
    parallel: ParallelContext,
    load: Callable[..., Transformer] = load_model,
) -> tuple[TrainConfig, Transformer, list[Derived]]:
    """The model and the configuration with every number filled in."""
    assert config.size is not None
    numbers = preset(config.size, vocab_size=tokenizer.vocab_size, stage=config.stage)
    derived = numbers.derived
    if initial is not None:
        model = load(initial, device=parallel.device)
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
    if (config.optimizer == "adamw" or config.lora is not None) and config.lr is None:
        changes["lr"] = changes.get("embedding_lr", config.embedding_lr)
        why = "AdamW: as embedding_lr"
        derived = [Derived("lr", changes["lr"], why) if d.name == "lr" else d for d in derived]
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


def eval_every(context: TrainContext) -> int:
    """A tenth of the run, but a short run should train, not look at itself."""
    return context.config.eval_every or max(5, context.plan.total_steps // 10)


def standard_callbacks(
    context: TrainContext,
    console: Console,
    validation: Callback | None,
    curve: Callback,
    *,
    shown: Sequence[str] = (),
    unit: str | None = None,
    samples: Sample | None = None,
) -> list[Callback]:
    """What surrounds every stage, in the order it runs in. `shown`: more metrics to print; `unit`:
    what a step is taken over, where that is not tokens."""
    config, plan = context.config, context.plan
    assert config.window is not None
    callbacks: list[Callback] = []
    if validation is not None:
        callbacks.append(validation)
        if config.early_stop is not None:
            callbacks.append(EarlyStop(config.early_stop))
    if context.parallel.is_main:
        flops = context.model.config.flops_per_token(config.window)
        peak = matmul_peak(context.parallel.device, plan.torch_dtype)
        callbacks.append(ProgressLine(console, config.log_every, flops, peak, shown, unit))
        callbacks.append(JsonLines(config.out / "metrics.jsonl", config.log_every))
        callbacks += [ExternalLogger(n, config.out, config.log_every) for n in config.loggers]
        if config.prompts and samples is not None:
            every = config.sample_every or eval_every(context)
            path = config.out / "samples.jsonl"
            callbacks.append(Samples(path, samples, config.prompts, every, console))
    callbacks.append(Checkpointing(config.save_every or max(5, plan.total_steps // 10)))
    if context.parallel.is_main:
        callbacks.append(curve)
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
