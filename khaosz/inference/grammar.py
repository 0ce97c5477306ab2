"""Structured output: JSON schemas, regular expressions and grammars, by llguidance.

https://github.com/guidance-ai/llguidance: the set of tokens allowed next, as a bit mask, for any
tokenizer; its limits bound the cost of a hostile schema.
"""

from __future__ import annotations

import json
import random
import re
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import GenerationError
from khaosz.inference.json_schema import prepared
from khaosz.inference.sampling import SamplingParams

MAX_GRAMMAR = 1 << 16  # characters of a schema or regular expression
# Between JSON's tokens. Bounded: a weak model would stay in white space until its last token.
_SPACE = r"[ \n]{0,32}"
_WALKS, _STEPS = 20, 120  # random values of a schema, and bytes of each
_END = 256  # the token of `_Bytes` that ends

# Bytes of an escape in a JSON string: of a control character, not of one that is written as it is.
_ESCAPE = re.compile(rb"\\([^/u]|u(0(0([01][0-9a-fA-F]?|7[fF]?)?)?)?)?")
_AFTER = {bytes([byte]) for byte in b"/u0123456789abcdefABCDEF"}
_PENDING = (b"", b"\\", b"\\u", b"\\u0", b"\\u00", b"\\u000", b"\\u001", b"\\u007")


def escaped(pending: bytes, more: bytes) -> bytes | None:
    """The bytes of an escape that is unfinished after `more`; None if one is not allowed.

    llguidance holds values to these escapes, but not names that the schema does not declare:
    "\\u0061" would pass for another name than "a", and its value for any.
    """
    for byte in more:
        if not pending:
            pending = b"\\" if byte == 92 else b""
            continue
        pending += bytes([byte])
        if not _ESCAPE.fullmatch(pending):
            return None
        if len(pending) == 6 or (len(pending) == 2 and byte != 117):
            pending = b""
    return pending


class Escapes:
    """For each beginning of an escape, the tokens that may follow: uint8 (V,)."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.allowed = {pending: np.ones(len(tokens), dtype=np.uint8) for pending in _PENDING}
        for i, token in enumerate(tokens):
            # Others end no escape and begin none, or the grammar forbids them there.
            if b"\\" in token or token[:1] in _AFTER:
                for pending, allowed in self.allowed.items():
                    allowed[i] = escaped(pending, token) is not None


class Matcher:
    """The state of one sequence in its grammar."""

    def __init__(
        self, inner: Any, vocab_size: int, escapes: Escapes | None = None, escape: bytes = b""
    ) -> None:
        """`escapes` of the tokenizer, for JSON; `escape`: the bytes of an unfinished one."""
        self._inner = inner
        self._mask = np.zeros((1, (vocab_size + 31) // 32), dtype=np.int32)
        self._vocab_size = vocab_size
        self._escapes, self._escape = escapes, escape

    def copy(self) -> Matcher:
        return Matcher(self._inner.deep_copy(), self._vocab_size, self._escapes, self._escape)

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with -inf for the tokens that the grammar forbids."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self._inner, self._mask)
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little")[: len(logits)]
        if self._escapes is not None:
            bits &= self._escapes.allowed[self._escape][: len(logits)]
        allowed = torch.from_numpy(bits).bool().to(logits.device)
        return logits.masked_fill(~allowed, -torch.inf)

    def accept(self, token: int) -> None:
        self._inner.consume_token(token)
        self._check()
        if self._escapes is not None:
            self._escape = escaped(self._escape, self._escapes.tokens[token]) or b""

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
    llguidance = _library(what)
    if what == "json_schema":
        try:
            schema = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"is not JSON: {error}", param=what) from None
        grammar = _schema_grammar(check_schema(schema, what), _SPACE)
    elif what == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(source)
    else:
        grammar = llguidance.LLMatcher.grammar_from_lark(source)
    inner = llguidance.LLMatcher(_tokens(tokenizer), grammar, log_level=0)
    if inner.is_error():
        raise GenerationError(f"cannot be used: {_first_line(inner.get_error())}", param=what)
    escapes = _escapes(tokenizer) if what == "json_schema" or "%json" in source else None
    matcher = Matcher(inner, tokenizer.vocab_size, escapes)
    try:
        matcher.mask(torch.zeros(tokenizer.vocab_size))  # most costly grammars fail here
    except GenerationError as error:
        raise GenerationError(f"cannot be used: {error.reason}", param=what) from None
    return matcher


def _library(param: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise GenerationError(
            "needs llguidance", param=param, hint="pip install 'khaosz[structured]'"
        ) from None
    return llguidance


def check_schema(schema: object, param: str) -> dict[str, Any]:
    """The schema as llguidance can hold it. Raises `GenerationError` for one that it cannot, also
    when that shows only in the middle of an answer: random values are written to find out."""
    _library(param)
    try:
        return _checked(json.dumps(schema))
    except GenerationError as error:
        raise GenerationError(error.reason, param=param) from None
    except RecursionError:
        raise GenerationError("cannot be used: it is nested too deep", param=param) from None


@lru_cache(maxsize=64)  # the requests of a program share theirs
def _checked(source: str) -> dict[str, Any]:
    held = prepared(json.loads(source), _has_names_left)
    matcher = _byte_matcher(held)
    draw = random.Random(0)
    for _ in range(_WALKS):
        _walk(matcher.deep_copy(), draw)
    return held


def _has_names_left(pattern: str, names: list[str]) -> bool:
    """Whether a pattern matches a name that is not one of these."""
    taken = {"properties": dict.fromkeys(names, False), "additionalProperties": False}
    probe = {"type": "object", "patternProperties": {pattern: {}}, **taken}
    return bool(_byte_matcher(probe).try_consume_tokens([*b'{"']) == 2)


def _byte_matcher(schema: dict[str, Any]) -> Any:
    import llguidance

    return llguidance.LLMatcher(_byte_tokens(), _schema_grammar(schema, ""), log_level=0)


def _schema_grammar(schema: dict[str, Any], space: str) -> str:
    import llguidance

    try:
        grammar: str = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), defaults={"whitespace_pattern": space}
        )
    except ValueError as error:  # nested too deep, or NaN, which Python's parser lets through
        raise GenerationError(f"cannot be used: {_first_line(error)}") from None
    return grammar


def _walk(matcher: Any, draw: random.Random) -> None:
    """Write a random value, byte by byte, that tends to end soon."""
    import llguidance.numpy

    mask = np.zeros((1, _END // 32 + 1), dtype=np.int32)
    for _ in range(_STEPS):
        if not matcher.is_error():
            llguidance.numpy.fill_next_token_bitmask(matcher, mask)
        if matcher.is_error():
            raise GenerationError(f"cannot be used: {_first_line(matcher.get_error())}")
        bits = np.unpackbits(mask.view(np.uint8)[0], bitorder="little")
        allowed = bits.nonzero()[0].tolist()
        if bits[_END]:
            return
        closing = [byte for byte in b'"]},:' if bits[byte]]
        choice = closing if closing and draw.random() < 0.4 else allowed
        matcher.consume_token(draw.choice(choice))


@lru_cache(maxsize=1)
def _byte_tokens() -> Any:
    """A tokenizer of single bytes, whose masks cost microseconds."""
    import llguidance

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=_END + 1)


class _Bytes:
    eos_token_id = bos_token_id = _END
    special_token_ids: ClassVar = [_END]
    tokens: ClassVar = [bytes([i]) for i in range(_END)] + [b"<end>"]

    def __call__(self, text: str | bytes) -> list[int]:
        return [*(text if isinstance(text, bytes) else text.encode())]


@lru_cache(maxsize=4)
def _escapes(tokenizer: Tokenizer) -> Escapes:
    return Escapes(_Vocabulary(tokenizer).tokens)


def _first_line(error: object) -> str:
    first, *_, last = (
        [*str(error).splitlines(), ""] if "\n" not in str(error) else str(error).splitlines()
    )
    return f"{first} {last}".strip()[:300] if first.endswith(":") else first[:300]


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
