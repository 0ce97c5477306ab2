"""The network against a plain float64 reference, and its fast paths against its slow ones."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import SHAPE, tiny_model
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.inference.runner import Chunk, Runner
from khaosz.model import Transformer
from khaosz.model.kv_cache import SequenceCache
from khaosz.model.part import RMSNorm
from khaosz.model.rotary import rotary_frequencies

torch.set_num_threads(1)

Array = NDArray[np.float64]

# fp32 rounds to 6e-8 of a value; logits of size about 1 pass through two layers of sums over 32 to
# 48 terms each, so errors of 1e-6 are expected and 1e-5 is the line.
FP32 = 1e-5

LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "untied": {"tie_word_embeddings": False},
    "theta": {"rope_theta": 500.0},
    "eps": {"rms_norm_eps": 0.1},
    "linear": {"rope_scaling": LINEAR},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn plain ramp": {
        "rope_scaling": {**YARN, "truncate": False, "beta_fast": 4.0, "attention_factor": 0.7}
    },
}


def build(seed: int = 0, **changes: Any) -> Transformer:
    return tiny_model(0.2, seed, **changes)


def random_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=generator)


# ------------------------------------------------------- the reference: numpy, float64, by the book


def reference_frequencies(config: ModelConfig) -> tuple[Array, float]:
    """Angle per position of each pair, one pair at a time, from the papers' formulas."""
    width, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    base = np.array([theta ** (-2 * i / width) for i in range(width // 2)])
    if scaling is None:
        return base, 1.0
    if scaling.rope_type == "linear":
        return base / scaling.factor, 1.0
    original = scaling.original_max_position_embeddings
    assert original is not None
    scaled = []
    if scaling.rope_type == "llama3":
        for frequency in base:
            wavelength = 2 * math.pi / frequency
            if wavelength < original / scaling.high_freq_factor:
                scaled.append(frequency)
            elif wavelength > original / scaling.low_freq_factor:
                scaled.append(frequency / scaling.factor)
            else:
                smooth = (original / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
        return np.array(scaled), 1.0

    def pair_that_turns(times: float) -> float:  # YaRN, equation 17 solved for the pair's index
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    for i, frequency in enumerate(base):
        stretched = min(1.0, max(0.0, (i - first) / (last - first)))
        scaled.append(frequency / scaling.factor * stretched + frequency * (1 - stretched))
    temperature = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return np.array(scaled), temperature


def reference_logits(
    model: Transformer, ids: list[int], positions: list[int] | None = None
) -> Array:
    """Logits (T, V) of one document, position by position and head by head."""
    config = model.config
    w = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    frequencies, temperature = reference_frequencies(config)
    places = positions or list(range(len(ids)))

    def norm(x: Array, weight: Array) -> Array:
        return np.asarray(x / math.sqrt(float(np.mean(x * x)) + config.rms_norm_eps) * weight)

    def turn(x: Array, position: int) -> Array:
        half, out = len(x) // 2, np.empty_like(x)
        for i in range(half):
            cos, sin = math.cos(position * frequencies[i]), math.sin(position * frequencies[i])
            out[i] = (x[i] * cos - x[i + half] * sin) * temperature
            out[i + half] = (x[i + half] * cos + x[i] * sin) * temperature
        return out

    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    xs = [w["embed_tokens.weight"][i] for i in ids]
    for n in range(config.num_hidden_layers):
        p = f"layers.{n}."

        def project(name: str, x: Array, p: str = p) -> Array:
            y = w[f"{p}self_attn.{name}.weight"] @ x
            bias = w.get(f"{p}self_attn.{name}.bias")
            return np.asarray((y if bias is None else y + bias).reshape(-1, width))

        queries, keys, values = [], [], []
        for x, place in zip(xs, places, strict=True):
            normed = norm(x, w[p + "input_layernorm.weight"])
            q, k = project("q_proj", normed), project("k_proj", normed)
            if config.qk_norm:
                q = np.stack([norm(head, w[p + "self_attn.q_norm.weight"]) for head in q])
                k = np.stack([norm(head, w[p + "self_attn.k_norm.weight"]) for head in k])
            queries.append([turn(head, place) for head in q])
            keys.append([turn(head, place) for head in k])
            values.append(project("v_proj", normed))
        for t in range(len(xs)):
            heads = []
            for h in range(config.num_attention_heads):
                scores = [
                    queries[t][h] @ keys[s][h // group] / math.sqrt(width) for s in range(t + 1)
                ]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                heads.append(sum(weights[s] * values[s][h // group] for s in range(t + 1)))
            xs[t] = xs[t] + w[p + "self_attn.o_proj.weight"] @ np.concatenate(heads)
        for t, x in enumerate(xs):
            normed = norm(x, w[p + "post_attention_layernorm.weight"])
            gate = w[p + "mlp.gate_proj.weight"] @ normed
            swish = gate / (1 + np.exp(-gate)) * (w[p + "mlp.up_proj.weight"] @ normed)
            xs[t] = x + w[p + "mlp.down_proj.weight"] @ swish
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return np.stack([head @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_reference(variant: str) -> None:
    model = build(**VARIANTS[variant])
    ids = random_ids(2, 40)
    with torch.no_grad():
        logits = model.logits(model(ids)).numpy()
    for row in range(2):
        expected = reference_logits(model, ids[row].tolist())
        # Relative to the largest logit, because fp32 rounds relative to the terms it sums.
        error = np.abs(logits[row] - expected).max() / max(1.0, np.abs(expected).max())
        assert error < FP32


def test_explicit_positions_match_reference() -> None:
    model = build(qk_norm=True)
    ids = random_ids(1, 5)
    positions = [3, 4, 9, 10, 90]
    with torch.no_grad():
        logits = model.logits(model(ids, positions=torch.tensor([positions])))[0].numpy()
    expected = reference_logits(model, ids[0].tolist(), positions)
    assert np.abs(logits - expected).max() / max(1.0, np.abs(expected).max()) < FP32


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_match_papers(variant: str) -> None:
    config = ModelConfig.parse({**SHAPE, **VARIANTS[variant]})
    frequencies, amplitude = rotary_frequencies(config)
    expected, temperature = reference_frequencies(config)
    np.testing.assert_allclose(frequencies.numpy(), expected, rtol=1e-6)  # fp32 powers
    assert amplitude == pytest.approx(temperature, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500.0},
        {"rope_scaling": LINEAR},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": YARN},
        {"rms_norm_eps": 0.1},
    ],
)
def test_no_setting_is_accepted_and_ignored(changes: dict[str, Any]) -> None:
    plain, changed = build(), build(**changes)
    changed.load_state_dict(plain.state_dict())
    ids = random_ids(1, 40)
    with torch.no_grad():
        assert (plain(ids) - changed(ids)).abs().max() > 1e-3


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))
    # mean of squares (9 + 16) / 2 = 12.5, plus 0.5 = 13
    expected = [2 * 3 / math.sqrt(13), -4 / math.sqrt(13)]
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx(expected, rel=1e-6)


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    norm = RMSNorm(64, eps=1e-6)
    x = torch.full((64,), 1.0)
    x[0] = 300.0  # 300 squared and 63 ones: bf16 cannot add them
    narrow = norm(x.bfloat16())
    assert torch.equal(narrow, norm(x).bfloat16().to(narrow.dtype))


# ---------------------------------------------- the engine's caches: the same blocks, in chunks


def run_chunks(
    model: Transformer, ids: Tensor, cuts: list[int], **settings: Any
) -> tuple[Tensor, list[SequenceCache]]:
    """Hidden states (B, T, D) by a runner, all rows in every pass, and the rows' caches."""
    runner = Runner.from_module(model, **settings)
    caches = [runner.new_cache() for _ in ids]
    parts = [
        torch.stack(
            runner.hidden([Chunk(row[a:b].tolist(), c) for row, c in zip(ids, caches, strict=True)])
        )
        for a, b in pairwise([0, *cuts, ids.shape[1]])
    ]
    return torch.cat(parts, dim=1), caches


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 9, 30], list(range(1, 40))])
def test_cached_chunks_match_training_forward(
    variant: str, cuts: list[int], deterministic: bool
) -> None:
    model = build(**VARIANTS[variant])
    ids = random_ids(2, 40)
    with torch.no_grad():
        whole = model(ids)
    cached, caches = run_chunks(model, ids, cuts, deterministic=deterministic)
    assert [cache.length for cache in caches] == [40, 40]
    # Matrix products of other shapes sum in another order: fp32 rounding, no more.
    torch.testing.assert_close(cached, whole, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_is_bitwise_the_training_forward(variant: str) -> None:
    """One network: the same operations on the same shapes."""
    model = build(**VARIANTS[variant])
    ids = random_ids(1, 40)
    with torch.no_grad():
        assert torch.equal(run_chunks(model, ids, [])[0], model(ids))


def test_cache_grows_past_first_allocation() -> None:
    model = build(max_position_embeddings=1024)
    ids = random_ids(1, 700)
    with torch.no_grad():
        whole = model(ids)
    cached, _ = run_chunks(model, ids, [200, 201, 500, 600])
    torch.testing.assert_close(cached, whole, rtol=FP32, atol=FP32)


def test_truncated_cache_drops_positions() -> None:
    model = build()
    ids, other = random_ids(1, 30), random_ids(1, 10, seed=9)
    _, [cache] = run_chunks(model, ids, [])
    cache.truncate(20)
    again = Runner.from_module(model).hidden([Chunk(other[0].tolist(), cache)])[0]
    with torch.no_grad():
        whole = model(torch.cat((ids[:, :20], other), dim=1))[0, 20:]
    assert cache.length == 30
    torch.testing.assert_close(again, whole, rtol=FP32, atol=FP32)
    with pytest.raises(AssertionError):
        cache.truncate(31)


def test_attention_is_causal() -> None:
    model = build(qk_norm=True)
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[0, :12], after[0, :12])
    assert not torch.equal(before[0, 12], after[0, 12])


# ----------------------------------------------------------------------------- gradients and start


def gradients(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model.logits(model(ids[:, :-1]))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    result = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in result.values())
    return {name: grad.clone() for name, grad in result.items() if grad is not None}


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "untied"])
def test_gradient_checkpointing_gives_equal_gradients(variant: str) -> None:
    model = build(**VARIANTS[variant]).train()
    ids = random_ids(2, 16)
    plain = gradients(model, ids)
    model.gradient_checkpointing = True
    saved = gradients(model, ids)
    for name, grad in plain.items():
        assert torch.equal(grad, saved[name]), name  # the same operations twice: bitwise


def test_gradients_match_finite_differences() -> None:
    model = build(qk_norm=True).train()
    ids = random_ids(1, 9)
    analytic = gradients(model, ids)

    def loss() -> float:
        logits = reference_logits(model, ids[0, :-1].tolist())
        log_sum = np.log(np.exp(logits).sum(-1))
        return float(np.mean(log_sum - logits[np.arange(8), ids[0, 1:].numpy()]))

    step = 2**-8  # exact in fp32, so the reference sees just this change
    for name, parameter in model.named_parameters():
        flat, at = parameter.data.view(-1), parameter.numel() // 2
        before = flat[at].item()
        flat[at] = before + step
        above, high = flat[at].item(), loss()
        flat[at] = before - step
        below, low = flat[at].item(), loss()
        flat[at] = before
        estimate = (high - low) / (above - below)
        # Central differences err by step squared times the third derivative: about 1e-5 here.
        assert analytic[name].view(-1)[at].item() == pytest.approx(estimate, abs=2e-4, rel=2e-3), (
            name
        )


def fresh(seed: int, **changes: Any) -> Transformer:
    model = Transformer(ModelConfig.parse({**SHAPE, **changes}))
    model.initialise(torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "untied"])
def test_seed_determines_every_parameter(variant: str) -> None:
    one, same, other = (fresh(seed, **VARIANTS[variant]) for seed in (5, 5, 6))
    for (name, p), q in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "untied"])
def test_fresh_block_is_identity(variant: str) -> None:
    model = fresh(0, **VARIANTS[variant])
    ids = random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids), model.norm(model.embed_tokens(ids)))


def test_fresh_untied_model_has_zero_logits() -> None:
    model = fresh(0, tie_word_embeddings=False)
    with torch.no_grad():
        assert not model.logits(model(random_ids(1, 4))).any()


def test_fresh_model_has_configured_standard_deviation() -> None:
    model = fresh(0, vocab_size=4096, initializer_range=0.5)
    # 131,072 draws: their deviation is within 1% of the true one by five standard errors.
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.5, rel=0.01)
    bound = SHAPE["hidden_size"] ** -0.5
    layer = model.get_submodule("layers.0.self_attn.q_proj")
    assert isinstance(layer.weight, Tensor)
    assert bound * 0.95 < layer.weight.abs().max().item() <= bound


def test_head_is_tied_or_separate() -> None:
    tied, untied = build(), build(tie_word_embeddings=False)
    assert tied.lm_head is None and tied.output_weight is tied.embed_tokens.weight
    assert untied.lm_head is not None and untied.output_weight is untied.lm_head.weight
