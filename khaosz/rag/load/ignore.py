"""`.khaoszignore`: which files of a folder are left out, in a subset of gitignore's syntax.

One pattern per line; the last one that matches decides. What holds (gitignore(5)):

- a blank line, or one that begins with `#`, says nothing; `\\#` and `\\!` begin a pattern with
  these characters; spaces at the end don't count;
- `!` takes files back in, but nothing inside of a folder that is left out;
- `/` at the end: folders only; `/` anywhere else: relative to the folder of the ignore file;
  no other `/`: names at any depth;
- `*`, `?` and `[a-z]`, `[!a-z]` match within a name; `**` as a whole name matches any number of
  folders.

What does not: backslashes elsewhere, and matching without regard to case. Ignore files in
subfolders hold below them and are read after those above.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

IGNORE_FILE = ".khaoszignore"


@dataclass(frozen=True)
class Rule:
    """A pattern by its names; None stands for `**`. `base` is the ignore file's folder, as names
    from the folder that was added."""

    base: tuple[str, ...]
    parts: tuple[Callable[[str], object] | None, ...]
    folders_only: bool
    ignores: bool


def parse_rules(lines: Iterable[str], base: tuple[str, ...] = ()) -> list[Rule]:
    rules = []
    for line in lines:
        pattern = line.rstrip()
        if not pattern or pattern.startswith("#"):
            continue
        ignores = not pattern.startswith("!")
        if not ignores:
            pattern = pattern[1:]
        if pattern.startswith(("\\#", "\\!")):
            pattern = pattern[1:]
        folders_only = pattern.endswith("/")
        pattern = pattern.rstrip("/")
        names = pattern.lstrip("/").split("/")
        if "/" not in pattern:
            names.insert(0, "**")
        if names[-1] == "**":  # a/** is what lies in a, not a itself
            names.append("*")
        if names[-1]:
            parts = tuple(None if name == "**" else _name_matcher(name) for name in names)
            rules.append(Rule(base, parts, folders_only, ignores))
    return rules


def _name_matcher(pattern: str) -> Callable[[str], object]:
    # fnmatch builds its expressions of atomic groups (Python 3.11): no exponential search.
    return re.compile(fnmatch.translate(pattern.replace("[^", "[!"))).match


def _never(name: str) -> object:
    return None


def is_ignored(rules: Sequence[Rule], names: tuple[str, ...], is_folder: bool) -> bool:
    """Whether the file or folder at `names` (from the folder that was added) is left out."""
    for rule in reversed(rules):
        depth = len(rule.base)
        if rule.folders_only and not is_folder:
            continue
        if names[:depth] == rule.base and _matches(rule.parts, names[depth:]):
            return rule.ignores
    return False


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
