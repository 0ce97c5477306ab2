"""Which languages a model is known to have, by the catalogue, and a warning where it lacks one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from khaosz.interop.fetch.catalogue import Entry
from khaosz.interop.fetch.propose import fitting
from khaosz.interop.sampling import known_entry

Language = Literal["zh", "en"]
Languages = frozenset[str]

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_WORD = re.compile(r"[A-Za-z]{2,}")
_CODE = re.compile(r"```.*?(```|$)|`[^`]*`|https?://\S+", re.DOTALL)
_NAMES = {"zh": ("Chinese", "中文"), "en": ("English", "英文")}


@dataclass(frozen=True)
class LanguageWarning:
    """`language`: the one that was asked in and the model lacks; `model`: a name of the catalogue
    that has it. `message` is in that language."""

    language: Language
    model: str
    message: str

    def body(self) -> dict[str, str]:
        return {"code": "language", **vars(self)}


def language_of(text: str) -> Language | None:
    """Chinese or English; None for another language, code, or too little text to tell."""
    text = _CODE.sub(" ", text)
    if _KANA_OR_HANGUL.search(text):
        return None
    han, words = len(_HAN.findall(text)), len(_WORD.findall(text))
    if han >= 2 and han >= words:
        return "zh"
    return "en" if words >= 3 and not han else None


def known_languages(model: Path) -> Languages | None:
    """Codes of the languages of a model, of which zh and en are always named; None for a model that
    is not in the catalogue."""
    entry = known_entry(model)
    return None if entry is None else entry_languages(entry)


def entry_languages(entry: Entry) -> Languages:
    """A language that the catalogue calls weak is not one."""
    return frozenset(each.strip() for each in entry.languages.split(","))


def language_warning(
    text: str, known: Languages | None, name: str, earlier: Sequence[str] = ()
) -> LanguageWarning | None:
    """Of a message to the model `name`, which is known to lack the message's language; none if an
    `earlier` message was in it, and got the warning."""
    language = language_of(text) if known is not None else None
    if language in map(language_of, earlier):
        return None
    if known is None or language is None or language in known:
        return None
    other = next(each.name for each in fitting(None) if language in entry_languages(each))
    english, chinese = _NAMES[language]
    message = f"{name} was not trained for {english}. {other} is: khaosz pull {other}"
    if language == "zh":
        message = f"{name} 未针对{chinese}训练，{other} 支持{chinese}：khaosz pull {other}"
    return LanguageWarning(language, other, message)
