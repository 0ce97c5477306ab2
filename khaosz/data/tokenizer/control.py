"""Encodes a rendered chat whole, as transformers does, with the control tokens of its template."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any

import tokenizers
from tokenizers import models

_MARK = "\u2056"  # at both ends of an alias: a sign that no normaliser changes or removes


class ControlEncoder:
    """A tokenizer that knows each control token by an unguessable alias in place of its name.

    The writer of an alias, which is the chat template, gets that token, with its flags (lstrip,
    rstrip, single_word, normalized); its name is text like any other. So a chat is encoded in one
    piece, and a pre-tokenizer that treats the start of a text differently sees one start.
    """

    def __init__(
        self,
        serialized: Callable[[], bytes],
        added: dict[str, int],
        special: dict[str, int],
        shared: tokenizers.Tokenizer | None = None,
    ) -> None:
        """Ids by name: of all added tokens, and of control tokens. The vocabulary and the merges of
        `shared`, which take seconds to load again, are used where no text reaches the names."""
        nonce = f"{_MARK}{secrets.token_hex(16)}"
        self.aliases = {name: f"{nonce}.{i}{_MARK}" for i, name in enumerate(special)}
        self._names = {alias: name for name, alias in self.aliases.items()}
        self._special = special
        self._pattern = re.compile(rf"{nonce}\.\d+{_MARK}")
        if shared is not None and _is_shareable(shared.model, special):
            self._backend, present = self._sharing(shared)
        else:
            self._backend, present = self._loaded(json.loads(serialized()))
        absent = [alias for alias in self.aliases.values() if alias not in present]
        self._backend.add_special_tokens(absent)
        # Added tokens get ids in turn, and those that a merge makes keep their names there.
        places = {
            self._backend.token_to_id(self.aliases.get(name, name)): i
            for name, i in (added | special).items()
        }
        self._ids = {theirs: ours for theirs, ours in places.items() if theirs != ours}

    def _loaded(self, spec: dict[str, Any]) -> tuple[tokenizers.Tokenizer, set[str]]:
        """Of a tokenizer.json, and its added tokens."""
        self._may_miss = any(t["single_word"] or t["normalized"] for t in spec["added_tokens"])
        _rename(spec["model"], self.aliases)
        for token in spec["added_tokens"]:
            token["content"] = self.aliases.get(token["content"], token["content"])
        spec |= dict.fromkeys(("post_processor", "truncation", "padding"))
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        return backend, {token["content"] for token in spec["added_tokens"]}

    def _sharing(self, of: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, set[str]]:
        """With the model of another tokenizer, and its added tokens."""
        backend = tokenizers.Tokenizer(of.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(of, part) is not None:
                setattr(backend, part, getattr(of, part))
        tokens = [token for _, token in sorted(of.get_added_tokens_decoder().items())]
        self._may_miss = any(t.single_word or t.normalized for t in tokens)
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        renamed = [
            tokenizers.AddedToken(
                self.aliases.get(t.content, t.content), **{flag: getattr(t, flag) for flag in flags}
            )
            for t in tokens
        ]
        backend.add_tokens(renamed)
        return backend, {token.content for token in renamed}

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the character range [start, end) of each in `text`."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if self._ids:
            ids = [self._ids.get(i, i) for i in ids]
        if not self._may_miss:
            return ids, offsets
        hits = {(text.find(_MARK, *place), i) for i, place in zip(ids, offsets, strict=True)}
        at, plain, origin = 0, "", list[int]()
        for match in self._pattern.finditer(text):
            name = self._names[match[0]]
            if (match.start(), self._special[name]) not in hits:  # its flags forbid the token here
                plain += text[at : match.start()] + name
                origin += [*range(at, match.start()), *[match.start()] * len(name)]
                at = match.end()
        if not at:
            return ids, offsets
        origin += range(at, len(text) + 1)
        ids, offsets = self.encode(plain + text[at:])
        return ids, [(origin[start], origin[end]) for start, end in offsets]

    def exceeds(self, text: str, limit: int) -> bool:
        return exceeds(self._backend, text, limit)


_PART = 1 << 14  # characters
_SLACK = 32  # tokens that cutting a text in two may add, with a wide margin


def exceeds(backend: tokenizers.Tokenizer, text: str, limit: int) -> bool:
    """Whether a text certainly has more than `limit` tokens. Its parts are encoded one by one, no
    more of them than the answer needs: a text of megabytes takes no longer than one of `limit`
    tokens."""
    count = 0
    for at in range(0, len(text) if len(text) > _PART else 0, _PART):
        count += len(backend.encode(text[at : at + _PART], add_special_tokens=False).ids) - _SLACK
        if count > limit:
            return True
    return False


def _is_shareable(model: Any, special: dict[str, int]) -> bool:
    """Whether no text becomes a control token by its name: in BPE only a single character, a byte
    and, with `ignore_merges`, a word does."""
    reached = any(len(name) == 1 or name.startswith("<0x") for name in special)
    return isinstance(model, models.BPE) and not model.ignore_merges and not reached


def _rename(model: dict[str, Any], aliases: dict[str, str]) -> None:
    """Unigram and WordPiece find a piece by its name in any text: those of control tokens too."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of piece and score
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocab]
        return
    merged = _parts(model.get("merges") or [])
    renamed = {
        name: alias for name, alias in aliases.items() if name in vocab and name not in merged
    }
    model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocab.items()}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]


def _parts(merges: Iterable[str | list[str]]) -> set[str]:
    """Every token that a merge reads or makes."""
    parts: set[str] = set()
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        parts |= {left, right, left + right}
    return parts
