"""The document formats, one row each: to add one, add a row to `FORMATS` and a reader module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from khaosz.rag.load.document import Limits, Parsed


@dataclass(frozen=True)
class Format:
    """A row: `suffixes` and `stems` (file names without a suffix) are separated by spaces.

    `reader` is the module of this package whose `parse(raw, limits)` reads a file, imported in a
    worker process when the first one arrives. Without a reader the file is text, decoded in this
    process. `docling`: that package reads it if `--docling` is given; without that option, a
    format that has no `reader` is refused with the hint `instead`.
    """

    suffixes: str
    stems: str = ""
    reader: str | None = None
    docling: bool = False
    instead: str = ""

    @property
    def in_worker(self) -> bool:
        return self.reader is not None or self.docling

    def parse(self, raw: bytes, limits: Limits) -> Parsed:
        """Raises DocumentError, and ImportError when the reader's own package is not installed."""
        module = importlib.import_module(f"khaosz.rag.load.{self.reader}")
        parse: Callable[[bytes, Limits], Parsed] = module.parse
        return parse(raw, limits)


# By the name that documents have in their metadata ("format").
FORMATS = {
    "markdown": Format(".md .markdown .mdx .qmd"),
    "text": Format(
        ".txt .text .log .rst .adoc .org .tex .srt .vtt .csv .tsv .po",
        stems="readme license copying authors changelog notice",
    ),
    "jsonl": Format(".jsonl .ndjson"),
    "html": Format(".html .htm .xhtml", reader="html"),
    "pdf": Format(".pdf", reader="pdf", docling=True),
    "docx": Format(".docx .docm", reader="docx", docling=True),
    "pptx": Format(".pptx", docling=True, instead="save it as .pdf, or --docling"),
    "xlsx": Format(".xlsx", docling=True, instead="save it as .csv, or --docling"),
    "code": Format(
        ".py .pyi .pyx .js .mjs .cjs .jsx .ts .tsx .vue .svelte .css .scss .less .c .h .cc .cpp"
        " .cxx .hpp .hh .cu .cuh .m .mm .java .kt .kts .scala .groovy .go .rs .swift .rb .php .pl"
        " .pm .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .dart .zig .nim .cs .fs"
        " .vb .sql .sh .bash .zsh .fish .ps1 .bat .cmd .asm .s .f .f90 .v .sv .vhd .proto .thrift"
        " .graphql .json .json5 .yaml .yml .toml .ini .cfg .conf .properties .xml .xsd .xsl .tf"
        " .cmake .mk .gradle .dockerfile .diff .patch",
        stems="makefile dockerfile rakefile gemfile jenkinsfile",
    ),
}
_BY_SUFFIX = {suffix: name for name, row in FORMATS.items() for suffix in row.suffixes.split()}
_BY_STEM = {stem: name for name, row in FORMATS.items() for stem in row.stems.split()}
# What to do with files that are not read.
INSTEAD = {
    **{s: row.instead for row in FORMATS.values() if row.instead for s in row.suffixes.split()},
    **dict.fromkeys((".doc", ".wps", ".rtf", ".odt", ".pages"), "save it as .docx or .pdf"),
    **dict.fromkeys((".ppt", ".odp", ".key", ".dps"), "save it as .pdf"),
    **dict.fromkeys((".xls", ".ods", ".numbers", ".et"), "save it as .csv"),
    **dict.fromkeys((".epub", ".mobi", ".azw3", ".caj", ".djvu", ".chm"), "convert it to .pdf"),
    **dict.fromkeys((".mht", ".mhtml"), "save it as .html"),
}
SUFFIXES = tuple(suffix for suffix, name in _BY_SUFFIX.items() if not FORMATS[name].instead)


def keeps_lines(name: str) -> bool:
    """Whether a document of this format is its file's text: then their lines are the same."""
    return name in FORMATS and not FORMATS[name].in_worker and name != "jsonl"


def format_of(name: str, *, docling: bool = False) -> str | None:
    """The format of a file by its name, as a key of `FORMATS`; None if it is not one of them."""
    stem, dot, suffix = name.lower().rpartition(".")
    if not (stem and dot):
        return _BY_STEM.get(name.lower())
    format_name = _BY_SUFFIX.get(dot + suffix)
    needs_docling = format_name is not None and FORMATS[format_name].instead
    return None if needs_docling and not docling else format_name
