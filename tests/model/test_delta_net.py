"""Gated DeltaNet against the recurrence of its paper, one position after the other in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from khaosz.config.model_config import DELTA_NET
from khaosz.model import Transformer
from khaosz.model.delta_net import Inputs, delta_rule, delta_step
from khaosz.model.transformer import parameter_shapes

# Sums of at most 150 terms of size 1 in fp32, solved for in chunks.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
LENGTH = 150  # two chunks and a part of one


def inputs(length: int = LENGTH, seed: int = 0) -> tuple[Inputs, Tensor]:
    """Two rows, three heads; and a state before them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, generator=generator)

    queries, keys = (torch.nn.functional.normalize(normal(length, 8), dim=-1) for _ in "qk")
    decay = -normal(length).exp() * 0.1
    each = Inputs(queries, keys, normal(length, 5), decay, normal(length).sigmoid())
    return each, normal(8, 5)


def reference(each: Inputs, memory: Tensor) -> tuple[Tensor, Tensor]:
    queries, keys, values, log_decay, strength = (x.double() for x in each)
    memory, read = memory.double(), []
    for t in range(queries.shape[2]):
        memory = memory * log_decay[:, :, t, None, None].exp()
        key = keys[:, :, t, :, None]
        change = values[:, :, t, None] - key.mT @ memory
        memory = memory + key @ (strength[:, :, t, None, None] * change)
        read.append((queries[:, :, t, None] @ memory)[:, :, 0])
    return torch.stack(read, dim=2).float(), memory.float()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, LENGTH])
def test_chunks_equal_the_recurrence(length: int) -> None:
    each, memory = inputs(length)
    read, after = delta_rule(each, memory)
    expected, last = reference(each, memory)
    torch.testing.assert_close(read, expected, **CLOSE)
    torch.testing.assert_close(after, last, **CLOSE)


@torch.no_grad()
def test_steps_equal_the_recurrence() -> None:
    each, memory = inputs()
    expected, last = reference(each, memory)
    for t in range(LENGTH):
        step = Inputs(*(x[:, :, t, None].transpose(1, 2) for x in each))
        read = delta_step(step, memory)[:, 0]
        torch.testing.assert_close(read, expected[:, :, t], **CLOSE)
    torch.testing.assert_close(memory, last, **CLOSE)


def test_documents_are_apart() -> None:
    """Bounds within chunks, at them, and documents shorter than the convolution."""
    each, _ = inputs()
    zeros = torch.zeros(2, 3, 8, 5)
    bounds = [0, 1, 3, 40, 64, 70, 140, LENGTH]
    lengths = torch.tensor(bounds).diff()
    documents = torch.arange(len(lengths)).repeat_interleave(lengths).expand(2, -1)
    read, after = delta_rule(each, zeros, documents)
    for start, end in pairwise(bounds):
        part = Inputs(*(x[:, :, start:end] for x in each))
        expected, last = reference(part, zeros)
        torch.testing.assert_close(read[:, :, start:end], expected, **CLOSE)
    torch.testing.assert_close(after, last, **CLOSE)


def test_gradients_equal_those_of_the_recurrence() -> None:
    each, memory = inputs()

    def gradients(compute: Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*each, memory)]
        read, after = compute(Inputs(*leaves[:5]), leaves[5])
        (read.square().sum() + after.square().sum()).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    pairs = zip(gradients(delta_rule), gradients(reference), strict=True)
    for ours, theirs in pairs:
        # Sums over all positions.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def model(**changes: object) -> Transformer:
    shape = dict(zip(DELTA_NET, (2, 4, 8, 6, 4), strict=True))
    types = ("linear_attention", "full_attention")
    return tiny_model(std=0.2, layer_types=types, attn_output_gate=True, **shape, **changes)


def test_parameters_have_the_shapes_that_are_said() -> None:
    ours = model()
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert list(shapes.items()) == list(parameter_shapes(ours.config).items())
    assert ours.config.parameters() == sum(p.numel() for p in ours.parameters())


def test_packed_documents_share_nothing() -> None:
    """Another first document changes no bit of the second: outputs, nor gradients of them."""
    ours = model().train()
    ids = torch.randint(0, 61, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    # An id that comes again, with another document between, is another one too.
    doc_ids = torch.tensor([7] * 70 + [3] * 2 + [7] * (LENGTH - 72))[None]
    other = ids.clone()
    other[:, :70] = 5
    outputs = []
    for row in (ids, other):
        ours.zero_grad()
        hidden = ours(row, doc_ids=doc_ids)[:, 70:72]
        hidden.square().sum().backward()
        norm = ours.layers[0].get_parameter("linear_attn.conv1d.weight").grad
        assert norm is not None
        outputs.append((hidden.detach(), norm.clone()))
    for one, two in zip(*outputs, strict=True):
        assert torch.equal(one, two)


# Behind down_proj, which is zero.
_ZERO = "gate_proj.weight", "up_proj.weight", "post_attention_layernorm.weight"


def test_new_model_trains() -> None:
    """Every parameter gets a gradient once blocks write to the residual stream."""
    fresh = model()
    fresh.initialise(torch.Generator().manual_seed(0))
    part = fresh.layers[0].get_submodule("linear_attn")
    assert not part.get_parameter("out_proj.weight").any()
    assert part.get_parameter("A_log").exp().max() <= 16 and part.get_parameter("dt_bias").all()
    assert part.get_parameter("conv1d.weight").abs().max() > 0.1
    with torch.no_grad():
        for name in ("layers.0.linear_attn.out_proj", "layers.1.self_attn.o_proj"):
            fresh.get_submodule(name).get_parameter("weight").normal_(0.0, 0.1)
    fresh.logits(fresh(torch.arange(40)[None])).square().sum().backward()
    for name, parameter in fresh.named_parameters():
        if not name.endswith(_ZERO):
            assert parameter.grad is not None and parameter.grad.any(), name
