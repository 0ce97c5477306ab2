"""Which files there are to read, in an order that depends on their names only."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from khaosz.errors import DataError
from khaosz.rag.load.decode import clean
from khaosz.rag.load.document import Found, Kind, Problem
from khaosz.rag.load.ignore import IGNORE_FILE, Rule, is_ignored, parse_rules

_SUFFIXES: dict[Kind, str] = {
    "markdown": ".md .markdown .mdx .qmd",
    "text": ".txt .text .log .rst .adoc .org .tex .srt .vtt .csv .tsv .po",
    "jsonl": ".jsonl .ndjson",
    "html": ".html .htm .xhtml",
    "pdf": ".pdf",
    "docx": ".docx .docm",
    "code": (
        ".py .pyi .pyx .js .mjs .cjs .jsx .ts .tsx .vue .svelte .css .scss .less .c .h .cc .cpp"
        " .cxx .hpp .hh .cu .cuh .m .mm .java .kt .kts .scala .groovy .go .rs .swift .rb .php .pl"
        " .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .dart .zig .nim .cs .fs"
        " .vb .sql .sh .bash .zsh .fish .ps1 .bat .cmd .asm .s .f .f90 .v .sv .vhd .proto .thrift"
        " .graphql .json .json5 .yaml .yml .toml .ini .cfg .conf .properties .xml .xsd .xsl .tf"
        " .cmake .mk .gradle .dockerfile .diff .patch"
    ),
}
_KIND_OF = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
SUFFIXES = tuple(_KIND_OF)  # that say what a file is
_BY_DOCLING: dict[str, Kind] = {".pptx": "pptx", ".xlsx": "xlsx"}
_NAMES: dict[str, Kind] = {
    **dict.fromkeys(("readme", "license", "copying", "authors", "changelog", "notice"), "text"),
    **dict.fromkeys(("makefile", "dockerfile", "rakefile", "gemfile", "jenkinsfile"), "code"),
}
INSTEAD = {
    **dict.fromkeys((".doc", ".wps", ".rtf", ".odt", ".pages"), "save it as .docx or .pdf"),
    ".pptx": "save it as .pdf, or --docling",
    ".xlsx": "save it as .csv, or --docling",
    **dict.fromkeys((".ppt", ".odp", ".key", ".dps"), "save it as .pdf"),
    **dict.fromkeys((".xls", ".ods", ".numbers", ".et"), "save it as .csv"),
    **dict.fromkeys((".epub", ".mobi", ".azw3", ".caj", ".djvu", ".chm"), "convert it to .pdf"),
    **dict.fromkeys((".mht", ".mhtml"), "save it as .html"),
}
_IGNORE_FILE_BYTES = 1 << 20

OnProblem = Callable[[Problem], None]


def walk(paths: Sequence[Path], on_problem: OnProblem, *, docling: bool = False) -> Iterator[Found]:
    """The files to read: `paths` in their order, folders recursively and by name, each file once.

    A file that was named is read whatever its name says, as text when it says nothing. In a
    folder, names that say nothing are passed over, hidden files and folders too (unless
    `.khaoszignore` takes them in with `!`; `.git` never). A symbolic link is followed when it
    stays within the folder that was added. `docling`: slides and sheets are read, too. Raises
    DataError for a path that does not exist.
    """
    named = [(path, _stat_named(path)) for path in map(Path, paths)]
    return _walk(named, on_problem, docling)


def _stat_named(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else None
        raise DataError(
            f"{path} cannot be read: {(reason or str(error)).lower()}",
            hint="give the path of a file or a folder",
        ) from error


def _walk(
    named: Sequence[tuple[Path, os.stat_result]], on_problem: OnProblem, docling: bool
) -> Iterator[Found]:
    seen: set[str] = set()
    for path, status in named:
        real = os.path.realpath(path)
        if stat.S_ISDIR(status.st_mode):
            found = _walk_folder(real, on_problem, docling)
        else:
            kind = kind_of(path.name, docling=docling)
            found = iter([Found(Path(real), path.name, kind or "text")])
            suffix = path.suffix.lower()
            if suffix in INSTEAD and not kind:
                on_problem(Problem(path, f"{suffix} files cannot be read", INSTEAD[suffix]))
                continue
            if not stat.S_ISREG(status.st_mode):
                on_problem(Problem(path, "is neither a file nor a folder"))
                continue
        for file in found:
            if str(file.path) in seen:
                continue
            seen.add(str(file.path))
            if clean(file.name) != file.name:
                on_problem(Problem(file.path, "has a name that is not valid Unicode", "rename it"))
                continue
            yield file


def kind_of(name: str, *, docling: bool = False) -> Kind | None:
    """What a file is by its name; None when that says nothing."""
    stem, dot, suffix = name.lower().rpartition(".")
    if docling and stem and dot + suffix in _BY_DOCLING:
        return _BY_DOCLING[dot + suffix]
    return _KIND_OF.get(dot + suffix) if stem and dot else _NAMES.get(name.lower())


def _walk_folder(root: str, on_problem: OnProblem, docling: bool) -> Iterator[Found]:
    """Depth first with a stack of our own: folders nest deeper than Python's calls do."""
    seen = {root}
    rules = _with_ignore_file(parse_rules([".*"]), root, (), on_problem)
    names: tuple[str, ...] = ()
    stack = [(names, rules, _entries(root, on_problem))]
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
            if not is_ignored(rules, names, is_folder=False):
                what = "is a link that leads nowhere" if entry.is_symlink() else _reason(error)
                on_problem(Problem(Path(entry.path), what))
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        if entry.name == ".git" or is_ignored(rules, names, is_folder):
            continue
        if entry.is_symlink() and not Path(real).is_relative_to(root):
            on_problem(
                Problem(
                    Path(entry.path),
                    "is a link that leads out of the folder",
                    f"add {clean(real)} by itself",
                )
            )
        elif is_folder:
            if real not in seen:  # a link may lead back to a folder above
                seen.add(real)
                inside = _with_ignore_file(rules, real, names, on_problem)
                stack.append((names, inside, _entries(real, on_problem)))
        else:
            kind = kind_of(entry.name, docling=docling)
            yield from _of_folder(entry, real, "/".join(names), kind, status, on_problem)


def _of_folder(
    entry: os.DirEntry[str],
    real: str,
    name: str,
    kind: Kind | None,
    status: os.stat_result,
    on_problem: OnProblem,
) -> Iterator[Found]:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in INSTEAD and not kind:
        on_problem(Problem(Path(entry.path), f"{suffix} files cannot be read", INSTEAD[suffix]))
    elif kind and stat.S_ISREG(status.st_mode):
        yield Found(Path(real), name, kind)
    elif kind:
        on_problem(Problem(Path(entry.path), "is neither a file nor a folder"))


def _entries(folder: str, on_problem: OnProblem) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        on_problem(Problem(Path(folder), _reason(error)))
        return iter(())


def _with_ignore_file(
    rules: list[Rule], folder: str, base: tuple[str, ...], on_problem: OnProblem
) -> list[Rule]:
    path = Path(folder, IGNORE_FILE)
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return rules + parse_rules(file.read(_IGNORE_FILE_BYTES).split("\n"), base)
    except FileNotFoundError:
        return rules
    except OSError as error:
        on_problem(Problem(path, _reason(error)))
        return rules


def _reason(error: OSError) -> str:
    return f"cannot be read: {(error.strerror or str(error)).lower()}"
