"""The tokenizer and the prepared data of a run; raw data is prepared on the fly."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from khaosz.config import TrainConfig, preset
from khaosz.data.records.texts import read_interleaved
from khaosz.data.shards.manifest import PreparedData
from khaosz.data.shards.prepare import prepare, shown_progress
from khaosz.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from khaosz.errors import DataError
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
        return load_tokenizer(initial)
    if is_prepared(config.data):
        return load_tokenizer(PreparedData.open(config.data).tokenizer_dir)
    directory = config.out / "tokenizer"
    if parallel.is_main and not (directory / "tokenizer.json").exists():
        assert config.size is not None
        vocab_size = config.vocab_size or preset(config.size).model.vocab_size
        with console.status(f"training a tokenizer of {vocab_size:,} tokens on {config.data}"):
            trained = train_tokenizer(
                read_interleaved([config.data]),
                vocab_size,
                max_bytes=min(48_000_000, _BYTES_PER_MERGE * vocab_size),
            )
        trained.save(directory)
        console.print(f"  tokenizer of {trained.vocab_size:,} tokens: {directory}", highlight=False)
    parallel.barrier()
    return load_tokenizer(directory)


def prepared_data(
    config: TrainConfig, tokenizer: Tokenizer, parallel: ParallelContext, console: Console
) -> PreparedData:
    """The data of a run as token shards; raw inputs are prepared into OUT/data.

    Raises `DataError` when the data was prepared with another tokenizer or for another stage.
    """
    data = _opened(
        config, config.data, config.out / "data", config.val_fraction, tokenizer, parallel, console
    )
    if data.stage != config.stage:
        raise DataError(
            f"{config.data} holds {data.stage} data, the recipe's stage is {config.stage}",
            hint="pretraining reads texts, fine-tuning reads conversations",
        )
    return data


def validation_data(
    config: TrainConfig,
    prepared: PreparedData,
    tokenizer: Tokenizer,
    parallel: ParallelContext,
    console: Console,
) -> tuple[PreparedData, str]:
    """Held-out data and its split: `val` if the recipe names one, else the part of the training
    data that preparation held out."""
    if config.val is None:
        return prepared, "val"
    data = _opened(config, config.val, config.out / "val", 0.0, tokenizer, parallel, console)
    return data, "train"


def _opened(
    config: TrainConfig,
    path: Path,
    out: Path,
    val_fraction: float,
    tokenizer: Tokenizer,
    parallel: ParallelContext,
    console: Console,
) -> PreparedData:
    if not is_prepared(path):
        if parallel.is_main:
            with shown_progress(console) as progress:
                prepare(
                    [path],
                    tokenizer,
                    out,
                    stage="pt" if config.stage == "pt" else "sft",
                    val_fraction=val_fraction,
                    dedup=config.dedup,
                    progress=progress,
                )
        parallel.barrier()
        path = out
    data = PreparedData.open(path)
    if data.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{path} was prepared with another tokenizer",
            hint="prepare it again with this one, or leave tokenizer= out",
        )
    return data
