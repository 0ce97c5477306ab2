"""Keys that a recipe gives in vain: those of other stages, and those that another key disables.

They are errors, since the run would differ from what its recipe says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from khaosz.config.stages import ROLLOUT_STAGES, TABLES, TEXT_STAGES, stages_of
from khaosz.config.train_config import TrainConfig

_BATCH = {  # the key that sets the size of a step
    **dict.fromkeys(TEXT_STAGES, "batch_tokens"),
    **dict.fromkeys(("rm", "dpo", "embed"), "batch_pairs"),
    **dict.fromkeys(ROLLOUT_STAGES, "rollout.prompts"),
}


@dataclass(frozen=True)
class Ineffective:
    """A key without effect. `reason` completes "KEY has no effect"; `cause` is the other key that
    disables it, if one does; `table` the key's, if all of it is without effect."""

    key: str
    reason: str
    cause: str | None = None
    hint: str | None = None
    table: str | None = None

    @property
    def shown(self) -> str:
        return self.table or self.key


def ineffective(config: TrainConfig, given: set[str]) -> Iterator[Ineffective]:
    """Those of the `given` keys, written as in `STAGES_OF`, that change nothing in this stage."""
    stage = config.stage
    disabled = [each for each in _disabled(config) if each.key in given]
    for key in sorted(given):
        stages = stages_of(key)
        if stages and stage not in stages:
            *most, last = stages
            only = f"{', '.join(most)} and {last}" if most else last
            hint = f"did you mean {_BATCH[stage]}?" if key.startswith("batch_") else None
            if key == "max_minutes":
                hint = "set max_steps or epochs"
            table = key.partition(".")[0]
            whole = table in TABLES and stage not in stages_of(table)
            reason = f"in stage {stage}: it is for {only}"
            yield Ineffective(key, reason, hint=hint, table=f"[{table}]" if whole else None)
        else:
            yield from (each for each in disabled if each.key == key)


def _disabled(config: TrainConfig) -> Iterator[Ineffective]:
    """What the values of other keys disable."""

    def without(keys: str, reason: str, cause: str) -> Iterator[Ineffective]:
        for key in keys.split():
            yield Ineffective(key, reason, cause)

    stage, schedule, rollout = config.stage, config.schedule, config.rollout
    if config.init_from is not None:
        reason = "with init_from: the model has its size and its tokenizer"
        yield from without("size vocab_size", reason, "init_from")
    elif config.tokenizer is not None:
        yield from without("vocab_size", "with tokenizer: it has its vocabulary", "tokenizer")
    if config.val is not None and config.val_fraction and stage not in TEXT_STAGES:
        yield from without("val_fraction", "with val, which holds the held-out data", "val")
    if not config.validates and stage not in ROLLOUT_STAGES:
        reason = "without held-out data: set val or val_fraction"
        yield Ineffective("early_stop", reason)  # not even an override disables it in silence
        yield from without("eval_tokens", reason, "val_fraction")
    samples = bool(config.prompts) and stage in stages_of("prompts")
    if not config.validates and (not samples or config.sample_every is not None):
        yield from without("eval_every", "without held-out data", "val_fraction")
    if not samples:
        yield from without("sample_every", "without prompts", "prompts")
    unused = {
        "constant": "decay_fraction min_ratio cycles cycle_growth",
        "cosine": "decay_fraction cycles cycle_growth",
        "wsd": "cycles cycle_growth",
        "sgdr": "decay_fraction",
    }[schedule.name].split()
    keys = " ".join(f"schedule.{key}" for key in unused)
    yield from without(keys, f"with schedule.name={schedule.name}", "schedule.name")
    if schedule.warmup_steps is not None:
        cause = "schedule.warmup_steps"
        yield from without("schedule.warmup_fraction", f"with {cause}", cause)
    if config.max_minutes is None:
        yield from without("min_steps", "without max_minutes, which it limits", "max_minutes")
    if config.lora is not None:
        if config.optimizer == "muon":
            yield from without("optimizer", "with [lora]: adapters are trained with AdamW", "lora")
        if config.lr is not None and stage not in ("rm", "ppo"):
            yield from without("embedding_lr", "with [lora]: embeddings are frozen", "lora")
    if not config.preference.needs_reference and stage == "dpo":
        reason = f"with preference.loss={config.preference.loss}, which has no reference"
        yield from without("reference", reason, "preference.loss")
    if config.preference.loss != "simpo":
        reason = f"with preference.loss={config.preference.loss}, only with simpo"
        yield from without("preference.gamma", reason, "preference.loss")
    if not rollout.kl:
        yield from without("rollout.kl_target rollout.kl_loss", "with rollout.kl=0", "rollout.kl")
    if rollout.kl_target is None:
        reason = "without rollout.kl_target"
        yield from without("rollout.kl_horizon", reason, "rollout.kl_target")
