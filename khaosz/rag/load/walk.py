"""Which files there are to read, in an order that depends on their names only."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from khaosz.data.records.charset import decode_bytes
from khaosz.errors import DataError
from khaosz.folders import LINKED_FOLDERS, OTHER_TYPES, SPECIAL_FILES, OnSkip, Skipped
from khaosz.rag.load.decode import clean
from khaosz.rag.load.document import InputFile, OnProblem, Problem
from khaosz.rag.load.formats import INSTEAD, format_of
from khaosz.rag.load.ignore import DEFAULT_RULES, IGNORE_FILE, Rule, parse_rules, reason_to_ignore

_IGNORE_FILE_BYTES = 1 << 20


def walk(
    paths: Sequence[Path],
    on_problem: OnProblem,
    *,
    docling: bool = False,
    on_skip: OnSkip = lambda skipped: None,
) -> Iterator[InputFile]:
    """The files to read: `paths` in their order, folders recursively and by name, each file once.

    A file in `paths` is read whatever its name, as text if the name says no format. In a folder,
    files whose name says no format are skipped, and so are hidden files and folders and those of
    `khaosz.folders` (unless `.khaoszignore` includes them with `!`; `.git` never); `on_skip` gets
    them. A symbolic link is followed if it stays within the folder that was added. `docling`:
    slides and sheets are read, too. Raises DataError for a path that does not exist.
    """
    roots = [(path, _stat(path)) for path in map(Path, paths)]
    return _Walk(on_problem, docling, on_skip).files(roots)


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else None
        raise DataError(
            f"{path} cannot be read: {(reason or str(error)).lower()}",
            hint="give the path of a file or a folder",
        ) from error


@dataclass
class _Walk:
    on_problem: OnProblem
    docling: bool
    on_skip: OnSkip

    def files(self, roots: Sequence[tuple[Path, os.stat_result]]) -> Iterator[InputFile]:
        seen: set[str] = set()
        for path, status in roots:
            real = os.path.realpath(path)
            if stat.S_ISDIR(status.st_mode):
                files = self._folder(real)
            else:
                files = self._file(path, real, path.name, status, default="text")
            for file in files:
                if str(file.path) in seen:
                    continue
                seen.add(str(file.path))
                if clean(file.name) != file.name:
                    reason = "has a name that is not valid Unicode"
                    self.on_problem(Problem(file.path, reason, "rename it"))
                    continue
                yield file

    def _folder(self, root: str) -> Iterator[InputFile]:
        """Depth first, with a stack of its own: folders nest deeper than Python may recurse."""
        rules = self._with_ignore_file(DEFAULT_RULES, root, ())
        names: tuple[str, ...] = ()
        stack = [(names, rules, self._entries(root))]
        while stack:
            above, rules, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                continue
            names = (*above, entry.name)
            real = entry.path
            try:
                if entry.is_symlink():
                    real = os.path.realpath(entry.path)
                status = entry.stat()
            except OSError as error:
                if reason_to_ignore(rules, names, is_folder=False) is None:
                    reason = "is a broken link" if entry.is_symlink() else _reason(error)
                    self.on_problem(Problem(Path(entry.path), reason))
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            used = DEFAULT_RULES if entry.name == ".git" else rules
            if ignored := reason_to_ignore(used, names, is_folder):
                if entry.name != IGNORE_FILE:
                    self.on_skip(Skipped(Path(entry.path), ignored))
            elif entry.is_symlink() and not Path(real).is_relative_to(root):
                hint = f"add {clean(real)} by itself"
                self.on_problem(Problem(Path(entry.path), "is a link to outside the folder", hint))
            elif is_folder and entry.is_symlink():
                self.on_skip(Skipped(Path(entry.path), LINKED_FOLDERS))
            elif is_folder:
                inside = self._with_ignore_file(rules, real, names)
                stack.append((names, inside, self._entries(real)))
            else:
                yield from self._file(Path(entry.path), real, "/".join(names), status)

    def _file(
        self, path: Path, real: str, name: str, status: os.stat_result, default: str | None = None
    ) -> Iterator[InputFile]:
        """The file, unless it is a problem; `default` is its format if its name says none."""
        suffix = path.suffix.lower()
        file_format = format_of(path.name, docling=self.docling)
        if file_format is None and suffix in INSTEAD:
            self.on_problem(Problem(path, f"{suffix} files cannot be read", INSTEAD[suffix]))
            return
        file_format = file_format or default
        if file_format and stat.S_ISREG(status.st_mode):
            yield InputFile(Path(real), name, file_format)
        elif file_format:
            self.on_problem(Problem(path, "is neither a file nor a folder"))
        else:
            reason = OTHER_TYPES if stat.S_ISREG(status.st_mode) else SPECIAL_FILES
            self.on_skip(Skipped(path, reason, excluded=False))

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return iter(sorted(entries, key=lambda entry: entry.name))
        except OSError as error:
            self.on_problem(Problem(Path(folder), _reason(error)))
            return iter(())

    def _with_ignore_file(
        self, rules: list[Rule], folder: str, names: tuple[str, ...]
    ) -> list[Rule]:
        path = Path(folder, IGNORE_FILE)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe waits for its writer
                self.on_problem(Problem(path, "is not a file"))
                return rules
            text = decode_bytes(path.read_bytes()[:_IGNORE_FILE_BYTES])[0]
            return rules + parse_rules(re.split("\r\n?|\n", text), names)
        except FileNotFoundError:
            return rules
        except OSError as error:
            self.on_problem(Problem(path, _reason(error)))
            return rules


def _reason(error: OSError) -> str:
    return f"cannot be read: {(error.strerror or str(error)).lower()}"
