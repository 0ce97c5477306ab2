"""Structured output: JSON schemas, regular expressions and grammars, by llguidance.

https://github.com/guidance-ai/llguidance: the set of tokens allowed next, as a bit mask, for any
tokenizer; its limits bound the cost of a hostile schema.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import GenerationError
from khaosz.inference.sampling import SamplingParams

MAX_GRAMMAR = 1 << 16  # characters of a schema or regular expression
# Between JSON's tokens. Bounded: a weak model would stay in white space until its last token.
_SPACE = r"[ \n]{0,32}"


class Matcher:
    """The state of one sequence in its grammar."""

    def __init__(self, inner: Any, vocab_size: int) -> None:
        self._inner = inner
        self._mask = np.zeros((1, (vocab_size + 31) // 32), dtype=np.int32)
        self._vocab_size = vocab_size

    def copy(self) -> Matcher:
        return Matcher(self._inner.deep_copy(), self._vocab_size)

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with -inf for the tokens that the grammar forbids."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self._inner, self._mask)
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little")
        allowed = torch.from_numpy(bits[: len(logits)]).bool().to(logits.device)
        return logits.masked_fill(~allowed, -torch.inf)

    def accept(self, token: int) -> None:
        self._inner.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            raise GenerationError(f"the grammar failed: {_first_line(self._inner.get_error())}")


def matcher_for(params: SamplingParams, tokenizer: Tokenizer) -> Matcher | None:
    """The matcher of a request's constraint, if any.

    Raises `GenerationError` for a schema or expression that is broken, too large or too costly
    (as far as the first token shows), and when llguidance is not installed.
    """
    if params.form is None:
        return None
    what, source = params.form
    if len(source) > MAX_GRAMMAR:
        raise GenerationError(
            f"has {len(source):,} characters, more than {MAX_GRAMMAR:,}", param=what
        )
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(f"is not text: {error.reason}", param=what) from None
    try:
        import llguidance
    except ImportError:
        raise GenerationError(
            "needs llguidance", param=what, hint="pip install 'khaosz[structured]'"
        ) from None
    if what == "json_schema":
        try:
            schema = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"is not JSON: {error}", param=what) from None
        if not isinstance(schema, dict):
            raise GenerationError("is not an object", param=what)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                source, defaults={"whitespace_pattern": _SPACE}
            )
        except ValueError as error:  # nested too deep, or NaN, which Python's parser lets through
            raise GenerationError(f"cannot be used: {_first_line(error)}", param=what) from None
    elif what == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(source)
    else:
        grammar = llguidance.LLMatcher.grammar_from_lark(source)
    inner = llguidance.LLMatcher(_tokens(tokenizer), grammar, log_level=0)
    if inner.is_error():
        raise GenerationError(f"cannot be used: {_first_line(inner.get_error())}", param=what)
    matcher = Matcher(inner, tokenizer.vocab_size)
    matcher.mask(torch.zeros(tokenizer.vocab_size))  # most costly grammars fail here
    return matcher


def _first_line(error: object) -> str:
    return str(error).splitlines()[0][:300]


@lru_cache(maxsize=4)
def _tokens(tokenizer: Tokenizer) -> Any:
    import llguidance

    wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
    return llguidance.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size)


class _Vocabulary:
    """The interface that llguidance expects of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.end_id
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.encode(text)
