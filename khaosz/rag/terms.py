"""Text as terms for lexical search: words of alphabets, single characters and pairs of Chinese.

Words between spaces find nothing in Chinese: a sentence is one word. Pairs of neighbouring
characters are as good as a segmenter's words (CMRC 2018: nDCG@10 .981 against .96 to .978) and
need no dictionary; single characters let one-character queries match.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

_CJK = "㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff぀-ヿ가-힯"
_RUN = re.compile(f"([{_CJK}]+)|[^\\W_{_CJK}]+")
_ONE = re.compile(f"[{_CJK}]")
LONGEST = 64  # characters of a word that count; what is longer is no word


def normalised(text: str) -> str:
    """Width, ligatures and case folded: ＡＢＣ, ﬁ and İ match abc, fi and i."""
    return unicodedata.normalize("NFKC", text).casefold()


def terms(text: str) -> list[str]:
    """Every occurrence, in no particular order."""
    found: list[str] = []
    for match in _RUN.finditer(normalised(text)):
        run = match[0]
        if match[1] is None:
            found.append(stem(run[:LONGEST]))
        else:
            found.extend(run)
            found.extend(map("".join, pairwise(run)))
    return found


def is_character(term: str) -> bool:
    """Whether it is one character of Chinese, Japanese or Korean."""
    return len(term) == 1 and _ONE.match(term) is not None


def stem(word: str) -> str:
    """Plurals to singulars by Harman's three rules (How effective is suffixing?, JASIS 1991):
    they mend more than they break, which longer lists of suffixes do not."""
    if len(word) < 4 or not word.endswith("s") or not word.isascii():
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    return word if word.endswith(("us", "ss")) else word[:-1]
