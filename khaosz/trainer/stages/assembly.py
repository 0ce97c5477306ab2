"""What each stage adds to an opened run: data, strategy, validation and pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from khaosz.config import TrainConfig
from khaosz.data.batches.dataset import TokenDataset
from khaosz.data.fingerprint import fingerprint
from khaosz.data.records.pairs import TextEncoder, TextPairs, load_text_pairs
from khaosz.data.records.preference import load_pairs, load_prompts
from khaosz.data.records.report import LoadReport
from khaosz.errors import DataError
from khaosz.interop.models import model_config
from khaosz.model import RewardModel
from khaosz.trainer.calibration import apply_plan, compiler_problem
from khaosz.trainer.corpus import Corpus
from khaosz.trainer.open_run import OpenRun
from khaosz.trainer.plots import LossCurve
from khaosz.trainer.stages.dpo import DPOStrategy, RMStrategy
from khaosz.trainer.stages.embed import EmbedStrategy
from khaosz.trainer.stages.embed_validation import RETRIEVAL_PANELS, evaluate_retrieval
from khaosz.trainer.stages.lengths import derives_window, window_for
from khaosz.trainer.stages.limits import (
    PREFERENCE_PAIRS,
    TEXT_PAIRS,
    check_pairs_per_step,
    check_room,
    check_texts_per_step,
    embedded_length,
)
from khaosz.trainer.stages.pairs import PairSet, PairStrategy
from khaosz.trainer.stages.reference import add_references, frozen_reference
from khaosz.trainer.stages.reward_sources import ModelReward, open_reward_source
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.stages.validation import (
    ROLLOUT_PANELS,
    PreferenceCurve,
    RolloutSamples,
    evaluate_pairs,
)
from khaosz.trainer.strategy import BatchLayout, build_strategy
from khaosz.trainer.train_context import Plan, TrainContext
from khaosz.trainer.trainer import Trainer
from khaosz.trainer.validation import evaluate_on, sample_text

Pairs = TypeVar("Pairs")


def assemble_text(run: OpenRun) -> Trainer:
    """Pretraining and supervised fine-tuning: packed windows of token files."""
    resumed = run.origin.saved is not None
    corpus = Corpus(run.config, run.tokenizer, run.parallel, run.console, resumed)
    prepared = corpus.training_data()
    validation = corpus.validation_data(prepared)
    if derives_window(run.config) and (lengths := prepared.lengths("train")):
        assert run.config.init_from is not None
        longest = model_config(run.config.init_from).max_position_embeddings
        run.derived.append(window_for(lengths, longest))
        run.config = run.config.updated(window=run.derived[-1].value)
    run.load_model()
    config, tokenizer = run.config, run.tokenizer
    dataset = TokenDataset.open(
        prepared,
        run.window,
        mix=config.mix,
        seed=config.seed,
        pad_id=tokenizer.pad_id,
        plan_dir=config.out / ".plans",
    )
    _print_lines(run, _packing_lines(dataset))
    run.check_data(dataset.windows, "windows", prepared.content("train"))
    rows, micro = run.rows()
    strategy = build_strategy(config, dataset, rows, micro, run.parallel)
    plan = run.plan(strategy, rows, micro)
    compute = apply_plan(plan, run.model, config)
    context = run.context(plan, strategy, dataset.windows)
    evaluate = evaluate_on(*validation, config)
    curve = LossCurve(config.out, run.console)
    callbacks = run.callbacks(context, strategy, curve, evaluate, samples=sample_text)
    return Trainer(context, strategy, compute, callbacks)


def assemble_pairs(run: OpenRun) -> Trainer:
    """A reward model or DPO. Raises `DataError` when no pair is left to train on."""
    run.load_model()
    config, parallel = run.config, run.parallel
    data, held_out = _preference_pairs(run)
    per_step = config.batch_pairs or PREFERENCE_PAIRS
    check_pairs_per_step(per_step, parallel.world)
    ids = [(p.prompt_ids, p.chosen_ids, p.rejected_ids, p.margin) for p in data.pairs]
    run.check_data(len(data.pairs), "pairs", fingerprint(ids, data.draws))
    layout = _layout(run, per_step)
    strategy: PairStrategy
    if config.stage == "rm":
        strategy = RMStrategy(data, held_out, layout, parallel, config=config.reward)
    else:
        by_adapters = config.lora is not None and config.reference is None
        strategy = DPOStrategy(
            data, held_out, layout, parallel, config=config.preference, by_adapters=by_adapters
        )
    plan = plan_packed(run, strategy)
    compute = apply_plan(plan, run.model, config)
    if isinstance(strategy, DPOStrategy) and config.preference.needs_reference:
        add_references(run, strategy, compute)
    context = run.context(plan, strategy, len(data.pairs))

    def evaluate(context: TrainContext) -> dict[str, float]:
        return evaluate_pairs(strategy, context.model, compute)

    callbacks = run.callbacks(
        context,
        strategy,
        PreferenceCurve(config.out, run.console, strategy, compute),
        evaluate if held_out.pairs else None,
        unit=f"{per_step} pairs",
        samples=sample_text if config.stage == "dpo" else None,
    )
    return Trainer(context, strategy, compute, callbacks)


def assemble_rollouts(run: OpenRun) -> Trainer:
    """PPO or GRPO: policy, reference, reward source and critic."""
    run.load_model()
    config, parallel, rollout = run.config, run.parallel, run.config.rollout
    check_room(config, run.window, parallel.world)
    # A prompt must leave room for the longest answer: one token more than it has itself.
    loaded = load_prompts(
        [config.data],
        run.tokenizer,
        run.window - rollout.max_new_tokens + 1,
        columns=config.columns,
        allow_unread=config.allow_unread,
    )
    _print_lines(run, loaded.report.lines())
    prompts = loaded.train
    content = fingerprint([vars(prompt) for prompt in prompts])
    run.check_data(len(prompts), "prompts", content, same_world=True)
    new_plan = _rollout_plan(run, len(prompts))
    plan = run.saved_plan(lambda config, _: rollout_steps(config, len(prompts))) or new_plan
    config = run.config
    compute = apply_plan(plan, run.model, config)
    reference = None
    if config.lora is None or config.reference is not None:
        reference = frozen_reference(run)
    layout = _layout(run, rollout.prompts)
    source = open_reward_source(run, compute, layout)
    reward = source.model if isinstance(source, ModelReward) else None
    critic = _critic(run, reward) if config.stage == "ppo" else None
    strategy = RLHFStrategy(
        policy=run.model,
        tokenizer=run.tokenizer,
        prompts=prompts,
        reward_source=source,
        config=rollout,
        layout=layout,
        parallel=parallel,
        compute=compute,
        reference=reference,
        critic=critic,
    )
    context = run.context(plan, strategy, len(prompts), strategy)
    callbacks = run.callbacks(
        context,
        strategy,
        LossCurve(config.out, run.console, ROLLOUT_PANELS),
        unit=f"{rollout.prompts * rollout.group} answers, {strategy.steps_per_rollout} a rollout",
        samples=sample_text,
    )
    if parallel.is_main:
        callbacks.insert(0, RolloutSamples(config.out / "samples.jsonl", strategy, run.console))
    return Trainer(context, strategy, compute, callbacks)


def assemble_embedder(run: OpenRun) -> Trainer:
    """An embedder. Raises `DataError` when no pair is left to train on, or none has a negative."""
    run.load_model()
    longest = embedded_length(run.config, run.window)
    run.config = run.config.updated(embed={**run.config.embed.model_dump(), "max_length": longest})
    config, parallel = run.config, run.parallel
    if run.model.lm_head is not None:
        run.model.lm_head.requires_grad_(False)  # vectors do not depend on it
    data, held_out = _text_pairs(run)
    if len(data.passages) < 2:
        raise DataError(
            f"{config.data}: {len(data):,} pairs, and all have one passage",
            hint="a query needs the passage of another one as a negative",
        )
    per_step = config.batch_pairs or TEXT_PAIRS
    check_texts_per_step(per_step, parallel.world)
    content = fingerprint(data.queries, data.passages, data.positive, data.negatives)
    run.check_data(len(data), "pairs", content)
    strategy = EmbedStrategy(data, held_out, _layout(run, per_step), parallel, config.embed)
    plan = plan_packed(run, strategy)
    compute = apply_plan(plan, run.model, config)
    context = run.context(plan, strategy, len(data))

    def evaluate(context: TrainContext) -> dict[str, float]:
        return evaluate_retrieval(strategy, context.model, compute)

    callbacks = run.callbacks(
        context,
        strategy,
        LossCurve(config.out, run.console, RETRIEVAL_PANELS),
        evaluate if held_out.queries else None,
        unit=f"{per_step} pairs",
    )
    return Trainer(context, strategy, compute, callbacks)


def _layout(run: OpenRun, per_step: int) -> BatchLayout:
    return BatchLayout(per_step, run.window, run.rows()[1], run.tokenizer.pad_id, run.config.seed)


def plan_packed(run: OpenRun, strategy: PairStrategy | EmbedStrategy) -> Plan:
    """The plan of a strategy of packed sequences. Micro-batches have one shape while a compiled
    model is timed, and afterwards if the plan has one."""
    config, layout = run.config, strategy.layout
    if run.origin.saved is None:
        problem = compiler_problem(run.parallel.device)
        layout.one_shape = config.compile != "off" and problem is None
        if isinstance(strategy, PairStrategy):
            if layout.one_shape and config.micro_batch is None:
                strategy.fit_micro_rows()
            strategy.data.reference = torch.zeros(len(strategy.data.pairs), 2)  # as fast as real
    plan = run.plan(strategy, layout.per_step, layout.micro_rows)
    if isinstance(strategy, PairStrategy):
        strategy.data.reference = None
    layout.one_shape = plan.compiled
    return plan


def _rollout_plan(run: OpenRun, prompts: int) -> Plan:
    """A plan without calibration: most of the time of such a run goes to sampling."""
    config, rollout = run.config, run.config.rollout
    # bf16 log-probabilities differ by 1e-2, which is as much as a step moves them.
    dtype = "fp32" if config.dtype == "auto" else config.dtype
    return Plan(
        total_steps=rollout_steps(config, prompts),
        dtype=dtype,
        compiled=config.compile == "on",
        threads=torch.get_num_threads(),
        rows=rollout.prompts,
        micro_rows=run.rows()[1],
        seconds_per_step=0.0,
        reasons=[f"dtype {dtype}: ratios of probabilities need full precision"],
    )


def rollout_steps(config: TrainConfig, prompts: int) -> int:
    """Optimizer steps of a recipe of rollouts."""
    limits, rollout = [], config.rollout
    if config.max_steps is not None:
        limits.append(config.max_steps)
    if config.epochs is not None:
        rollouts = -(-round(prompts * config.epochs) // rollout.prompts)
        limits.append(max(1, rollouts) * rollout.epochs * rollout.minibatches)
    return min(limits)


def _critic(run: OpenRun, reward: RewardModel | None) -> RewardModel:
    """A trained copy of the reward model, or of the reference with a new head."""
    critic = (
        RewardModel.from_transformer(frozen_reference(run))
        if reward is None
        else copy.deepcopy(reward)
    )
    critic.requires_grad_(True).train()
    critic.gradient_checkpointing = run.config.gradient_checkpointing
    return critic


def _preference_pairs(run: OpenRun) -> tuple[PairSet, PairSet]:
    """Pairs to train on and held-out pairs; they are held out by prompt."""

    def load(paths: list[str], **options: Any) -> tuple[PairSet, PairSet, LoadReport]:
        data = load_pairs(paths, run.tokenizer, run.window, **options)
        return PairSet(data.train), PairSet(data.validation), data.report

    return _train_and_held_out(run, load)


def _text_pairs(run: OpenRun) -> tuple[TextPairs, TextPairs]:
    """Pairs to train on and held-out pairs; they are held out by passage."""
    embed = run.config.embed
    assert embed.max_length is not None
    encoder = TextEncoder(run.tokenizer, embed.max_length, embed.query_prefix, embed.passage_prefix)
    load = partial(load_text_pairs, encoder=encoder, negatives=embed.negatives)
    return _train_and_held_out(run, load)


def _train_and_held_out(
    run: OpenRun, load: Callable[..., tuple[Pairs, Pairs, LoadReport]]
) -> tuple[Pairs, Pairs]:
    """Data to train on and held-out data: that of `val`, or a part of the data."""
    config = run.config
    options = {"columns": config.columns, "allow_unread": config.allow_unread}
    fraction = 0.0 if config.val is not None else config.val_fraction
    data, held_out, report = load([config.data], val_fraction=fraction, seed=config.seed, **options)
    _print_lines(run, report.lines())
    if config.val is not None:
        held_out, _, report = load([config.val], **options)
        _print_lines(run, ["validation:", *report.lines()])
    return data, held_out


def _packing_lines(dataset: TokenDataset) -> list[str]:
    stats = dataset.stats
    lines = [
        f"{stats.documents:,} documents in {stats.windows:,} windows of {dataset.window},"
        f" {stats.fill:.1%} full"
    ]
    if stats.cut or stats.skipped_short + stats.skipped_long + stats.skipped_untrained:
        lines.append(
            f"longer than the window: {stats.cut:,} cut, {stats.skipped_long:,} skipped;"
            f" {stats.skipped_short:,} too short, {stats.skipped_untrained:,} with no label"
        )
    return lines


def _print_lines(run: OpenRun, lines: list[str]) -> None:
    for line in lines:
        run.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
