"""Files and folders below a folder that are not a person's own data, and how they are listed.

Programs put them there: version control, caches, locks, unfinished downloads. Code that walks a
folder skips them, and reports which.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HIDDEN = "hidden files and folders"
LINKED_FOLDERS = "linked folders"
OTHER_TYPES = "files of other types"
SPECIAL_FILES = "pipes, sockets and devices"
_SHOWN = 3
# Patterns of names, as in .gitignore: "/" at the end is for folders only. The last match decides.
PATTERNS = {
    HIDDEN: (".*",),
    "system files": (
        *("[Tt]humbs.db", "ehthumbs.db", "[Dd]esktop.ini", ".DS_Store", "._*", "__MACOSX/"),
        *("$RECYCLE.BIN/", "System Volume Information/", "lost+found/", "@eaDir/", ".Trash*/"),
    ),
    "lock and temporary files": (
        *("~$*", ".~lock.*#", "*~", "\\#*#", "*.swp", "*.swo", "*.tmp", ".fuse_hidden*", ".nfs*"),
    ),
    "unfinished downloads": (
        *("*.crdownload", "*.part", "*.partial", "*.download", "*.aria2", "*.incomplete"),
    ),
    "shortcuts": ("*.lnk", "*.url", "*.webloc", "*.desktop"),
    "caches and packages": (
        *("__pycache__/", "node_modules/", "bower_components/", "site-packages/", ".venv/"),
        *(".tox/", ".nox/", ".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".cache/"),
        *(".ipynb_checkpoints/",),
    ),
    "version control": (".git", ".svn/", ".hg/", ".bzr/", ".jj/", "CVS/", "_darcs/"),
}


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is not read. excluded: it does not belong to the folder's data,
    whatever is in it; otherwise it may be read another time."""

    path: Path
    reason: str
    excluded: bool = True


OnSkip = Callable[[Skipped], None]
_MATCHERS = [
    (reason, re.compile(fnmatch.translate(pattern.rstrip("/").lstrip("\\"))), pattern[-1] == "/")
    for reason, patterns in reversed(PATTERNS.items())
    for pattern in patterns
]


def reason_to_skip(name: str, is_folder: bool) -> str | None:
    """Why a file or folder of this name is skipped, or None."""
    for reason, matcher, folders_only in _MATCHERS:
        if (is_folder or not folders_only) and matcher.match(name):
            return reason
    return None


def is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def files_below(root: Path, on_skip: OnSkip) -> Iterator[Path]:
    """All files of a folder, without what programs put there. A link to a file is followed, one to
    a folder is not. Nothing is opened, so that no pipe is waited for."""
    stack = [root]  # not recursive: folders nest deeper than Python may recurse
    while stack:
        folder = stack.pop()
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            on_skip(Skipped(folder, _reason(error), False))
            continue
        for entry in listed:
            path = folder / entry.name
            if not is_unicode(entry.name):
                on_skip(Skipped(path, "names that are not valid Unicode"))
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                broken = "broken links" if entry.is_symlink() else _reason(error)
                on_skip(Skipped(path, broken, False))
                continue
            is_folder = stat.S_ISDIR(mode)
            if reason := reason_to_skip(entry.name, is_folder):
                on_skip(Skipped(path, reason))
            elif is_folder and entry.is_symlink():
                on_skip(Skipped(path, LINKED_FOLDERS))
            elif is_folder:
                stack.append(path)
            elif stat.S_ISREG(mode):
                yield path
            else:
                on_skip(Skipped(path, SPECIAL_FILES))


def _reason(error: OSError) -> str:
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def describe(skipped: Iterable[Skipped], roots: Sequence[Path]) -> list[str]:
    """For people: a line per reason, with the count and the first names, relative to the folder of
    `roots` that they are in."""
    by_reason: dict[str, list[Path]] = {}
    for each in skipped:
        by_reason.setdefault(each.reason, []).append(each.path)
    lines = []
    for reason, paths in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        names = [_shown(path, roots) for path in paths[:_SHOWN]]
        more = ", ..." if len(paths) > _SHOWN else ""
        lines.append(f"skipped {len(paths):,}: {reason} ({', '.join(names)}{more})")
    return lines


def _shown(path: Path, roots: Sequence[Path]) -> str:
    root = next((root for root in roots if path != root and path.is_relative_to(root)), None)
    name = str(path if root is None else path.relative_to(root))
    return name.encode("utf-8", "backslashreplace").decode()
