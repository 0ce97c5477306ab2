"""LoRA against its formula in float64, and the base model through it, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from torch import Tensor, nn

from khaosz.config import LORA_TARGETS, LoRAConfig
from khaosz.errors import ConfigError
from khaosz.inference.runner import Chunk, Runner
from khaosz.model import Transformer
from khaosz.model.lora import (
    Int8Linear,
    LoRALinear,
    adapter_state,
    add_lora,
    merge_lora,
    named_adapters,
    without_lora,
)

torch.set_num_threads(1)

# fp32 rounds to 6e-8 of a value; logits of size 1 to 10 pass through two layers of sums over 32 to
# 48 terms, added in another order: errors of 1e-6 are expected and 1e-5 is the line.
FP32 = 1e-5
OF_BLOCKS = LORA_TARGETS[:7]  # others are of recurrent layers
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": False},
}
BASES = ("fp32", "int8")


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every A and B: all there is to train."""
    layers = named_adapters(model).values()
    return [matrix for layer in layers for matrix in (layer.lora_A, layer.lora_B)]


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model as it was before `add_lora`, int8 matrices dequantised."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in named_adapters(model).items():
        for part in layer.state_dict():
            del state[f"{name}.{part}"]
        state[f"{name}.weight"] = layer.base.weight.detach()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()
    return state


def build(**changes: Any) -> Transformer:
    return tiny_model(0.2, **changes)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**changes: Any) -> LoRAConfig:
    return LoRAConfig.parse({"rank": 4, "alpha": 8.0, **changes})


def adapted(lora: LoRAConfig | None = None, **changes: Any) -> Transformer:
    """`build` with adapters that have been trained: B is not zero."""
    model = build(**changes)
    add_lora(model, lora or config(), generator(1))
    draw = generator(2)
    with torch.no_grad():
        for layer in named_adapters(model).values():
            layer.lora_B.normal_(0.0, 0.1, generator=draw)
    return model


def ids() -> Tensor:
    return torch.randint(0, 61, (2, 20), generator=generator(3))


def logits(model: Transformer) -> Tensor:
    return model.logits(model(ids()))


def loss(model: Transformer) -> Tensor:
    return F.cross_entropy(logits(model)[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with the signs of zeros."""
    assert a.dtype == b.dtype and a.element_size() in (2, 4)
    kind = torch.int32 if a.element_size() == 4 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


# The update


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_matches_formula(bias: bool, rslora: bool) -> None:
    draw = generator(0)
    linear = nn.Linear(24, 10, bias=bias)
    layer = LoRALinear(linear, config(alpha=6.0, rslora=rslora), generator=draw)
    with torch.no_grad():
        layer.lora_B.normal_(generator=draw)
    x = torch.randn(2, 3, 24, generator=draw)
    scale = 6.0 / 2.0 if rslora else 6.0 / 4.0  # rank 4
    wide, weight, a, b = (
        t.detach().double() for t in (x, linear.weight, layer.lora_A, layer.lora_B)
    )
    expected = wide @ weight.T + scale * (wide @ a.T @ b.T)
    if bias:
        expected += linear.bias.detach().double()
    # Sums of 24 products of size 1 in fp32.
    torch.testing.assert_close(layer(x).double(), expected, rtol=FP32, atol=FP32)


def test_initial_matrices_match_peft() -> None:
    layer = LoRALinear(nn.Linear(64, 10), config(rank=200), generator=generator(0))
    assert layer.lora_A.shape == (200, 64) and layer.lora_B.shape == (10, 200)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert not layer.lora_B.any()
    # Kaiming-uniform with a = sqrt(5): uniform within 1 / sqrt(inputs). Of 12,800 draws the
    # largest comes within a thousandth of the bound, and the deviation is the bound / sqrt(3).
    bound = 64**-0.5
    assert 0.999 * bound < layer.lora_A.max() <= bound
    assert -bound <= layer.lora_A.min() < -0.999 * bound
    assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_generator_determines_matrices_and_leaves_global_state() -> None:
    models = [build() for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        add_lora(model, config(), generator(seed))
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (adapter_state(model)["layers.1.mlp.up_proj.lora_A"] for model in models)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", VARIANTS)
def test_fresh_adapter_matches_base(family: str, dtype: torch.dtype) -> None:
    model = build(**VARIANTS[family])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        before = logits(model)
        add_lora(model, config())
        assert same_bits(logits(model), before)
    assert len(named_adapters(model)) == 2 * len(OF_BLOCKS)


@pytest.mark.parametrize("base", BASES)
def test_only_the_adapters_learn(base: str) -> None:
    model = adapted(config(base=base), qkv_bias=True, tie_word_embeddings=False)
    loss(model.train()).backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    layers = [f"layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    expected = {
        f"{layer}.{name}.lora_{matrix}"
        for layer in layers
        for name in OF_BLOCKS
        for matrix in "AB"
        if (name in ("gate_proj", "up_proj", "down_proj")) == layer.endswith("mlp")
    }
    assert learning == expected
    assert all(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    mine = {id(p) for p in lora_parameters(model)}
    assert mine == {id(p) for p in model.parameters() if p.requires_grad}
    assert mine == {id(p) for name, p in model.named_parameters() if name in expected}


def test_target_modules_select_layers() -> None:
    model = build()
    add_lora(model, config(target_modules=["v_proj", "down_proj"]))
    assert list(named_adapters(model)) == [
        "layers.0.self_attn.v_proj",
        "layers.0.mlp.down_proj",
        "layers.1.self_attn.v_proj",
        "layers.1.mlp.down_proj",
    ]
    assert not model.embed_tokens.weight.requires_grad and not model.norm.weight.requires_grad


def test_training_lowers_loss_and_keeps_base() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, config(), generator(1))
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    start = loss(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < 0.8 * start
    after = plain_state(model)
    assert after.keys() == before.keys()
    assert all(same_bits(after[name], before[name]) for name in before)


@pytest.mark.parametrize("base", BASES)
def test_gradients_match_float64(base: str) -> None:
    model = adapted(config(base=base), qkv_bias=True)
    loss(model).backward()
    wide = build(qkv_bias=True)
    wide.load_state_dict(plain_state(model))  # int8 matrices dequantised
    add_lora(wide, config())
    for name, matrix in adapter_state(wide).items():
        matrix.copy_(adapter_state(model)[name])
    wide.double()
    loss(wide).backward()
    for mine, theirs in zip(lora_parameters(model), lora_parameters(wide), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=FP32 * scale)


# Dropout


def test_dropout_is_off_in_evaluation() -> None:
    model = build()  # in evaluation mode, and so must its adapters be
    add_lora(model, config(dropout=0.5), generator(1))
    for layer in named_adapters(model).values():
        nn.init.ones_(layer.lora_B)
    first = logits(model)
    assert same_bits(logits(model), first)
    model.train()
    assert not torch.equal(logits(model), first)
    assert same_bits(logits(model.eval()), first)


def test_dropout_applies_only_to_update() -> None:
    layer = LoRALinear(nn.Linear(1000, 1, bias=False), config(rank=1, alpha=1.0, dropout=0.25))
    for matrix in (layer.lora_A, layer.lora_B):
        nn.init.ones_(matrix)
    x = torch.ones(400, 1000)
    torch.manual_seed(0)
    updates = layer.train()(x) - layer.base(x)  # of 1000 inputs a quarter is 0, the rest 4 / 3
    assert float(updates.detach().mean()) == pytest.approx(1000, abs=4)  # 18 / sqrt(400) each
    assert float(updates.detach().std()) == pytest.approx(1000**0.5 * (1 / 3) ** 0.5, rel=0.2)


def test_dropout_draws_nothing_without_lora() -> None:
    model = adapted(config(dropout=0.5)).train()
    before = torch.get_rng_state()
    with without_lora(model):
        logits(model)
    assert torch.equal(torch.get_rng_state(), before)
    logits(model)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("base", BASES)
def test_gradient_checkpointing_keeps_results(base: str) -> None:
    model = adapted(config(dropout=0.3, base=base)).train()
    result = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(0)
        loss(model).backward()
        result.append([p.grad for p in lora_parameters(model)])
    for plain, again in zip(*result, strict=True):
        assert plain is not None and again is not None and same_bits(plain, again)


# Switching off


@pytest.mark.parametrize("family", VARIANTS)
def test_without_lora_matches_base(family: str) -> None:
    base, model = build(**VARIANTS[family]), adapted(**VARIANTS[family])
    with_lora = logits(model)
    assert not torch.allclose(with_lora, logits(base), atol=0.1)
    with without_lora(model):
        assert same_bits(logits(model), logits(base))
    assert same_bits(logits(model), with_lora)


def test_without_lora_nests_and_restores_after_exceptions() -> None:
    base, model = build(), adapted()
    with_lora, plain = logits(model), logits(base)
    with without_lora(model):
        with without_lora(model):
            assert same_bits(logits(model), plain)
        assert same_bits(logits(model), plain)
        with pytest.raises(ZeroDivisionError), without_lora(model):
            _ = 1 / 0
        assert same_bits(logits(model), plain)
    assert same_bits(logits(model), with_lora)
    with pytest.raises(KeyboardInterrupt), without_lora(model):
        raise KeyboardInterrupt
    assert same_bits(logits(model), with_lora)


# Merging and reading


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", VARIANTS)
def test_merged_model_matches_adapted_model(family: str, base: str, rslora: bool) -> None:
    model = adapted(config(base=base, rslora=rslora), **VARIANTS[family])
    before, names = logits(model), list(build(**VARIANTS[family]).state_dict())
    merge_lora(model)
    torch.testing.assert_close(logits(model), before, rtol=FP32, atol=FP32)
    assert list(model.state_dict()) == names
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LoRALinear | Int8Linear) for m in model.modules())
    assert not any(module.training for module in model.modules())


def test_weight_sum_is_fp32_under_autocast() -> None:
    layer = named_adapters(adapted())["layers.0.self_attn.q_proj"]
    expected = layer.base.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    with torch.autocast("cpu", torch.bfloat16):
        result = layer.weight
    # One rounding of four products and a sum, all below 1.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=5e-7)


def test_runner_uses_adapters() -> None:
    """Rollouts read a module's weights as they are: with adapters, and without where asked."""
    base, model = build(qkv_bias=True), adapted(qkv_bias=True)
    runner, row = Runner.from_module(model), ids()[:1]

    @torch.no_grad()
    def run() -> Tensor:
        return runner.run([Chunk(row[0].tolist(), runner.new_cache(), 20)])[0]

    with torch.no_grad():
        torch.testing.assert_close(run(), model.logits(model(row))[0], rtol=FP32, atol=FP32)
        with without_lora(model):
            torch.testing.assert_close(run(), base.logits(base(row))[0], rtol=FP32, atol=FP32)


@pytest.mark.parametrize("family", VARIANTS)
def test_plain_state_matches_original_model(family: str) -> None:
    model, fresh = adapted(**VARIANTS[family]), build(**VARIANTS[family])
    expected = {name: value.clone() for name, value in fresh.state_dict().items()}
    state = plain_state(model)
    assert state.keys() == expected.keys()
    assert all(same_bits(state[name], expected[name]) for name in expected)
    assert not any(value.requires_grad for value in state.values())
    fresh.load_state_dict(state)  # strictly


def test_plain_state_of_int8_matches() -> None:
    model, fresh = adapted(config(base="int8"), qkv_bias=True), build(qkv_bias=True)
    fresh.load_state_dict(plain_state(model))
    with without_lora(model):
        torch.testing.assert_close(logits(model), logits(fresh), rtol=FP32, atol=FP32)


def test_adapter_state_shares_memory() -> None:
    model = adapted()
    state = adapter_state(model)
    assert list(state)[:2] == [
        "layers.0.self_attn.q_proj.lora_A",
        "layers.0.self_attn.q_proj.lora_B",
    ]
    assert {value.data_ptr() for value in state.values()} == {
        parameter.data_ptr() for parameter in lora_parameters(model)
    }


# An int8 base

ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda row: row,
    "zeros": lambda row: row * 0,
    "subnormal": lambda row: row * 1e-41,
    "huge": lambda row: row * 1e37,
    "outlier": lambda row: torch.cat((row[:-1], torch.full((1,), 500.0))),
    "one sign": lambda row: row.abs(),
}


def matrix_of_rows() -> nn.Linear:
    draw = generator(0)
    linear = nn.Linear(40, len(ROWS))
    with torch.no_grad():
        linear.bias.normal_(generator=draw)
        for i, change in enumerate(ROWS.values()):
            linear.weight[i] = change(torch.randn(40, generator=draw).clamp(-3, 3))
    return linear


def test_int8_is_within_half_a_step() -> None:
    linear = matrix_of_rows()
    exact = linear.weight.detach().double()
    int8 = Int8Linear(linear)
    assert int8.codes.dtype == torch.int8 and int8.scales.dtype == torch.float32
    assert int(int8.codes.min()) >= -127  # symmetric
    steps = exact.abs().amax(1, keepdim=True) / 127
    errors = (int8.weight.double() - exact).abs()
    # Half a step; the scale and the product are rounded to fp32, or to the least subnormal.
    assert bool((errors <= steps / 2 * (1 + 1e-4) + 1e-38).all())
    used = int8.codes.abs().amax(1)
    assert used.tolist() == [127, 0, 0, 127, 127, 127]  # the largest of a row is 127 steps
    x = torch.randn(9, 40, generator=generator(1))
    bound = x.double().abs().sum(1, keepdim=True) @ (steps.T / 2)
    expected = x.double() @ exact.T + linear.bias.detach().double()
    rounding = FP32 * x.double().abs() @ exact.abs().T + FP32
    assert bool(((int8(x).double() - expected).abs() <= bound * (1 + 1e-4) + rounding).all())


def test_int8_rounds_to_nearest() -> None:
    linear = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[127.0, 0.4, -0.6, -126.7]]))
    assert Int8Linear(linear).codes.tolist() == [[127, 0, -1, -127]]


def test_int8_product_and_its_gradient() -> None:
    int8 = Int8Linear(nn.Linear(12, 7)).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    expected = x.detach() @ (int8.codes.double() * int8.scales.double()).T + int8.bias
    torch.testing.assert_close(int8(x), expected)
    assert torch.autograd.gradcheck(int8, x)


def test_int8_keeps_no_dequantised_matrix() -> None:
    model = adapted(config(base="int8"))
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    int8 = [layer.base for layer in named_adapters(model).values()]
    shapes = {tuple(b.codes.shape) for b in int8 if isinstance(b, Int8Linear)}
    assert len(int8) == 14 and saved
    assert not {shape for size in saved for shape in (size, size[::-1])} & shapes
    parameters = {name for name, _ in model.named_parameters()}
    assert not any(".base." in name for name in parameters)  # buffers: no optimizer sees them


def test_int8_in_the_compute_type() -> None:
    linear = matrix_of_rows()
    with torch.no_grad():
        linear.weight[3] = 1.0  # the huge row
    int8 = Int8Linear(linear)
    x = torch.randn(9, 40, generator=generator(1), requires_grad=True)
    narrow = x.detach().bfloat16()
    expected = F.linear(narrow, int8.weight.bfloat16()) + linear.bias.bfloat16()
    assert same_bits(int8(narrow), expected)
    with torch.autocast("cpu", torch.bfloat16):
        result = int8(x)
        assert same_bits(result, expected)
    result.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    exact = int8.weight.double().sum(0).expand(9, 40)
    # bf16 keeps 8 bits; six weights of a column are added.
    torch.testing.assert_close(x.grad.double(), exact, rtol=0.02, atol=0.02)


# Types, compilation, mistakes


@pytest.mark.parametrize("base", BASES)
def test_adapters_are_on_device_of_base(base: str) -> None:
    model = build().to("meta")
    add_lora(model, config(base=base), generator(1))  # the CPU's generator on any device
    for layer in named_adapters(model).values():
        assert {p.device.type for p in (*layer.parameters(), *layer.buffers())} == {"meta"}


@pytest.mark.parametrize("base", BASES)
def test_bf16_compute_keeps_fp32_adapters(base: str) -> None:
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(config(base=base))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model(ids())
            value = F.cross_entropy(model.logits(hidden).flatten(0, 1).float(), ids().flatten())
        value.backward()
        assert all(p.dtype == torch.float32 for p in lora_parameters(model))
        result[dtype] = torch.cat(
            [p.grad.flatten() for p in lora_parameters(model) if p.grad is not None]
        )
    a, b = result.values()
    # bf16 rounds to 2^-9 of a value, some tens of times in a row.
    assert float((a - b).norm() / a.norm()) < 0.05


def test_bf16_base_returns_bf16() -> None:
    model = build().bfloat16()
    before = logits(model)
    add_lora(model, config())
    assert before.dtype == torch.bfloat16 and same_bits(logits(model), before)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))
    for layer in named_adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    changed = logits(model)
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # bf16 rounds to 2^-9, before the sum or after it.
    error = (logits(model) - changed).float().norm() / changed.float().norm()
    assert float(error.detach()) < 0.05


# Dynamo itself makes the object it warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("base", BASES)
def test_blocks_compile_in_one_graph(base: str) -> None:
    model = adapted(config(base=base)).train()
    loss(model).backward()
    expected = [p.grad for p in lora_parameters(model)]
    with without_lora(model):
        off = logits(model)
    model.zero_grad()
    model.compiled_blocks = torch.compile(model.blocks, backend="aot_eager", fullgraph=True)
    loss(model).backward()
    for parameter, grad in zip(lora_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=FP32, atol=FP32)
    with without_lora(model):
        torch.testing.assert_close(logits(model), off, rtol=FP32, atol=FP32)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["qproj"]}, "unknown module 'qproj', did you mean 'q_proj'?"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "unknown module 'lm_head', known: q_proj, k_proj",
        ),
        ({"target_modules": []}, "target_modules: .* at least 1"),
        ({"rank": 0}, "rank: .* greater than or equal to 1"),
        ({"alpha": 0.0}, "alpha: .* greater than 0"),
        ({"dropout": 1.0}, "dropout: .* less than 1"),
        ({"base": "int4"}, "base: .*'fp32', 'int8' or 'file'"),
        ({"ranks": 4}, "unknown key 'ranks'"),
    ],
)
def test_wrong_configuration_is_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", "[?]")):
        config(**changes)


def test_defaults() -> None:
    assert LoRAConfig().target_modules == LORA_TARGETS
    assert config(target_modules=["v_proj", "q_proj", "v_proj"]).target_modules == (
        "v_proj",
        "q_proj",
    )


def test_misuse_fails_loudly() -> None:
    plain, model = build(), adapted()
    for call in (merge_lora, adapter_state):
        with pytest.raises(AssertionError, match="no adapters"):
            call(plain)
    with pytest.raises(AssertionError, match="no adapters"), without_lora(plain):
        pass
    with pytest.raises(AssertionError, match="already"):
        add_lora(model, config())
    with pytest.raises(AssertionError, match="within without_lora"), without_lora(model):
        merge_lora(model)
