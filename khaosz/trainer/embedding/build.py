"""What an embedder's run is made of."""

from __future__ import annotations

from rich.console import Console

from khaosz.config import TrainConfig
from khaosz.data.contrastive import TextEncoder, TextPairs, load_text_pairs
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import CheckpointError, ConfigError, DataError
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.build import (
    Start,
    add_adapters,
    begin,
    eval_every,
    new_context,
    resolve_config,
    show_derived,
    standard_callbacks,
    starting_model,
)
from khaosz.trainer.calibration import apply_plan, calibrate, compiler_problem, rows_per_step
from khaosz.trainer.corpus import tokenizer_for
from khaosz.trainer.embedding.strategy import EmbedStrategy
from khaosz.trainer.embedding.validation import PANELS, RetrievalValidation
from khaosz.trainer.panels import PanelCurve
from khaosz.trainer.train_context import Plan, TrainContext
from khaosz.trainer.trainer import Trainer

_PAIRS_PER_STEP = 64


def build_embedder(
    start: Start, parallel: ParallelContext, console: Console
) -> tuple[TrainContext, Trainer]:
    """Raises `DataError` when no pair is left to train on, or no negative for any."""
    config, tokenizer, model = _open(start, parallel, console)
    data, held_out = _pairs(config, tokenizer, console)
    if len(data.passages) < 2:
        raise DataError(
            f"{config.data}: {len(data):,} pairs, and all have one passage",
            hint="a query needs another one's passage for a negative",
        )
    per_step = config.batch_pairs or _PAIRS_PER_STEP
    if per_step < max(2, parallel.world):
        raise ConfigError(
            f"batch_pairs={per_step}: a query needs another one's passage for a negative, and each"
            f" of {parallel.world} processes a query",
            hint=f"batch_pairs={_PAIRS_PER_STEP}, or more",
        )
    saved = start.saved
    if saved is not None and saved.windows != len(data):
        raise CheckpointError(
            f"the data holds {len(data):,} pairs, the run began with {saved.windows:,}",
            hint="resume with the data it was started with",
        )
    assert config.window is not None
    rows = rows_per_step(config, parallel, model.config.hidden_size)[1]
    strategy = EmbedStrategy(
        data=data,
        held_out=held_out,
        per_step=per_step,
        window=config.window,
        micro_rows=saved.plan.micro_rows if saved else rows,
        pad_id=tokenizer.pad_id,
        seed=config.seed,
        parallel=parallel,
        config=config.embed,
    )
    plan = saved.plan if saved else _calibrated(strategy, model, config, console)
    strategy.one_shape = plan.compiled
    compute = apply_plan(plan, model, config)
    context = new_context(start, config, model, tokenizer, parallel, plan, len(data))
    begin(context, start)
    validation = None
    if held_out.queries:
        validation = RetrievalValidation(strategy, compute, eval_every(context))
    callbacks = standard_callbacks(
        context,
        console,
        validation,
        PanelCurve(config.out, console, PANELS),
        shown=strategy.shown,
        unit=f"{per_step} pairs",
    )
    return context, Trainer(context, strategy, compute, callbacks)


def _open(
    start: Start, parallel: ParallelContext, console: Console
) -> tuple[TrainConfig, Tokenizer, Transformer]:
    """Configuration with every number filled in, tokenizer, and the model it starts from."""
    start.config.out.mkdir(parents=True, exist_ok=True)
    config, derived = resolve_config(start.config, parallel)
    if config.lora is not None and config.lora.dropout:
        raise ConfigError(
            f"lora.dropout={config.lora.dropout:g} with stage=embed",
            hint="texts are embedded twice, and must be the same both times: set it to 0",
        )
    tokenizer = tokenizer_for(config, start.checkpoint or config.init_from, parallel, console)
    config, model, more = starting_model(config, start.model, tokenizer, parallel)
    assert config.window is not None
    longest = config.embed.max_length or config.window
    if longest > config.window:
        raise ConfigError(
            f"embed.max_length={longest} is longer than the window of {config.window}",
            hint=f"window={longest}, if the model's context reaches so far",
        )
    config = config.updated(embed={**config.embed.model_dump(), "max_length": longest})
    add_adapters(model, config, start)
    if model.lm_head is not None:
        model.lm_head.requires_grad_(False)  # it has no part in a vector
    model.gradient_checkpointing = config.gradient_checkpointing
    hidden = {"batch_tokens", "vocab_size"}
    show_derived([n for n in [*derived, *more] if n.name not in hidden], console)
    return config, tokenizer, model


def _pairs(
    config: TrainConfig, tokenizer: Tokenizer, console: Console
) -> tuple[TextPairs, TextPairs]:
    """Pairs to train on and pairs held out: those of `val`, or a part of the data by passage."""
    embed = config.embed
    assert embed.max_length is not None
    encoder = TextEncoder(tokenizer, embed.max_length, embed.query_prefix, embed.passage_prefix)
    data, held_out, report = load_text_pairs(
        [config.data],
        encoder,
        negatives=embed.negatives,
        val_fraction=0.0 if config.val is not None else config.val_fraction,
        seed=config.seed,
    )
    reports = [report]
    if config.val is not None:
        held_out, _, own = load_text_pairs([config.val], encoder, negatives=embed.negatives)
        reports.append(own)
    for line in [line for each in reports for line in each.lines()]:
        console.print(f"  {line}", highlight=False, markup=False)
    return data, held_out


def _calibrated(
    strategy: EmbedStrategy, model: Transformer, config: TrainConfig, console: Console
) -> Plan:
    parallel = strategy.parallel
    strategy.one_shape = config.compile != "off" and compiler_problem(parallel.device) is None
    return calibrate(
        model, config, parallel, strategy, strategy.per_step, strategy.micro_rows, console
    )
