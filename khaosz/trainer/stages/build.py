"""What an alignment run is made of: pairs or prompts, models, judge, plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from khaosz.config import TrainConfig
from khaosz.data.records.pairs import TextEncoder, TextPairs, load_text_pairs
from khaosz.data.records.preference import PreferenceReport, load_pairs, load_prompts
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.errors import CheckpointError, ConfigError, DataError
from khaosz.interop import is_reward_model, load_model, load_reward_model
from khaosz.model import RewardModel, Transformer
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
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.plots import PanelCurve
from khaosz.trainer.stages.curves import REWARD_PANELS, PreferenceCurve
from khaosz.trainer.stages.dpo import DPOStrategy, RMStrategy
from khaosz.trainer.stages.embed import EmbedStrategy
from khaosz.trainer.stages.embed_validation import PANELS, RetrievalValidation
from khaosz.trainer.stages.pairs import PairSet, PairStrategy
from khaosz.trainer.stages.reference import add_reference
from khaosz.trainer.stages.reward_sources import (
    FunctionJudge,
    Judge,
    ModelJudge,
    check_same_tokenizer,
    load_function,
)
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.stages.validation import PairValidation, RolloutSamples
from khaosz.trainer.strategy import Compute
from khaosz.trainer.train_context import Plan, TrainContext
from khaosz.trainer.trainer import Trainer
from khaosz.trainer.validation import sample_text

_EMBED_PAIRS_PER_STEP = 64


def build_embedder(
    start: Start, parallel: ParallelContext, console: Console
) -> tuple[TrainContext, Trainer]:
    """Raises `DataError` when no pair is left to train on, or no negative for any."""
    config, tokenizer, model = _open_embedder(start, parallel, console)
    data, held_out = _text_pairs(config, tokenizer, console)
    if len(data.passages) < 2:
        raise DataError(
            f"{config.data}: {len(data):,} pairs, and all have one passage",
            hint="a query needs another one's passage for a negative",
        )
    per_step = config.batch_pairs or _EMBED_PAIRS_PER_STEP
    if per_step < max(2, parallel.world):
        raise ConfigError(
            f"batch_pairs={per_step}: a query needs another one's passage for a negative, and each"
            f" of {parallel.world} processes a query",
            hint=f"batch_pairs={_EMBED_PAIRS_PER_STEP}, or more",
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
    plan = saved.plan if saved else _calibrated_embedder(strategy, model, config, console)
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


def _open_embedder(
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


def _text_pairs(
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


def _calibrated_embedder(
    strategy: EmbedStrategy, model: Transformer, config: TrainConfig, console: Console
) -> Plan:
    parallel = strategy.parallel
    strategy.one_shape = config.compile != "off" and compiler_problem(parallel.device) is None
    return calibrate(
        model, config, parallel, strategy, strategy.per_step, strategy.micro_rows, console
    )


_PAIRS_PER_STEP = 16


def build_pairs(
    start: Start, parallel: ParallelContext, console: Console
) -> tuple[TrainContext, Trainer]:
    """A reward model's or DPO's run. Raises `DataError` when no pair is left to train on."""
    config, tokenizer, model = _open(start, parallel, console)
    assert config.window is not None
    if config.stage == "rm":
        model = _as_reward_model(model, config, start)
    data, held_out = _pairs(config, tokenizer, console)
    per_step = config.batch_pairs or _PAIRS_PER_STEP
    if per_step < parallel.world:
        raise ConfigError(
            f"batch_pairs={per_step} is fewer than the {parallel.world} processes",
            hint=f"batch_pairs={parallel.world} or more",
        )
    saved = start.saved
    if saved is not None and saved.windows != len(data.pairs):
        raise CheckpointError(
            f"the data holds {len(data.pairs):,} pairs, the run began with {saved.windows:,}",
            hint="resume with the data it was started with",
        )
    micro = saved.plan.micro_rows if saved else _rows(config, parallel, model)
    common = (
        data, held_out, per_step, config.window, micro, tokenizer.pad_id, config.seed, parallel,
    )  # fmt: skip
    strategy: PairStrategy
    if config.stage == "rm":
        strategy = RMStrategy(*common, config=config.reward)
    else:
        by_adapters = config.lora is not None and config.reference is None
        strategy = DPOStrategy(*common, config=config.preference, by_adapters=by_adapters)
    plan = saved.plan if saved else _calibrated(strategy, model, config, parallel, console)
    strategy.one_shape = plan.compiled
    compute = apply_plan(plan, model, config)
    if isinstance(strategy, DPOStrategy) and config.preference.needs_reference:
        _add_references(strategy, model, config, start, compute, tokenizer, console)
    context = new_context(start, config, model, tokenizer, parallel, plan, len(data.pairs))
    begin(context, start)
    validation = None
    if held_out.pairs:
        validation = PairValidation(strategy, compute, eval_every(context))
    callbacks = standard_callbacks(
        context,
        console,
        validation,
        PreferenceCurve(config.out, console, strategy, compute),
        shown=strategy.shown,
        unit=f"{per_step} pairs",
        samples=sample_text if config.stage == "dpo" else None,
    )
    return context, Trainer(context, strategy, compute, callbacks)


def build_rollouts(
    start: Start, parallel: ParallelContext, console: Console
) -> tuple[TrainContext, Trainer]:
    """A PPO or GRPO run: policy, reference, judge and critic."""
    config, tokenizer, model = _open(start, parallel, console)
    rollout, window = config.rollout, config.window
    assert window is not None
    if rollout.max_new_tokens >= window:
        raise ConfigError(
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt"
            f" in a window of {window}"
        )
    if rollout.prompts < parallel.world:
        raise ConfigError(f"rollout.prompts={rollout.prompts}, but {parallel.world} processes")
    # A prompt must leave room for the longest answer: one token more than it holds itself.
    loaded = load_prompts([config.data], tokenizer, window - rollout.max_new_tokens + 1)
    _show(loaded.report, console)
    prompts = loaded.train
    saved = start.saved
    if saved is not None and (saved.windows, saved.world) != (len(prompts), parallel.world):
        raise CheckpointError(
            f"{len(prompts):,} prompts on {parallel.world} processes, the run began with"
            f" {saved.windows:,} on {saved.world}",
            hint="resume with the data and the number of processes it was started with",
        )
    plan = saved.plan if saved else _planned(config, parallel, model, len(prompts))
    compute = apply_plan(plan, model, config)
    reference = None
    if config.lora is None or config.reference is not None:
        reference = _reference(model, config, start, tokenizer, parallel)
    judge, reward = _judge(config, tokenizer, compute, plan.micro_rows, parallel)
    critic = None
    if config.stage == "ppo":
        critic = (
            copy.deepcopy(reward)
            if reward is not None
            else RewardModel.from_transformer(_reference(model, config, start, tokenizer, parallel))
        )
        critic.requires_grad_(True).train()
        critic.gradient_checkpointing = config.gradient_checkpointing
    strategy = RLHFStrategy(
        stage=config.stage,
        policy=model,
        tokenizer=tokenizer,
        prompts=prompts,
        judge=judge,
        config=rollout,
        window=window,
        micro_rows=plan.micro_rows,
        seed=config.seed,
        parallel=parallel,
        compute=compute,
        reference=reference,
        critic=critic,
    )
    context = new_context(start, config, model, tokenizer, parallel, plan, len(prompts))
    context.reference, context.reward, context.value = reference, reward, critic
    context.rollouts = strategy
    if critic is not None:
        context.optimizers += build_optimizers(critic, config, dtype=compute.dtype)
    begin(context, start)
    callbacks = standard_callbacks(
        context,
        console,
        None,
        PanelCurve(config.out, console, REWARD_PANELS),
        shown=strategy.shown,
        unit=f"{rollout.prompts * rollout.group} answers, {strategy.steps_per_rollout} a rollout",
        samples=sample_text,
    )
    if parallel.is_main:
        callbacks.insert(0, RolloutSamples(config.out / "samples.jsonl", strategy, console))
    return context, Trainer(context, strategy, compute, callbacks)


def _open(
    start: Start, parallel: ParallelContext, console: Console
) -> tuple[TrainConfig, Tokenizer, Transformer]:
    """Configuration with every number filled in, tokenizer, and the model it starts from."""
    start.config.out.mkdir(parents=True, exist_ok=True)
    config, derived = resolve_config(start.config, parallel)
    if config.lora is not None and config.lora.dropout and config.stage != "rm":
        raise ConfigError(
            f"lora.dropout={config.lora.dropout:g} with stage={config.stage}",
            hint="a log-ratio compares two models, not two draws of a dropout mask: set it to 0",
        )
    tokenizer = tokenizer_for(config, start.checkpoint or config.init_from, parallel, console)
    load: Callable[..., Transformer] = load_model
    if config.stage == "rm" and start.model is not None and is_reward_model(start.model):
        load = load_reward_model
    config, model, more = starting_model(config, start.model, tokenizer, parallel, load)
    if config.stage != "rm":
        add_adapters(model, config, start)
    model.gradient_checkpointing = config.gradient_checkpointing
    hidden = {"batch_tokens", "vocab_size"}
    show_derived([n for n in [*derived, *more] if n.name not in hidden], console)
    return config, tokenizer, model


def _as_reward_model(model: Transformer, config: TrainConfig, start: Start) -> RewardModel:
    judge = model
    if not isinstance(judge, RewardModel):
        head = torch.Generator().manual_seed(config.seed)
        judge = RewardModel.from_transformer(model, head)
    if config.lora is not None:
        add_adapters(judge, config, start)
        judge.score.requires_grad_(True)  # new, so there is nothing to adapt: it is trained whole
        if start.checkpoint is not None:
            stored = load_reward_model(start.checkpoint, device=judge.score.weight.device)
            judge.score.load_state_dict(stored.score.state_dict())
    judge.gradient_checkpointing = config.gradient_checkpointing
    return judge


def _pairs(config: TrainConfig, tokenizer: Tokenizer, console: Console) -> tuple[PairSet, PairSet]:
    """Pairs to train on and pairs held out: those of `val`, or a part of the data by prompt."""
    assert config.window is not None
    fraction = 0.0 if config.val is not None else config.val_fraction
    loaded = load_pairs(
        [config.data], tokenizer, config.window, val_fraction=fraction, seed=config.seed
    )
    _show(loaded.report, console)
    held_out = loaded.validation
    if config.val is not None:
        held_out = load_pairs([config.val], tokenizer, config.window).train
    return PairSet(loaded.train), PairSet(held_out)


def _show(report: PreferenceReport, console: Console) -> None:
    for line in report.lines():
        console.print(f"  {line}", highlight=False, markup=False)


def _calibrated(
    strategy: PairStrategy,
    model: Transformer,
    config: TrainConfig,
    parallel: ParallelContext,
    console: Console,
) -> Plan:
    strategy.one_shape = config.compile != "off" and compiler_problem(parallel.device) is None
    if strategy.one_shape and config.micro_batch is None:
        strategy.fit_micro_rows()
    strategy.data.reference = torch.zeros(len(strategy.data.pairs), 2)  # the time is the same
    plan = calibrate(
        model, config, parallel, strategy, strategy.per_step, strategy.micro_rows, console
    )
    strategy.data.reference = None
    return plan


def _rows(config: TrainConfig, parallel: ParallelContext, model: Transformer) -> int:
    return rows_per_step(config, parallel, model.config.hidden_size)[1]


def _planned(
    config: TrainConfig, parallel: ParallelContext, model: Transformer, prompts: int
) -> Plan:
    """A plan without calibration: most of such a run's time goes to sampling, not to steps."""
    rollout = config.rollout
    limits = []
    if config.max_steps is not None:
        limits.append(config.max_steps)
    if config.epochs is not None:
        rollouts = -(-round(prompts * config.epochs) // rollout.prompts)
        limits.append(max(1, rollouts) * rollout.epochs * rollout.minibatches)
    # bf16 log-probabilities differ by 1e-2, which is as much as a step moves them.
    dtype = "fp32" if config.dtype == "auto" else config.dtype
    return Plan(
        total_steps=min(limits),
        dtype=dtype,
        compiled=config.compile == "on",
        threads=torch.get_num_threads(),
        rows=rollout.prompts,
        micro_rows=_rows(config, parallel, model),
        seconds_per_step=0.0,
        reasons=[f"dtype {dtype}: ratios of probabilities need every bit"],
    )


def _reference(
    model: Transformer,
    config: TrainConfig,
    start: Start,
    tokenizer: Tokenizer,
    parallel: ParallelContext,
) -> Transformer:
    """A frozen copy of the model the run started from, or of `reference`: never of a policy that a
    checkpoint has brought. Raises `ConfigError` for one of another shape."""
    if config.reference is not None:
        frozen = load_model(config.reference, device=parallel.device)
        if frozen.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"the reference {config.reference} has a vocabulary of"
                f" {frozen.config.vocab_size}, the policy {model.config.vocab_size}"
            )
        check_same_tokenizer(tokenizer, load_tokenizer(config.reference), config.reference)
    elif start.checkpoint is None and config.lora is None:
        frozen = copy.deepcopy(model)
        frozen.compiled_blocks = None
    else:
        frozen = starting_model(config, config.init_from, tokenizer, parallel)[1]
    return frozen.requires_grad_(False).eval()


def _add_references(
    strategy: DPOStrategy,
    model: Transformer,
    config: TrainConfig,
    start: Start,
    compute: Compute,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    if strategy.by_adapters:
        return
    parallel = strategy.parallel
    frozen = model
    if config.reference is not None or start.checkpoint is not None:
        frozen = _reference(model, config, start, tokenizer, parallel)
    for name, data in (("reference", strategy.data), ("reference-val", strategy.held_out)):
        if data.pairs:
            path = config.out / f"{name}.safetensors"
            add_reference(strategy, data, frozen, compute, path, parallel, console)


def _judge(
    config: TrainConfig,
    tokenizer: Tokenizer,
    compute: Compute,
    rows: int,
    parallel: ParallelContext,
) -> tuple[Judge, RewardModel | None]:
    if config.reward_function is not None:
        return FunctionJudge(load_function(config.reward_function), config.reward_function), None
    path: Path | None = config.reward_model
    assert path is not None and config.window is not None
    check_same_tokenizer(tokenizer, load_tokenizer(path), path)
    reward = load_reward_model(path, device=parallel.device)
    if reward.config.max_position_embeddings < config.window:
        raise ConfigError(
            f"the reward model {path} reads {reward.config.max_position_embeddings} positions,"
            f" the window is {config.window}"
        )
    return ModelJudge(reward, compute, config.window, rows, tokenizer.pad_id), reward
