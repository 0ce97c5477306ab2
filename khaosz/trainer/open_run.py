"""What the stages of training share when a run is opened; a stage adds its data and its strategy
(`stages/assembly.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from khaosz.config import ModelConfig, TrainConfig, preset, save_config, size_for_minutes
from khaosz.config.presets import Derived, nearest_size, training_numbers
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.errors import CheckpointError, ConfigError, ModelError
from khaosz.files import write_json
from khaosz.inference.linear.frozen import frozen_model
from khaosz.interop.adapter import base_fingerprint, load_adapter
from khaosz.interop.huggingface import is_reward_model, load_reward_model
from khaosz.interop.huggingface_config import model_type
from khaosz.interop.models import load_model, model_config, open_model
from khaosz.memory.machine import return_large_blocks
from khaosz.model import RewardModel, Transformer, weights_fingerprint
from khaosz.model.lora import add_lora, named_adapters
from khaosz.parallel import ParallelContext
from khaosz.trainer.calibration import _total_steps, calibrate, rows_per_step
from khaosz.trainer.callback import (
    Budget,
    Callback,
    Checkpointing,
    EarlyStop,
    Evaluate,
    ProgressLine,
    Summary,
    Validation,
    matmul_peak,
)
from khaosz.trainer.checkpoint import ADAPTER, SavedState, restore
from khaosz.trainer.corpus import tokenizer_for
from khaosz.trainer.extension import extended_plan, with_lengths
from khaosz.trainer.loggers import ExternalLogger, JsonLines, Sample, Samples
from khaosz.trainer.optimizer import build_optimizers
from khaosz.trainer.random_state import seed_random_state
from khaosz.trainer.strategy import Strategy
from khaosz.trainer.train_context import Plan, Progress, Rollouts, TrainContext
from khaosz.trainer.validation import check_prompts


@dataclass(frozen=True)
class RunOrigin:
    """What a run starts from: nothing, another model, or its own checkpoint."""

    config: TrainConfig
    checkpoint: Path | None = None
    saved: SavedState | None = None
    lengths: dict[str, float] = field(default_factory=dict)  # what a finished run is extended to

    @property
    def model(self) -> Path | None:
        """The initial weights; adapters are loaded onto the model that they were trained on."""
        if self.config.lora is not None or self.checkpoint is None:
            return self.config.init_from
        return self.checkpoint


def open_run(origin: RunOrigin, parallel: ParallelContext, console: Console) -> OpenRun:
    """A run with its output directory, size and tokenizer. Raises `ConfigError`."""
    config = origin.config
    config.out.mkdir(parents=True, exist_ok=True)
    derived: list[Derived] = []
    if origin.saved is None:
        config, derived = with_size(config, parallel)
        tokenizer = tokenizer_for(config, config.init_from, parallel, console)
    else:  # the checkpoint has both, wherever the others went
        assert origin.checkpoint is not None
        tokenizer = load_tokenizer(origin.checkpoint)
    run = OpenRun(origin, parallel, console, config, tokenizer, derived)
    run.record("tokenizer", tokenizer.fingerprint)
    named, began = config.tokenizer, run.fingerprints["tokenizer"]["hash"]
    resumed = origin.saved is not None
    if resumed and named and named.exists() and load_tokenizer(named).fingerprint != began:
        console.print(f"  {named} is another tokenizer now: using the checkpoint's own")
    return run


@dataclass
class OpenRun:
    """A run that is being assembled. `load_model` completes `config` and sets `model`."""

    origin: RunOrigin
    parallel: ParallelContext
    console: Console
    config: TrainConfig
    tokenizer: Tokenizer
    derived: list[Derived] = field(default_factory=list)
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)
    model: Transformer = field(init=False)

    def record(self, name: str, fingerprint: str, place: Path | None = None) -> bool:
        """Note what the run depends on, for its checkpoints. False if a resumed run began with
        something else."""
        now = (
            {"hash": fingerprint, "path": str(place.resolve())} if place else {"hash": fingerprint}
        )
        before = self.origin.saved.fingerprints.get(name, now) if self.origin.saved else now
        self.fingerprints[name] = before
        return before["hash"] == fingerprint

    def record_model(self, name: str, path: Path | None, model: Transformer) -> None:
        """`record` the weights of a model that a resumed run loads again, from the recipe's key
        `name`. Raises `CheckpointError` for other weights than those that the run began with."""
        if name in self.fingerprints or self.parallel.local_rank:
            return
        if model.stored_head is None:
            weights = weights_fingerprint(model)
        else:  # its matrices are not parameters
            assert path is not None
            weights = base_fingerprint(open_model(path))
        if not self.record(name, weights, path):
            was = self.fingerprints[name].get("path")
            raise CheckpointError(
                f"{name}: {path} is another model than the one that the run began with",
                hint=f"name that one with {name}= (it was {was}; a link such as last moves)",
            )

    @property
    def window(self) -> int:
        assert self.config.window is not None, "load_model sets it"
        return self.config.window

    def load_model(self) -> None:
        """Load or create the model (of `rm` a reward model), add its adapters, and derive every
        number that the recipe leaves open. Raises `ConfigError`, `ModelError`."""
        origin = self.origin
        model = initial_model(self.config, origin.model, self.tokenizer, self.parallel)
        if self.config.lora is not None:
            self.record_model("init_from", self.config.init_from, model)
        self.config, derived = with_training_numbers(
            self.config, model.config, self.tokenizer.vocab_size, loaded=origin.model is not None
        )
        check_prompts(self.config, self.tokenizer, model.config.max_position_embeddings)
        if self.config.stage == "rm":
            model = _as_reward_model(model, self.config.seed)
        _add_adapters(model, origin, self.config)
        model.gradient_checkpointing = self.config.gradient_checkpointing
        self.model = model
        unused = set() if self.config.stage in ("pt", "sft") else {"batch_tokens", "vocab_size"}
        for number in [*self.derived, *derived]:
            if number.name not in unused:
                line = f"  {number.name} = {number.value}  [dim]{number.reason}[/dim]"
                self.console.print(line, highlight=False)

    def check_data(
        self, examples: int, unit: str, fingerprint: str, *, same_world: bool = False
    ) -> None:
        """Raises `CheckpointError` when a resumed run reads other data than before, or with
        `same_world` runs on another number of processes."""
        saved, world = self.origin.saved, self.parallel.world
        is_same = self.record("data", fingerprint, self.config.data)
        if saved is None:
            return
        if saved.windows != examples:
            raise CheckpointError(
                f"the data holds {examples:,} {unit}, the run began with {saved.windows:,}",
                hint="resume with the data it was started with",
            )
        if not is_same:
            raise CheckpointError(
                f"{self.config.data} holds other {unit} than those that the run began with",
                hint="resume with the data it was started with",
            )
        if saved.world != world and same_world:
            raise CheckpointError(
                f"{world} processes, the run began with {saved.world}",
                hint="resume with the number of processes it was started with",
            )
        if saved.world != world:
            self.console.print(
                f"  {world} processes now, {saved.world} before: the same batches, summed in"
                " another order, so not bit-identical"
            )

    def rows(self) -> tuple[int, int]:
        """Rows per optimizer step and per forward pass: the checkpoint's, or as configured."""
        if self.origin.saved is not None:
            return self.origin.saved.plan.rows, self.origin.saved.plan.micro_rows
        return rows_per_step(self.config, self.parallel, self.model.config.hidden_size)

    def saved_plan(self, total_steps: Callable[[TrainConfig, float], int]) -> Plan | None:
        """The checkpoint's plan, extended if the run is, or None. `total_steps`: those of a recipe,
        with the seconds that a step has taken so far."""
        saved, lengths = self.origin.saved, self.origin.lengths
        if saved is None or not lengths:
            return saved.plan if saved else None
        done = saved.progress
        seconds = done.seconds / max(1, done.step)
        before, self.config = self.config, with_lengths(self.config, lengths)
        return extended_plan(
            saved.plan, done.step, before, self.config, lambda config: total_steps(config, seconds)
        )

    def plan(self, strategy: Strategy, rows: int, micro: int) -> Plan:
        """The checkpoint's plan, or a calibrated one."""
        saved = self.saved_plan(
            lambda config, seconds: _total_steps(config, strategy, rows, seconds)
        )
        if saved is not None:
            return saved
        return calibrate(
            self.model, self.config, self.parallel, strategy, rows, micro, self.console
        )

    def context(
        self, plan: Plan, strategy: Strategy, examples: int, rollouts: Rollouts | None = None
    ) -> TrainContext:
        """The run at its start, or as its checkpoint left it. `examples`: what an epoch visits."""
        saved, models = self.origin.saved, (self.model, strategy.critic)
        context = TrainContext(
            config=self.config,
            model=self.model,
            tokenizer=self.tokenizer,
            parallel=self.parallel,
            plan=plan,
            optimizers=[
                optimizer
                for model in models
                if model is not None
                for optimizer in build_optimizers(model, self.config, dtype=plan.torch_dtype)
            ],
            windows=examples,
            fingerprints=self.fingerprints,
            progress=saved.progress if saved else Progress(),
            critic=strategy.critic,
            rollouts=rollouts,
        )
        if self.origin.lengths:
            context.progress.evaluations_without_gain = 0
        restore_or_seed(context, self.origin.checkpoint)
        return context

    def callbacks(
        self,
        context: TrainContext,
        strategy: Strategy,
        curve: Callback,
        evaluate: Evaluate | None = None,
        *,
        unit: str | None = None,
        samples: Sample | None = None,
    ) -> list[Callback]:
        """The callbacks of every stage in their order. `evaluate`: scores held-out data; `unit`:
        what a step consists of, if not of tokens."""
        config, plan, console = self.config, context.plan, self.console
        callbacks: list[Callback] = []
        if evaluate is not None:
            callbacks.append(Validation(evaluate, eval_every(context)))
            if config.early_stop is not None:
                callbacks.append(EarlyStop(config.early_stop))
        elif config.early_stop is not None:
            raise ConfigError(
                f"early_stop={config.early_stop}, but no data was held out",
                hint="name held-out data with val=, or raise val_fraction",
            )
        if config.max_minutes is not None and config.max_steps is None:
            without = None if evaluate is not None else config.save_every or plan.tenth
            callbacks.append(Budget(console, without))
        if self.parallel.is_main:
            flops = self.model.config.flops_per_token(self.window)
            peak = matmul_peak(self.parallel.device, plan.torch_dtype)
            every, out = config.log_every, config.out
            callbacks.append(
                ProgressLine(console, every, flops, peak, strategy.progress_metrics, unit)
            )
            callbacks.append(JsonLines(out / "metrics.jsonl", every))
            callbacks += [ExternalLogger(name, out, every) for name in config.loggers]
            if config.prompts and samples is not None:
                every = config.sample_every or eval_every(context)
                path = out / "samples.jsonl"
                callbacks.append(Samples(path, samples, config.prompts, every, console))
        every, seconds = config.save_every or plan.tenth, 60 * config.save_minutes
        callbacks.append(Checkpointing(every, seconds))
        if self.parallel.is_main:
            callbacks += [curve, Summary(console)]
        return callbacks


def eval_every(context: TrainContext) -> int:
    """A tenth of the run, at least 5 steps: a short run is for training, not for evaluation."""
    return context.config.eval_every or context.plan.tenth


def restore_or_seed(context: TrainContext, checkpoint: Path | None) -> None:
    """Restore a checkpoint's state or seed a new run, and store configuration and plan."""
    if checkpoint is not None:
        restore(context, checkpoint)
    else:
        seed_random_state(context.config.seed, context.parallel)
    if context.parallel.is_main:
        save_config(context.config, context.config.out / "train_config.json")
        write_json(context.config.out / "plan.json", asdict(context.plan))


def with_size(
    config: TrainConfig, parallel: ParallelContext, initial: ModelConfig | None = None
) -> tuple[TrainConfig, list[Derived]]:
    """The configuration with its size: the recipe's, the nearest to the initial model's, or the one
    for `max_minutes`. `initial`: that model's shape, by default read from `init_from`."""
    derived: list[Derived] = []
    size = config.size
    if size == "auto" or (size is None and config.init_from is None):
        accelerated = parallel.device.type != "cpu"
        derived = [size_for_minutes(config.max_minutes or 10.0, accelerator=accelerated)]
        size = str(derived[0].value)
    if config.init_from is not None:
        size = nearest_size((initial or model_config(config.init_from)).hidden_size)
    assert size is not None
    return config.updated(size=size), derived


def initial_model(
    config: TrainConfig, directory: Path | None, tokenizer: Tokenizer, parallel: ParallelContext
) -> Transformer:
    """The model in `directory`, or without one a new model of the recipe's size, the same for the
    same seed. Raises `ConfigError`."""
    assert config.size is not None
    if directory is not None:
        reward = config.stage == "rm" and is_reward_model(directory)
        load = load_reward_model if reward else load_model
        model: Transformer
        if config.keeps_file:
            return_large_blocks()
            model = frozen_model(open_model(directory))
        else:
            model = load(directory, device=parallel.device)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"{directory} has a vocabulary of {model.config.vocab_size}, the tokenizer"
                f" {tokenizer.vocab_size}",
                hint="leave tokenizer= out: the model brings its own",
            )
        return model
    model = Transformer(new_shape(config, tokenizer.vocab_size))
    model.initialise(torch.Generator().manual_seed(config.seed))
    return model.to(parallel.device)


def new_shape(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The shape of a new model: that of its size, with the recipe's [model]. Raises
    `ConfigError`."""
    assert config.size is not None
    shape = preset(config.size, vocab_size=vocab_size, stage=config.stage).model
    if config.window is not None and config.window > shape.max_position_embeddings:
        shape = shape.updated(max_position_embeddings=config.window)
    if not config.model:
        return shape
    shape = ModelConfig.parse({**shape.model_dump(), **config.model}, source="[model]")
    try:
        model_type(shape)
    except ModelError as error:
        raise ConfigError(f"[model]: {error}", hint="leave some of them out") from None
    width, heads = shape.hidden_size, shape.num_attention_heads
    changed = config.model.keys() & {"hidden_size", "num_attention_heads", "head_dim"}
    if changed and "head_dim" not in changed and width % heads:
        raise ConfigError(
            f"[model]: hidden_size ({width}) is not a multiple of num_attention_heads ({heads})",
            hint="choose a multiple, or set head_dim too",
        )
    if shape.vocab_size < vocab_size:
        raise ConfigError(
            f"[model]: vocab_size={shape.vocab_size} is less than the {vocab_size} tokens of the"
            " tokenizer",
            hint="leave vocab_size out of [model]: it is the tokenizer's",
        )
    return shape


def with_training_numbers(
    config: TrainConfig, shape: ModelConfig, vocab_size: int, *, loaded: bool
) -> tuple[TrainConfig, list[Derived]]:
    """The configuration with every number filled in, and those that the recipe leaves open, each
    with its reason. A loaded model has its shape already. Raises `ConfigError`."""
    assert config.size is not None
    derived = preset(config.size, vocab_size=vocab_size, stage=config.stage).derived
    if loaded:
        derived = [d for d in derived if d.name in ("window", "batch_tokens")]
        derived += training_numbers(shape.hidden_size, config.stage)
    values = {d.name: d.value for d in derived}
    changes = {
        name: values[name]
        for name in ("window", "batch_tokens", "lr", "embedding_lr", "weight_decay")
        if getattr(config, name) is None
    }
    if (config.optimizer == "adamw" or config.lora is not None) and config.lr is None:
        changes["lr"] = changes.get("embedding_lr", config.embedding_lr)
        why = "AdamW: as embedding_lr"
        derived = [Derived("lr", changes["lr"], why) if d.name == "lr" else d for d in derived]
    derived = [d for d in derived if getattr(config, d.name, None) is None]
    if config.model:
        millions = f"{shape.parameters() / 1e6:,.1f}M"
        derived.append(Derived("parameters", millions, "with the recipe's model table"))
    config = config.updated(**changes)
    assert config.window is not None
    if config.window > shape.max_position_embeddings:
        raise ConfigError(
            f"window={config.window} is longer than the model's context"
            f" of {shape.max_position_embeddings}"
        )
    return config, derived


def _as_reward_model(model: Transformer, seed: int) -> RewardModel:
    if isinstance(model, RewardModel):
        return model
    return RewardModel.from_transformer(model, torch.Generator().manual_seed(seed))


def _add_adapters(model: Transformer, origin: RunOrigin, config: TrainConfig) -> None:
    """Freeze the model and add the recipe's adapters, with the checkpoint's weights if there is
    one. The head of a reward model is new: it is trained as a whole."""
    if config.lora is None:
        return
    if origin.checkpoint is None:
        add_lora(model, config.lora, torch.Generator().manual_seed(config.seed))
    else:
        load_adapter(model, origin.checkpoint / ADAPTER, base=config.lora.base)
        for layer in named_adapters(model).values():
            targets = layer.config.target_modules
            layer.config = config.lora.updated(target_modules=targets)
    if isinstance(model, RewardModel):
        model.score.requires_grad_(True)
        if origin.checkpoint is not None:
            stored = load_reward_model(origin.checkpoint, device=model.score.weight.device)
            model.score.load_state_dict(stored.score.state_dict())
