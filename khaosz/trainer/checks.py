"""What can be refused before any work: the checks of all stages of a recipe, in their order.

A recipe of several stages may run for hours before the last one starts, and each stage reads and
prepares its data before it computes. So everything that is known from the recipe, from files that
exist and from this machine is checked first. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from khaosz.config import PAIR_STAGES, ROLLOUT_STAGES, ModelConfig, TrainConfig, preset
from khaosz.config.presets import Derived
from khaosz.config.stages import TEXT_STAGES
from khaosz.data.records.layouts import Kind, read_record
from khaosz.data.records.preference import to_prompt
from khaosz.data.records.readers import Skip, expand_inputs, open_source, parsed
from khaosz.data.records.report import (
    InputReport,
    LeftOut,
    refuse_unread,
    summary,
    usable_records,
    worst_reason,
)
from khaosz.data.shards.manifest import PreparedData, PrepareReport, read_manifest
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.data.tokenizer.tokenizer import check_vocab_size
from khaosz.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    KhaoszError,
    ModelError,
)
from khaosz.interop.gguf.file import is_gguf
from khaosz.interop.huggingface import is_reward_model, weight_files
from khaosz.interop.huggingface_config import check_rotary
from khaosz.interop.models import model_config, open_tokenizer
from khaosz.parallel import ParallelContext
from khaosz.parallel.setup import device_type, world_size
from khaosz.trainer.calibration import compiler_problem, rows_per_step
from khaosz.trainer.checkpoint import has_checkpoints, step_of
from khaosz.trainer.corpus import is_prepared
from khaosz.trainer.loggers import logger_module
from khaosz.trainer.memory import check_stage_memory
from khaosz.trainer.open_run import new_shape, with_size, with_training_numbers
from khaosz.trainer.stages.lengths import chat_lengths, derives_window, window_for
from khaosz.trainer.stages.limits import (
    PREFERENCE_PAIRS,
    TEXT_PAIRS,
    check_context,
    check_pairs_per_step,
    check_room,
    check_texts_per_step,
    embedded_length,
)
from khaosz.trainer.stages.reward_sources import check_same_tokenizer, load_function
from khaosz.trainer.validation import check_prompts

_EXAMPLES = Path("runs/demo/corpus")  # where the shipped recipes expect their data


@dataclass(frozen=True)
class CheckedStage:
    """A stage that passed its checks, as far as it is known before work.

    config     with every number that the recipe leaves open
    derived    those numbers, each with its reason
    shape      the network; its vocabulary is the recipe's if the tokenizer is still to be trained
    tokenizer  None if this stage or an earlier one still has to train it
    parallel   device and world size, without a process group
    memory     the sum of what it will need, in one line; None where that is not known
    """

    config: TrainConfig
    derived: list[Derived] = field(repr=False)
    shape: ModelConfig
    tokenizer: Tokenizer | None = field(repr=False)
    parallel: ParallelContext
    memory: str | None

    def lines(self) -> list[str]:
        """What is derived, each with its reason, for people."""
        config, start = self.config, "random weights"
        if config.init_from is not None:
            start = str(config.init_from)
        lines = [f"{config.stage}: {config.data} -> {config.out}, from {start}"]
        lines += [f"  {one.name} = {one.value}  {one.reason}" for one in self.derived]
        if self.tokenizer is None:
            lines.append("  tokenizer: trained on the data, or by an earlier stage")
        count, active = self.shape.parameters(), self.shape.active_parameters()
        some = f", {active:,} of them for a token" if active < count else ""
        lines.append(f"  parameters: {count:,}{some}")
        lines.append(f"  device: {self.parallel.device}, {self.parallel.world} processes")
        steps = "measured and counted when the run starts"
        if config.max_steps is not None:
            steps = f"{config.max_steps:,} at most (max_steps)"
        return [*lines, f"  steps: {steps}"]


def check_stages(configs: Sequence[TrainConfig], *, resume: bool = False) -> list[CheckedStage]:
    """Check all stages of a recipe before any of them does any work, and return what is known of
    each. Stages that `resume` will skip or continue are left out.

    Raises the `KhaoszError` that the stage would end with later. Writes nothing.
    """
    checked: list[CheckedStage] = []
    for i, config in enumerate(configs):
        with _named(config, several=len(configs) > 1):
            checked += _check(config, _Earlier(configs[:i], checked), resume)
    return checked


@contextmanager
def _named(config: TrainConfig, several: bool) -> Iterator[None]:
    try:
        yield
    except KhaoszError as error:
        if several:
            error.args = (f"stage {config.stage}: {error}",)
        raise


_KINDS: dict[str, tuple[Kind, ...]] = {
    "pt": ("text",),
    "sft": ("chat",),
    "rm": ("comparison", "rated"),
    "dpo": ("comparison", "rated"),
    "embed": ("passages",),
}


def _check_layout(config: TrainConfig, path: Path) -> None:
    """Raises `DataError` if none of the first records of any file can be read in this stage."""
    entries = [InputReport(str(file)) for file in expand_inputs([path])]
    hint = None
    for entry in entries:
        batch = next(open_source(entry.path, config.columns, every_column=True), None)
        for line, record in parsed(batch) if batch else ():
            try:
                if isinstance(record, Skip):
                    raise DataError(record.reason)
                _read(config, record)
                return
            except LeftOut:
                return
            except (DataError, RecursionError) as error:
                entry.skip(line, str(error))
                hint = getattr(error, "hint", None)
    if any(entry.skipped for entry in entries) and not config.allow_unread:
        raise DataError(
            f"{path}: none of the first records can be read{worst_reason(entries)}", hint=hint
        )


def _read(config: TrainConfig, record: object) -> None:
    """Raises `DataError` for a record that cannot be read in this stage."""
    if config.stage in ROLLOUT_STAGES:
        to_prompt(record, config.columns)
    else:
        read_record(record, _KINDS[config.stage], config.columns)


def read_data(config: TrainConfig) -> Iterator[str]:
    """Read all records of a stage and report, in lines for people, which cannot be read. Data that
    an earlier stage will write is left out. Raises `DataError` as the stage would: if more than
    1 % cannot be read and the recipe does not allow it."""
    for path in (config.data, config.val):
        if path is None:
            continue
        if config.stage in TEXT_STAGES and is_prepared(path):
            yield from summary(PrepareReport.from_dict(read_manifest(path)["report"]).inputs)
        elif path.exists():
            entries = [InputReport(str(file)) for file in expand_inputs([path])]
            every_column = config.stage in ROLLOUT_STAGES
            for entry in entries:
                for line, record in usable_records(
                    entry, config.columns, every_column=every_column
                ):
                    with entry.skipping(line):
                        _read(config, record)
                        entry.kept += 1
            yield from summary(entries)
            refuse_unread(entries, config.allow_unread)


@dataclass(frozen=True)
class _Earlier:
    """The stages before one, from whose models it may start although they do not exist yet."""

    configs: Sequence[TrainConfig]
    checked: Sequence[CheckedStage]

    def under(self, path: Path) -> TrainConfig | None:
        """The stage in whose output directory `path` lies."""
        place = Path(os.path.abspath(path))
        return next((c for c in self.configs if place.is_relative_to(_absolute(c.out))), None)

    def writer(self, path: Path) -> CheckedStage | None:
        """The stage that will write the model at `path`, None if it exists already. Raises
        `ModelError` if no stage does."""
        config = None if path.exists() else self.under(path)
        if config is None:
            return None
        name = str(_absolute(path).relative_to(_absolute(config.out)))
        last = f"use {config.out / 'last'}"
        if name not in ("last", "best"):
            raise ModelError(f"{path}: model directory not found", hint=last)
        if name == "best" and not config.validates:
            raise ModelError(
                f"{path}: stage {config.stage} has no held-out data, so it writes no best"
                " checkpoint",
                hint=f"{last}, or set val or val_fraction",
            )
        return next((one for one in self.checked if one.config.out == config.out), None)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _check(config: TrainConfig, earlier: _Earlier, resume: bool) -> list[CheckedStage]:
    parallel = ParallelContext(torch.device(device_type(config.parallel)), world=world_size())
    if config.compile == "on" and (problem := compiler_problem(parallel.device)):
        raise DeviceError(f"compile=on, but {problem}", hint="install one, or compile=auto")
    for name in config.loggers:
        logger_module(name)
    if config.reward_function is not None:
        load_function(config.reward_function)
    same = [c for c in earlier.configs if _absolute(c.out) == _absolute(config.out)]
    if same:
        raise ConfigError(
            f"out={config.out} is also that of stage {same[0].stage}",
            hint="give every stage a directory of its own",
        )
    _check_out(config.out)
    if has_checkpoints(config.out):
        in_use = not earlier.configs and (config.out / ".lock").exists()
        if resume or in_use:  # the run itself sees whether another process holds the lock
            return []
        raise CheckpointError(
            f"{config.out} already contains a run",
            hint="continue it with --resume, or choose another out=",
        )
    initial, tokenizer = _initial(config, earlier)
    for path in (config.data, config.val):
        if path is not None and earlier.under(path) is None:
            _check_data(config, path)
    sized, derived = with_size(config, parallel, initial)
    assert sized.size is not None
    known = initial.vocab_size if initial else config.vocab_size
    known = tokenizer.vocab_size if tokenizer else known
    vocab_size = known or preset(sized.size).model.vocab_size
    shape = initial or new_shape(sized, vocab_size)
    check_rotary(shape, "[model]" if initial is None else str(config.init_from))
    if derives_window(sized) and tokenizer and (lengths := chat_lengths(sized, tokenizer)):
        derived.append(window_for(lengths, shape.max_position_embeddings))
        sized = sized.updated(window=derived[-1].value)
    sized, numbers = with_training_numbers(sized, shape, vocab_size, loaded=initial is not None)
    _check_sizes(sized, shape, parallel)
    if tokenizer is not None:
        check_prompts(sized, tokenizer, shape.max_position_embeddings)
    _check_other_models(sized, shape, tokenizer, earlier)
    memory = check_stage_memory(config, sized, shape, parallel, known, tokenizer)
    return [CheckedStage(sized, [*derived, *numbers], shape, tokenizer, parallel, memory)]


def _check_out(out: Path) -> None:
    """Raises `ConfigError` if `out` cannot become a directory that this process writes to."""
    place = out.resolve()  # `RUN/last` is a link
    for path in (place, *place.parents):
        if step_of(path) is not None and (path / "train_config.json").exists():
            raise ConfigError(
                f"out={out}: {path} is a checkpoint of another run",
                hint="name a directory outside of it; a run starts from it with init_from=",
            )
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"out={out}: {existing} is a file", hint="name a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"out={out}: {existing} is not writable")


def _check_data(config: TrainConfig, path: Path) -> None:
    """Raises `DataError` for data that is missing, and for prepared data of another stage."""
    text = config.stage in ("pt", "sft")
    if not (text and is_prepared(path)):
        if path.is_relative_to(_EXAMPLES) and not path.exists():
            command = "grounded MODEL" if path.name.startswith("grounded") else "get demo"
            own = "data=FILE" if path == config.data else "val=FILE, hold out a part with val="
            raise DataError(
                f"{path} not found: the recipe's example data",
                hint=f"name your own with {own}, or create it with `khaosz data {command}`",
            )
        _check_layout(config, path)
        return
    prepared = PreparedData.open(path)
    prepared.close()
    if prepared.stage != config.stage:
        raise DataError(
            f"{path} holds {prepared.stage} data, the recipe's stage is {config.stage}",
            hint="pretraining reads texts, fine-tuning reads conversations",
        )


def _initial(config: TrainConfig, earlier: _Earlier) -> tuple[ModelConfig | None, Tokenizer | None]:
    """The shape of the initial model, None for a new one, and the tokenizer if it exists."""
    if config.init_from is None:
        return None, _own_tokenizer(config)
    shape, tokenizer = _model(
        config.init_from, earlier, reward=None if config.stage == "rm" else False
    )
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"{config.init_from} has a vocabulary of {shape.vocab_size}, the tokenizer"
            f" {tokenizer.vocab_size}",
            hint="leave tokenizer= out: the model brings its own",
        )
    return shape, tokenizer


def _model(
    path: Path, earlier: _Earlier, *, reward: bool | None
) -> tuple[ModelConfig, Tokenizer | None]:
    """Shape and tokenizer of a model that exists or that an earlier stage will write. `reward`:
    whether it must be a reward model, None if it may be one. Raises `ModelError`."""
    made = earlier.writer(path)
    is_reward = is_reward_model(path) if made is None else made.config.stage == "rm"
    shape = model_config(path) if made is None else made.shape
    if shape.bidirectional:
        raise ModelError(
            f"{path} is an encoder, which cannot be trained here",
            hint="stage=embed makes an embedder of a language model",
        )
    if reward is not None and is_reward != reward:
        if reward:
            raise ModelError(
                f"{path} is not a reward model",
                hint="train one with stage=rm, or name a one-label sequence classifier",
            )
        raise ModelError(
            f"{path} is a reward model, which does not generate text",
            hint="name it as reward_model=, or in `khaosz eval preference`",
        )
    if made is not None:
        return shape, made.tokenizer
    if not is_gguf(path):
        weight_files(path)  # raises for missing ones
    return shape, open_tokenizer(path)


def _own_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """The tokenizer of a new model, None if it is still to be trained."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if is_prepared(config.data):
        return load_tokenizer(PreparedData.open(config.data).tokenizer_dir)
    if config.vocab_size is not None:
        check_vocab_size(config.vocab_size)
    return None


def _check_sizes(config: TrainConfig, shape: ModelConfig, parallel: ParallelContext) -> None:
    """Raises `ConfigError` for a window or batch that the stage cannot work with."""
    assert config.window is not None
    window, world = config.window, parallel.world
    rows_per_step(config, parallel, shape.hidden_size)
    if config.stage in ROLLOUT_STAGES:
        check_room(config, window, world)
    elif config.stage in PAIR_STAGES:
        check_pairs_per_step(config.batch_pairs or PREFERENCE_PAIRS, world)
    elif config.stage == "embed":
        embedded_length(config, window)
        check_texts_per_step(config.batch_pairs or TEXT_PAIRS, world)


def _check_other_models(
    config: TrainConfig, shape: ModelConfig, tokenizer: Tokenizer | None, earlier: _Earlier
) -> None:
    """Raises `ConfigError` or `ModelError` for a reference or reward model that does not fit."""
    assert config.window is not None
    if config.reference is not None:
        other, its = _model(config.reference, earlier, reward=False)
        if other.vocab_size != shape.vocab_size and None not in (tokenizer, its):
            raise ConfigError(
                f"the reference {config.reference} has a vocabulary of {other.vocab_size},"
                f" the policy {shape.vocab_size}"
            )
        if tokenizer is not None and its is not None:
            check_same_tokenizer(tokenizer, its, config.reference)
    if config.reward_model is not None:
        other, its = _model(config.reward_model, earlier, reward=True)
        if tokenizer is not None and its is not None:
            check_same_tokenizer(tokenizer, its, config.reward_model)
        check_context(other, config.reward_model, config.window)
