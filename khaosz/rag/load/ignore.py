"""`.khaoszignore`: which files of a folder are skipped, in a subset of gitignore's syntax.

One pattern per line; the last one that matches decides. Supported (gitignore(5)):

- blank lines and lines that start with `#` are ignored; `\\#` and `\\!` start a pattern with these
  characters; spaces at the end are removed;
- `!` includes files again, but nothing inside a folder that is skipped;
- `/` at the end: folders only; `/` anywhere else: relative to the folder of the ignore file;
  no other `/`: names at any depth;
- `*`, `?` and `[a-z]`, `[!a-z]` match within a name; `**` as a whole name matches any number of
  folders.

Not supported: backslashes elsewhere, and matching that ignores case. Ignore files in subfolders
apply below them and are read after those above.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from khaosz.folders import PATTERNS

IGNORE_FILE = ".khaoszignore"


@dataclass(frozen=True)
class Rule:
    """A pattern split at "/"; a part of None is `**`. `folder` is the ignore file's, as names from
    the folder that was added."""

    folder: tuple[str, ...]
    parts: tuple[Callable[[str], object] | None, ...]
    folders_only: bool
    ignores: bool
    reason: str


def parse_rules(
    lines: Iterable[str], folder: tuple[str, ...] = (), reason: str = IGNORE_FILE
) -> list[Rule]:
    rules = []
    for line in lines:
        pattern = line.rstrip()
        if not pattern or pattern.startswith("#"):
            continue
        ignores = not pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        if pattern.startswith(("\\#", "\\!")):
            pattern = pattern[1:]
        folders_only = pattern.endswith("/")
        pattern = pattern.rstrip("/")
        names = pattern.lstrip("/").split("/")
        if "/" not in pattern:
            names.insert(0, "**")
        if names[-1] == "**":  # a/** is what is in a, not a itself
            names.append("*")
        if names[-1]:
            parts = tuple(None if name == "**" else _name_matcher(name) for name in names)
            rules.append(Rule(folder, parts, folders_only, ignores, reason))
    return rules


def _name_matcher(pattern: str) -> Callable[[str], object]:
    # fnmatch uses atomic groups (Python 3.11), so the search is not exponential.
    return re.compile(fnmatch.translate(pattern.replace("[^", "[!"))).match


def _never(name: str) -> object:
    return None


def is_ignored(rules: Sequence[Rule], names: tuple[str, ...], is_folder: bool) -> bool:
    """Whether the file or folder at `names` (from the folder that was added) is skipped."""
    return reason_to_ignore(rules, names, is_folder) is not None


def reason_to_ignore(rules: Sequence[Rule], names: tuple[str, ...], is_folder: bool) -> str | None:
    """The reason of the rule that skips it, or None."""
    for rule in reversed(rules):
        depth = len(rule.folder)
        if rule.folders_only and not is_folder:
            continue
        if names[:depth] == rule.folder and _matches(rule.parts, names[depth:]):
            return rule.reason if rule.ignores else None
    return None


def _matches(parts: Sequence[Callable[[str], object] | None], names: Sequence[str]) -> bool:
    """Glob matching with one step back to the last `**`: len(parts) * len(names) steps at most."""
    part = name = 0
    star: tuple[int, int] | None = None
    while name < len(names):
        matcher = parts[part] if part < len(parts) else _never
        if matcher is None:
            star = (part, name)
            part += 1
        elif matcher(names[name]):
            part += 1
            name += 1
        elif star:
            star = (star[0], star[1] + 1)
            part, name = star[0] + 1, star[1]
        else:
            return False
    return all(matcher is None for matcher in parts[part:])


DEFAULT_RULES = [
    rule for reason, patterns in PATTERNS.items() for rule in parse_rules(patterns, reason=reason)
]
"""What is skipped unless an ignore file includes it."""
