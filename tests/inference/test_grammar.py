"""Structured output: what comes out parses, whatever the weights say; costly forms are refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from random_models import bytewise, random_model, tokenizer

from khaosz.errors import GenerationError
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
def test_random_weights_speak_json(seed: int, temperature: float) -> None:
    params = SamplingParams(
        max_tokens=300, temperature=temperature, seed=seed, json_schema=json.dumps(SCHEMA)
    )
    # White space is allowed without end, and greedy random weights may stay in it.
    completion = generator(seed).generate("x", params)
    if completion.finish_reason == "stop":
        said = json.loads(completion.text)
        assert said.keys() == {"name", "age", "kind"}
        assert len(said["name"]) <= 4 and 0 <= said["age"] <= 99 and said["kind"] in ("人", "cat")
    else:
        assert completion.text.count("  ") or len(completion.text) > 40


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


def test_every_choice_has_a_grammar_of_its_own() -> None:
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
        ({"regex": "((("}, "cannot be used"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_forms_that_cannot_be_used_are_refused(form: dict[str, str], message: str) -> None:
    with pytest.raises(GenerationError, match=message) as caught:
        generator().generate("x", SamplingParams(max_tokens=5, **form))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_costly_expression_ends_its_request_only() -> None:
    one = generator()
    with pytest.raises(GenerationError, match="grammar"):
        one.generate("x", SamplingParams(max_tokens=5, regex="(a{1000}){1000}"))
    assert one.generate("x", SamplingParams(max_tokens=5)).tokens > 0
    with pytest.raises(GenerationError, match="regex must be left out"):
        SamplingParams(regex="a", json_schema="{}")
