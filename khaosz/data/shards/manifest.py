"""A prepared directory: its manifest, its report and its shards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.data.fingerprint import fingerprint
from khaosz.data.records.readers import RawBatch
from khaosz.data.records.report import InputReport
from khaosz.data.shards.encode import EncodedBatch
from khaosz.data.shards.mmap import MmapFileHandler, Stage
from khaosz.errors import DataError, TokenFileError
from khaosz.files import disk_error

MANIFEST_FORMAT = 1
GROUP_FIELDS = ("split", "source", "lang", "shards", "documents", "tokens", "bytes")


@dataclass
class PrepareReport:
    """Counts of a `data prepare`. `languages`: language -> documents, tokens, bytes, characters.

    bytes and characters count the kept texts; seconds add up over restarts.
    """

    inputs: list[InputReport]
    languages: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    already_prepared: bool = False

    @property
    def documents(self) -> int:
        return sum(entry.kept for entry in self.inputs)

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.inputs)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.inputs)

    def characters_per_token(self, language: str) -> float:
        """Mean characters per token of this language, bos and eos included."""
        counts = self.languages[language]
        return counts["characters"] / max(1, counts["tokens"])

    def count(
        self, index: int, batch: RawBatch, encoded: EncodedBatch, keep: np.ndarray, n_seen: int
    ) -> None:
        """Add a batch of input `index`; `keep` (documents,) bool, of which `n_seen` were read."""
        entry = self.inputs[index]
        kept = int(keep.sum())
        entry.encoding = batch.encoding
        entry.records += encoded.n_records - (len(keep) - n_seen)
        entry.kept += kept
        entry.duplicates += n_seen - kept
        entry.bytes += int(encoded.n_bytes[keep].sum())
        entry.tokens += int(encoded.lengths[keep].sum())
        entry.characters += int(encoded.n_characters[keep].sum())
        for line, reason, unread in encoded.skipped:
            entry.skip(line, reason, unread=unread)
        for number, (_, language) in enumerate(encoded.groups):
            chosen = keep & (encoded.group == number)
            counts = self.languages.setdefault(
                language, {"documents": 0, "tokens": 0, "bytes": 0, "characters": 0}
            )
            counts["documents"] += int(chosen.sum())
            counts["tokens"] += int(encoded.lengths[chosen].sum())
            counts["bytes"] += int(encoded.n_bytes[chosen].sum())
            counts["characters"] += int(encoded.n_characters[chosen].sum())

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> PrepareReport:
        inputs = [InputReport(**entry) for entry in saved["inputs"]]
        return cls(**{**saved, "inputs": inputs})


def format_report(report: PrepareReport) -> str:
    """The report for people, as several lines."""
    lines = []
    if report.already_prepared:
        lines.append("already prepared")
    for entry in report.inputs:
        lines += entry.lines()
    for language, counts in sorted(report.languages.items()):
        lines.append(
            f"{language}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes'] / 1e6:.1f} MB, "
            f"{report.characters_per_token(language):.2f} characters per token"
        )
    lines.append(
        f"total: {report.documents:,} documents, {report.tokens:,} tokens, "
        f"{report.bytes / 1e6:.1f} MB of text in {report.seconds:.1f} s"
    )
    return "\n".join(lines)


def identity(path: Path) -> list[Any]:
    """Name, size and time of an input."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest as a dict. Raises DataError when it is missing, broken or of another format."""
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        unfinished = (directory / ".prepare").is_dir()
        raise DataError(
            f"{directory} is not a prepared directory: it has no manifest.json",
            hint="its preparation was interrupted: run `khaosz data prepare` again"
            if unfinished
            else "run `khaosz data prepare` first",
        ) from error
    except (OSError, ValueError) as error:
        reason = disk_error(error, path)
        raise DataError(f"cannot read {reason}", hint="prepare the data again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise DataError(
            f"{path} is not a manifest of format {MANIFEST_FORMAT}",
            hint="prepare the data again with this version",
        )
    missing = {"stage", "vocab_size", "tokenizer", "groups", "configuration", "report"} - set(
        manifest
    )
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}", hint="prepare the data again")
    return manifest


@dataclass(frozen=True)
class Group:
    """All documents of one (split, source, language); `bytes` counts their UTF-8 text."""

    split: str
    source: str
    lang: str
    shards: list[MmapFileHandler]
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class PreparedData:
    """A prepared directory, every shard open. `fingerprint` is that of its tokenizer."""

    directory: Path
    stage: Stage
    vocab_size: int
    fingerprint: str
    groups: list[Group]

    @property
    def tokenizer_dir(self) -> Path:
        return self.directory / "tokenizer"

    def lengths(self, split: str) -> list[int]:
        """Tokens of every document."""
        shards = [shard for group in self.groups if group.split == split for shard in group.shards]
        spans = (shard.document_span(i) for shard in shards for i in range(len(shard)))
        return [end - start for start, end in spans]

    def content(self, split: str) -> str:
        """A hash of a split's tokens by the checksums in the shards' headers, which `verify`
        compares with the tokens."""
        return fingerprint(
            [
                (group.source, group.lang, shard.header)
                for group in self.groups
                if group.split == split
                for shard in group.shards
            ]
        )

    @classmethod
    def open(cls, directory: str | Path) -> PreparedData:
        """Raises DataError for a bad manifest, TokenFileError for a shard that contradicts it."""
        directory = Path(directory)
        manifest = read_manifest(directory)
        expected = (manifest["stage"], manifest["vocab_size"], manifest["tokenizer"])
        groups = []
        for entry in manifest["groups"]:
            names = (entry["split"], entry["source"], entry["lang"])
            shards = []
            for name in entry["shards"]:
                if Path(name).name != name:
                    raise DataError(
                        f"{directory / 'manifest.json'}: shard {name!r} is not a file name"
                    )
                shard = MmapFileHandler(directory / name)
                if (shard.stage, shard.vocab_size, shard.fingerprint) != expected:
                    raise TokenFileError(
                        f"{shard.path} was made with another tokenizer or stage than its manifest",
                        hint="prepare the data again",
                    )
                shards.append(shard)
            counts = (sum(map(len, shards)), sum(shard.n_tokens for shard in shards))
            if counts != (entry["documents"], entry["tokens"]):
                raise TokenFileError(
                    f"{directory}: group {'-'.join(names)} holds "
                    f"{counts[0]} documents, its manifest says {entry['documents']}",
                    hint="prepare the data again",
                )
            groups.append(Group(*names, shards, *counts, entry["bytes"]))
        return cls(
            directory, manifest["stage"], manifest["vocab_size"], manifest["tokenizer"], groups
        )

    def verify(self) -> None:
        """Read every token. Raises TokenFileError for shards that were damaged."""
        for group in self.groups:
            for shard in group.shards:
                shard.verify()

    def close(self) -> None:
        for group in self.groups:
            for shard in group.shards:
                shard.close()
