"""The tokenizer and the prepared data of a run; raw data is prepared on the fly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from khaosz.config import TrainConfig, preset
from khaosz.data.records.readers import expand_inputs
from khaosz.data.records.report import InputReport, refuse_unread, summary
from khaosz.data.records.texts import read_interleaved
from khaosz.data.shards.manifest import PreparedData, PrepareReport, identity, read_manifest
from khaosz.data.shards.prepare import change_of, prepare, prepared_from, shown_progress
from khaosz.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from khaosz.errors import DataError
from khaosz.files import write_atomic
from khaosz.interop.models import open_tokenizer
from khaosz.parallel import ParallelContext

# Bytes of text per merge; more text only takes longer.
_BYTES_PER_MERGE = 1_500


def is_prepared(path: Path) -> bool:
    return path.is_dir() and (path / "manifest.json").exists()


def tokenizer_for(
    config: TrainConfig, initial: Path | None, parallel: ParallelContext, console: Console
) -> Tokenizer:
    """The tokenizer of a run: the recipe's, the initial model's, the prepared data's, or one
    trained on the data (stored in OUT/tokenizer)."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if initial is not None:
        return open_tokenizer(initial)
    if is_prepared(config.data):
        return load_tokenizer(PreparedData.open(config.data).tokenizer_dir)
    directory = config.out / "tokenizer"
    if parallel.is_main:
        _train_tokenizer(config, directory, console)
    parallel.barrier()
    return load_tokenizer(directory)


def _train_tokenizer(config: TrainConfig, directory: Path, console: Console) -> None:
    """Unless there is one of the same data and size: a start that was interrupted may have had
    others."""
    assert config.size is not None
    vocab_size = config.vocab_size or preset(config.size).model.vocab_size
    origin = directory / "trained_on.json"
    is_there = (directory / "tokenizer.json").exists()
    if is_there and not config.data.exists():
        return
    inputs = [identity(path) for path in expand_inputs([config.data])]
    facts = {"vocab_size": vocab_size, "inputs": inputs}
    if is_there and origin.exists() and origin.read_text("utf-8") == json.dumps(facts):
        return
    reports: list[InputReport] = []
    with console.status(f"training a tokenizer of {vocab_size:,} tokens on {config.data}"):
        trained = train_tokenizer(
            read_interleaved([config.data], reports, config.columns),
            vocab_size,
            max_bytes=min(48_000_000, _BYTES_PER_MERGE * vocab_size),
            after_reading=lambda: refuse_unread(reports, config.allow_unread),
        )
    origin.unlink(missing_ok=True)
    trained.save(directory)
    write_atomic(origin, [json.dumps(facts).encode()])
    console.print(f"  tokenizer of {trained.vocab_size:,} tokens: {directory}", highlight=False)


@dataclass(frozen=True)
class Corpus:
    """The data of a run as token shards; raw inputs are prepared into its output directory."""

    config: TrainConfig
    tokenizer: Tokenizer
    parallel: ParallelContext
    console: Console
    resumed: bool = False  # then its checkpoint says whether the prepared data is the same

    def training_data(self) -> PreparedData:
        """Raises `DataError` when the data was prepared with another tokenizer or for another
        stage."""
        config = self.config
        data = self._opened(config.data, config.out / "data", config.val_fraction)
        if data.stage != config.stage:
            raise DataError(
                f"{config.data} holds {data.stage} data, the recipe's stage is {config.stage}",
                hint="pretraining reads texts, fine-tuning reads conversations",
            )
        return data

    def validation_data(self, prepared: PreparedData) -> tuple[PreparedData, str]:
        """Held-out data and its split: `val` if the recipe names one, else the part of the training
        data that preparation held out."""
        if self.config.val is None:
            return prepared, "val"
        return self._opened(self.config.val, self.config.out / "val", 0.0), "train"

    def _opened(self, path: Path, out: Path, val_fraction: float) -> PreparedData:
        written_now = False
        if not is_prepared(path):
            if self.resumed and is_prepared(out) and prepared_from(out, path):
                if self.parallel.is_main and (change := change_of(out, path)):
                    what = "is gone" if change == "gone" else "has changed since"
                    self.console.print(
                        f"  {path} {what}: using {out}, which was prepared from it",
                        soft_wrap=True,
                    )
            elif self.parallel.is_main:
                written_now = True
                with shown_progress(self.console) as progress:
                    prepare(
                        [path],
                        self.tokenizer,
                        out,
                        stage="pt" if self.config.stage == "pt" else "sft",
                        val_fraction=val_fraction,
                        dedup=self.config.dedup,
                        progress=progress,
                        columns=self.config.columns,
                        allow_unread=self.config.allow_unread,
                    )
            self.parallel.barrier()
            path = out
        self._print(summary(PrepareReport.from_dict(read_manifest(path)["report"]).inputs))
        data = PreparedData.open(path)
        if data.fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"{path} was prepared with another tokenizer",
                hint="prepare it again with this one, or leave tokenizer= out",
            )
        if self.parallel.local_rank == 0 and not written_now:
            with self.console.status(f"verifying {path}"):
                data.verify()
        return data

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            self.console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
