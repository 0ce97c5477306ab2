"""Structured output: what comes out parses, whatever the weights say; costly forms are refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from tiny_models import bytewise, random_model, tokenizer

from khaosz.errors import GenerationError
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams

pytest.importorskip("llguidance")
torch.set_num_threads(1)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["人", "cat"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def generator(seed: int = 0) -> Generator:
    return Generator(
        random_model(tokenizer().vocab_size, seed, max_position_embeddings=512), tokenizer()
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_weights_generate_json(seed: int, temperature: float) -> None:
    params = SamplingParams(
        max_tokens=480, temperature=temperature, seed=seed, json_schema=json.dumps(SCHEMA)
    )
    # Room for 32 characters in each of 13 places for white space, and for what is to be said.
    completion = generator(seed).generate("x", params)
    assert completion.finish_reason == "stop"
    output = json.loads(completion.text)
    assert output.keys() == {"name", "age", "kind"}
    assert len(output["name"]) <= 4 and 0 <= output["age"] <= 99 and output["kind"] in ("人", "cat")


def test_text_like_a_special_token_is_plain_text() -> None:
    params = SamplingParams(
        max_tokens=40,
        temperature=0.0,
        regex=r"<\|user\|>!",
        logit_bias={tokenizer().special_ids["<|user|>"]: 100.0},
    )
    completion = generator().generate("x", params)
    assert completion.text == "<|user|>!" and completion.tokens > 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("by", [tokenizer, bytewise])
def test_random_weights_match_an_expression(seed: int, by: Any) -> None:
    """Also where a character takes several tokens."""
    pattern = r"(春|眠){2}-[0-9]{3}"
    model = random_model(by().vocab_size, seed)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, regex=pattern)
    completion = Generator(model, by()).generate([1, 2, 3], params)
    assert completion.finish_reason == "stop"
    assert re.fullmatch(pattern, completion.text)


def test_every_choice_has_its_own_grammar_state() -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=1, n=4, regex="[a-z]{3}[0-9]")
    texts = [c.text for c in generator().generate_batch(["x"], params)]
    assert all(re.fullmatch("[a-z]{3}[0-9]", text) for text in texts) and len(set(texts)) > 1


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "[" * 30_000}, "not JSON|cannot be used"),
        ({"json_schema": '{"type": "nonsense"}'}, "cannot be used"),
        ({"json_schema": '{"$ref": "http://example.com/x"}'}, "cannot be used"),
        ({"json_schema": '"' + "x" * 70_000 + '"'}, "70,002 characters"),
        ({"json_schema": '{"items":' * 900 + "{}" + "}" * 900}, "cannot be used"),
        ({"json_schema": '{"const": NaN}'}, "cannot be used"),
        ({"json_schema": "true"}, "not an object"),
        ({"json_schema": '{"$ref": "#"}'}, "no finite value"),
        ({"regex": "\ud800"}, "not text"),
        ({"regex": "((("}, "cannot be used"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unusable_constraints_are_rejected(form: dict[str, str], message: str) -> None:
    engine = generator().engine
    with pytest.raises(GenerationError, match=message) as caught:
        engine.add([1], SamplingParams(max_tokens=5, **form))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not engine.unfinished


def test_late_grammar_failure_ends_only_its_request() -> None:
    """Refused tokens stand for whatever llguidance may meet in the middle of an answer."""
    engine = Engine(generator().engine.runner, tokenizer())
    params = SamplingParams(max_tokens=30, temperature=0.0, regex="[a-z]{20}")
    bad, good = engine.add([20, 21], params), engine.add([20, 21], params)
    engine.step()
    matcher = engine._running[0].matcher
    assert matcher is not None
    with pytest.raises(GenerationError, match="the grammar failed"):
        matcher.accept(tokenizer().encode("5")[0])
    outputs = []
    while engine.unfinished:
        engine.step()
        outputs += engine.take()
    (failed,) = [o for o in outputs if o.request_id == bad and o.finish_reason]
    assert failed.finish_reason == "error" and "the grammar failed" in str(failed.error)
    text = "".join(o.text for o in outputs if o.request_id == good)
    assert re.fullmatch("[a-z]{20}", text)


def test_costly_regex_is_rejected() -> None:
    one = generator()
    params = SamplingParams(max_tokens=5, regex="((a?){99}){99}a{9801}")
    with pytest.raises(GenerationError, match="too many expressions"):
        one.generate("x", params)
    assert one.generate("x", SamplingParams(max_tokens=5)).tokens > 0


def test_only_one_constraint_is_allowed() -> None:
    with pytest.raises(GenerationError, match="regex must be omitted"):
        SamplingParams(regex="a", json_schema="{}")
