"""The bytes behind every token id of a vocabulary, whichever way it spells them."""

from __future__ import annotations

import json
from typing import Any

import tokenizers


def token_table(backend: tokenizers.Tokenizer, vocab_size: int) -> tuple[list[bytes], bool]:
    """Bytes of every id, and whether the first token of a text carries a space of its own.

    Byte-level vocabularies spell bytes in GPT-2's alphabet. SentencePiece ones (Llama 2) spell
    spaces as U+2581 and spare bytes as <0xE4>. An added token stands for its name.
    """
    spec = json.loads(backend.to_str())
    steps = _components(spec.get("pre_tokenizer")) + _components(spec.get("decoder"))
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    leading_space = not byte_level and any(
        (step["type"] == "Strip" and step.get("start", 0) > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    alphabet = _byte_alphabet()
    table = [b""] * vocab_size  # ids that no token has stand for nothing
    for token, i in backend.get_vocab(with_added_tokens=False).items():
        if byte_level:
            # A character outside the alphabet can only come from a token added by hand.
            table[i] = b"".join(
                bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token
            )
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[i] = bytes.fromhex(token[3:5])
        else:
            table[i] = token.replace("\u2581", " ").encode()
    for i, added in backend.get_added_tokens_decoder().items():
        table[i] = added.content.encode()
    return table, leading_space


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return table


def _components(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer or decoder of tokenizer.json as the flat list of its steps."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers") or part.get("decoders") or []
        return [step for child in inner for step in _components(child)]
    return [part]
