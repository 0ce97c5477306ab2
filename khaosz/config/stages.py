"""The stages, and in which of them each key of a recipe has an effect."""

from __future__ import annotations

from typing import Literal

Stage = Literal["pt", "sft", "rm", "dpo", "ppo", "grpo", "embed"]
Stages = tuple[str, ...]

STAGES: Stages = ("pt", "sft", "rm", "dpo", "ppo", "grpo", "embed")
TEXT_STAGES: Stages = ("pt", "sft")
PAIR_STAGES: Stages = ("rm", "dpo")
ROLLOUT_STAGES: Stages = ("ppo", "grpo")

_VALIDATED: Stages = (*TEXT_STAGES, *PAIR_STAGES, "embed")
_WRITING: Stages = (*TEXT_STAGES, "dpo", *ROLLOUT_STAGES)  # their models write text


def _keys(stages: Stages, text: str) -> dict[str, Stages]:
    return dict.fromkeys(text.split(), stages)


STAGES_OF: dict[str, Stages] = {
    **_keys(
        STAGES,
        "stage data out tokenizer init_from seed size model vocab_size window max_steps epochs"
        " micro_batch optimizer lr embedding_lr betas weight_decay grad_clip"
        " schedule.name schedule.warmup_steps schedule.warmup_fraction schedule.decay_fraction"
        " schedule.min_ratio schedule.cycles schedule.cycle_growth"
        " parallel.device parallel.backend parallel.threads dtype compile gradient_checkpointing"
        " lora.rank lora.alpha lora.dropout lora.target_modules lora.rslora lora.base"
        " columns.text columns.messages columns.prompt columns.response columns.system"
        " columns.tools columns.chosen columns.rejected columns.label columns.score columns.query"
        " columns.positive columns.negative columns.role columns.content columns.roles allow_unread"
        " memory_check log_every eval_every save_every save_minutes keep loggers",
    ),
    **_keys(_VALIDATED, "val val_fraction early_stop max_minutes min_steps"),
    **_keys(TEXT_STAGES, "batch_tokens mix dedup eval_tokens"),
    **_keys(_WRITING, "loss_chunk prompts sample_every"),
    **_keys((*PAIR_STAGES, "embed"), "batch_pairs"),
    **_keys(("rm",), "reward.use_margins reward.centre"),
    **_keys(
        ("dpo",),
        "preference.loss preference.beta preference.label_smoothing preference.gamma"
        " preference.length_normalised preference.sft_weight",
    ),
    **_keys(("dpo", *ROLLOUT_STAGES), "reference"),
    **_keys(
        ROLLOUT_STAGES,
        "reward_model reward_function rollout.prompts rollout.group rollout.max_new_tokens"
        " rollout.temperature rollout.epochs rollout.minibatches rollout.clip rollout.entropy"
        " rollout.kl rollout.kl_target rollout.kl_horizon rollout.missing_end_penalty",
    ),
    **_keys(
        ("ppo",),
        "rollout.value_clip rollout.value_weight rollout.gamma rollout.lam rollout.whiten",
    ),
    **_keys(("grpo",), "rollout.kl_loss rollout.scale_by_std"),
    **_keys(
        ("embed",),
        "embed.pooling embed.temperature embed.symmetric embed.query_prefix embed.passage_prefix"
        " embed.max_length embed.negatives",
    ),
}
"""Keys of tables as `table.key`; `model` and `mix` are one key each."""

TABLES = tuple(dict.fromkeys(key.partition(".")[0] for key in STAGES_OF if "." in key))


def stages_of(key: str) -> Stages:
    """The stages in which a key has an effect; those of a table are those of its keys."""
    inner = [stages for name, stages in STAGES_OF.items() if name.startswith(f"{key}.")]
    return STAGES_OF.get(key) or tuple(s for s in STAGES if any(s in each for each in inner))
