"""Recipe keys of alignment: LoRA, reward models, preference losses, rollouts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from khaosz.config.closed import MOST_TOKENS, Closed
from khaosz.errors import did_you_mean

LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    # Of recurrent layers.
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj", "out_proj",
)  # fmt: skip
# Of every expert; only if named, as in PEFT: adapters of all experts are many.
EXPERT_TARGETS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")


class LoRAConfig(Closed):
    """Low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685).

    `rslora` scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732) rather than
    alpha / rank. `base`: the frozen weights during training. `int8` rounds them to 8 bits; `file`
    keeps them as the model's files store them, in a .gguf at its 2 to 8 bits (QLoRA, Dettmers et
    al. 2023, arXiv:2305.14314), and checkpoints have the adapter alone.
    """

    rank: int = Field(default=16, ge=1, le=65_536)
    alpha: float = Field(default=32.0, gt=0, le=1e6)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(default=LORA_TARGETS, min_length=1)
    rslora: bool = False
    base: Literal["fp32", "int8", "file"] = "fp32"

    @field_validator("target_modules")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = (*LORA_TARGETS, *EXPERT_TARGETS)
        for name in value:
            if name not in known:
                hint = did_you_mean(name, known, f"known: {', '.join(known)}")
                raise ValueError(f"unknown module {name!r}, {hint}")
        return tuple(dict.fromkeys(value))


class RewardConfig(Closed):
    """The reward model's loss: -log sigma(r_chosen - r_rejected - margin), Bradley-Terry.

    With `use_margins`, `margin` comes from records that have one (Llama 2, Touvron et al. 2023,
    arXiv:2307.09288). `centre` weights (r_chosen + r_rejected)^2, which keeps rewards around zero
    (Eisenstein et al. 2023, arXiv:2312.09244).
    """

    use_margins: bool = True
    centre: float = Field(default=0.0, ge=0, le=1e4)


class PreferenceConfig(Closed):
    """The loss of a preference pair. With d = log-ratio of chosen - log-ratio of rejected:

    sigmoid  -log sigma(beta d)  (Rafailov et al. 2023, arXiv:2305.18290); with `label_smoothing`
             e: -(1 - e) log sigma(beta d) - e log sigma(-beta d)  (cDPO, Mitchell 2023)
    robust   the unbiased form of the same noise model  (Chowdhury et al. 2024, arXiv:2403.00409)
    ipo      (d - 1 / (2 beta))^2  (Azar et al. 2023, arXiv:2310.12036)
    hinge    max(0, 1 - beta d)  (SLiC, Zhao et al. 2023, arXiv:2305.10425)
    simpo    -log sigma(beta (mean log p_chosen - mean log p_rejected) - gamma), no reference
             (Meng et al. 2024, arXiv:2405.14734)
    orpo     -mean log p_chosen - beta log sigma(log-odds difference), no reference
             (Hong et al. 2024, arXiv:2403.07691)

    `length_normalised` divides log-ratios by the answer's number of tokens. `sft_weight` weights an
    additional -mean log p_chosen, which keeps the chosen answer likely (RPO, Pang et al. 2024,
    arXiv:2404.19733).
    """

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo"] = "sigmoid"
    beta: float = Field(default=0.1, ge=1e-6, le=1e4)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    gamma: float = Field(default=0.5, ge=0, le=1e4)
    length_normalised: bool = False
    sft_weight: float = Field(default=0.0, ge=0, le=1e4)

    @model_validator(mode="after")
    def _check_unused(self) -> PreferenceConfig:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "simpo"):
            raise ValueError(f"label_smoothing has no effect with loss={self.loss}")
        if self.gamma != 0.5 and self.loss != "simpo":
            raise ValueError(f"gamma has no effect with loss={self.loss}, only with simpo")
        if self.length_normalised and self.loss in ("simpo", "orpo"):
            raise ValueError(f"{self.loss} is already length-normalised")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo")


class RolloutConfig(Closed):
    """PPO and GRPO: sampling, rewards and losses.

    Each rollout samples `group` answers to each of `prompts` prompts, then trains `epochs` passes
    over them, each in `minibatches` optimizer steps.
    """

    prompts: int = Field(default=16, ge=1, le=2**20, description="prompts per rollout, all ranks")
    group: int = Field(
        default=1, ge=1, le=2**16, description="answers per prompt; 4 or more for GRPO"
    )
    max_new_tokens: int = Field(default=64, ge=1, le=MOST_TOKENS)
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    epochs: int = Field(default=2, ge=1, le=10_000)
    minibatches: int = Field(default=2, ge=1, le=2**20)

    clip: float = Field(
        default=0.2, gt=0, lt=1, description="of the probability ratio, on both sides"
    )
    value_clip: float = Field(default=0.2, gt=0, le=1e6)
    value_weight: float = Field(default=0.5, gt=0, le=1e4)
    entropy: float = Field(default=0.0, ge=0, le=1e4, description="weight of the entropy bonus")
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    whiten: bool = True

    kl: float = Field(default=0.05, ge=0, le=1e4, description="weight of the KL penalty")
    kl_target: float | None = Field(
        default=None, gt=0, le=1e6, description="adapt `kl` towards this"
    )
    kl_horizon: float = Field(
        default=2_000.0, ge=1, le=1e12, description="answers until `kl` has adapted"
    )
    missing_end_penalty: float = Field(
        default=0.0, ge=0, le=1e6, description="subtracted for an unfinished answer"
    )
    kl_loss: Literal["k2", "k3"] = Field(default="k3", description="GRPO's KL term")
    scale_by_std: bool = Field(default=True, description="GRPO; False: Dr. GRPO")

    @model_validator(mode="after")
    def _check_minibatches(self) -> RolloutConfig:
        answers = self.prompts * self.group
        if self.minibatches > answers:
            raise ValueError(
                f"minibatches={self.minibatches} is more than the {answers} answers of a rollout"
                " (prompts * group)"
            )
        return self
