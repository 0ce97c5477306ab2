"""Simplified and traditional Chinese characters, one for one.

`traditional.txt` has a group per simplified character of GB 2312 whose form differs in Big5: the
simplified character and its traditional forms, the most frequent first. It is an extract of
OpenCC's character tables (https://github.com/BYVoid/OpenCC, Apache-2.0). Words are not looked at:
發 and 髮 both become 发, and 发 becomes 發.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def _tables() -> tuple[dict[int, str], dict[int, str]]:
    groups = (Path(__file__).parent / "traditional.txt").read_text(encoding="utf-8").split()
    simplified = {ord(form): group[0] for group in groups for form in group[1:]}
    return simplified, {ord(group[0]): group[1] for group in groups}


def to_simplified(text: str) -> str:
    return text if text.isascii() else text.translate(_tables()[0])


def to_traditional(text: str) -> str:
    return text if text.isascii() else text.translate(_tables()[1])
