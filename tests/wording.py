"""Find phrases that read as translated, in code, docs and commit subjects: `python -m
tests.wording`.

CONTRIBUTING.md, "How we write", says what to write instead. A place where a phrase is right is
listed in ALLOWED with its reason; at most MOST_ALLOWED of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".ts",
    ".tsx",
    ".css",
    ".html",
    ".cpp",
    ".h",
    ".yaml",
    ".service",
}
SUBJECTS_SINCE = "dff64b8"  # earlier commits were written before this check
MOST_ALLOWED = 12

PHRASES = {
    r"there (?:is|are) no\b": "X not found, or no X",
    r"\b(?:is|are) no (?!longer\b|more\b)\w+": "is not a",
    r"\banew\b": "again",
    r"\bby and by\b": "in the background, gradually",
    r"\b(?:is|are|was|were|be) told\b": "gets, is described, is detected",
    r"\bwherein\b": "in which",
    r"\bwhereof\b": "of which",
    # Chosen here
    r"\bwhoever\b": "anyone who, the caller",
    r"\bamid\b": "in the middle of, during",
    r"\bbegun\b": "started",
    r"\bnobody\b": "no one, or the subject by name",
    r"\b(?:go|goes|going|went|gone) on\b": "continue",
    r"\bno such\b": "X not found",
    r"\bshall\b": "must, will",
    r"\bbe had\b": "be available, be downloaded",
    r"\bfor want of\b": "without, out of",
    r"\bwithout end\b": "unbounded",
}
# Not prose of ours, or prose about the phrases.
SKIPPED = (
    "tests/wording.py",
    "tests/test_wording.py",
    "tests/mutants.toml",
    "web/package-lock.json",
)
SKIPPED_FOLDERS = ("khaosz/serve/page/", "khaosz/data/sample/", "recipes/data/")
# (file, text on the line): why the phrase is right there.
ALLOWED: dict[tuple[str, str], str] = {
    ("khaosz/demo/texts.py", "Go on from here"): "a prompt that the demo trains on",
    ("tests/data/shards/test_prepare.py", "nobody answers"): "a sample message",
    ("tests/demo/test_demo_corpus.py", "ever be told about"): "a sample docstring, read as prose",
    ("tests/inference/test_engine.py", "nobody thought of it"): "the text of a planned error",
}

_PATTERN = re.compile("|".join(f"(?:{phrase})" for phrase in PHRASES), re.IGNORECASE)


def phrases(text: str) -> list[str]:
    """The phrases of PHRASES that occur in `text`, as they are written there."""
    return [match[0] for match in _PATTERN.finditer(text)]


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def places() -> Iterator[tuple[str, str]]:
    """(where, line) of everything that is checked."""
    for name in _git("ls-files"):
        path = ROOT / name
        other = name in SKIPPED or name.startswith(SKIPPED_FOLDERS)
        if other or path.suffix not in SUFFIXES or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            # The pairs of "How we write" quote what not to write.
            if not (name == "CONTRIBUTING.md" and line.startswith("|")):
                yield f"{name}:{number}", line
    for line in _git("log", "--format=%h %s", f"{SUBJECTS_SINCE}..HEAD"):
        commit, _, subject = line.partition(" ")
        yield f"commit {commit}", subject


def main() -> int:
    hits = 0
    used: set[tuple[str, str]] = set()
    for where, line in places():
        if not (matched := phrases(line)):
            continue
        file = where.partition(":")[0]
        allowed = [key for key in ALLOWED if key[0] == file and key[1] in line]
        used.update(allowed)
        if not allowed:
            hits += 1
            print(f"{where}: {', '.join(matched)}: {line.strip()[:120]}")
    for file, text in sorted(set(ALLOWED) - used):
        hits += 1
        print(f"{file}: ALLOWED lists {text!r}, which is not there any more")
    if len(ALLOWED) > MOST_ALLOWED:
        hits += 1
        print(f"{len(ALLOWED)} allowed places; {MOST_ALLOWED} are the most")
    if hits:
        print(f'{hits} places to reword: see "How we write" in CONTRIBUTING.md')
    return min(hits, 1)


if __name__ == "__main__":
    sys.exit(main())
