"""Fine-tuning and preference tokens/s and peak memory: TRL and us on the same ragged chats.

SFT and DPO of a 17M model (vocabulary 8192, d 384, 8 layers, tied) on chats of 32 to 512 tokens,
lengths uniform, eight chats or pairs a step. Each run is its own process, and contenders alternate
(A B C A B C) so that drift of the machine affects all. TRL is installed in a separate Python:

    python -m bench align --peer-python VENV_WITH_TRL/bin/python --rounds 3

Useful tokens are counted on both sides: every token of every sequence once, its prompt included; a
pair counts both answers, each with its prompt; padding never counts. A third of the shorter
sequence is prompt, which is not trained on. TRL runs the reference in every step; we run it once
before training, and those seconds are spread over one pass of the data (`tokens_per_s`);
`later_tokens_per_s` excludes them, as in a second epoch. `ready_s` holds compilation and
calibration.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.contenders import Runs, in_turns, rows_of, run_json
from bench.machine import as_markdown, describe, peak_rss_mb

_SPECIAL = 16  # ids below are special tokens and occur in no chat
_STAGES = ("sft", "dpo")

# Settings that override TRL's defaults, which are bf16 and gradient checkpointing.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fp32": {"bf16": False, "gradient_checkpointing": False},
    "bf16": {"gradient_checkpointing": False},
}


OURS = "khaosz, defaults"
CONTENDERS = {  # one of `TRL_SETTINGS`, or None for us
    "TRL, defaults": "defaults",
    OURS: None,
    "TRL, fp32, no checkpointing": "fp32",
    "TRL, bf16, no checkpointing": "bf16",
}


# -- the data, the same for both ---------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """One or two token sequences that share a prompt: a chat, or a pair of them."""

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]


def ragged(args: argparse.Namespace) -> list[Sequences]:
    """Enough random sequences for all steps; none repeats."""
    generator = np.random.default_rng(args.seed)
    made = []
    for _ in range(args.batch * (args.warmups + args.steps)):
        size = 1 if args.stage == "sft" else 2
        lengths = generator.integers(args.shortest, args.longest + 1, size=size)
        prompt = int(lengths.min()) // 3
        draw = [
            generator.integers(_SPECIAL, args.vocab, size=n).astype(np.int32)
            for n in (prompt, *(lengths - prompt).tolist())
        ]
        made.append(Sequences(draw[0], tuple(draw[1:])))
    return made


# -- us ----------------------------------------------------------------------------------------


def run_ours(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The real `Trainer.step` as calibration chooses it, batch assembly included."""
    from bench.ours import random_model
    from khaosz.config import ParallelConfig, TrainConfig
    from khaosz.config.presets import nearest_size, preset
    from khaosz.data.tokenizer import train_tokenizer
    from khaosz.parallel import setup_parallel

    size = nearest_size(args.d)
    numbers = preset(size, vocab_size=args.vocab, stage=args.stage)
    average = (args.shortest + args.longest) // 2
    config = TrainConfig(
        stage=args.stage,
        data=folder,
        out=folder,
        size=size,
        window=numbers.window,
        # SFT counts a step in tokens, DPO in pairs; there this only bounds a forward pass.
        batch_tokens=args.batch * average if args.stage == "sft" else numbers.batch_tokens,
        batch_pairs=args.batch,
        lr=numbers.lr,
        embedding_lr=numbers.embedding_lr,
        weight_decay=numbers.weight_decay,
        # Calibration weighs compilation against the length of the run: give it a real one.
        max_minutes=10,
        parallel=ParallelConfig(device="cpu"),
    )
    model = random_model(args, numbers.window)
    # Only its ids are used; no step reads text.
    tokenizer = train_tokenizer(iter(["to be or not to be", "学而时习之，不亦说乎"]), 300)
    parallel = setup_parallel(config.parallel)
    run = _ours_sft if args.stage == "sft" else _ours_dpo
    return run(args, folder, config, model, tokenizer, parallel)


def _ours_sft(
    args: argparse.Namespace, folder: Path, config: Any, model: Any, tokenizer: Any, parallel: Any
) -> dict[str, Any]:
    from rich.console import Console

    from bench.ours import RandomData, RandomGroup
    from khaosz.data.batches.dataset import TokenDataset
    from khaosz.data.shards.mmap import MmapFileHandler, TokenFileWriter
    from khaosz.trainer.calibration import calibrate, rows_per_step
    from khaosz.trainer.strategy import SFTStrategy

    chats = ragged(args)
    path = folder / "random.tok"
    writer = TokenFileWriter(
        path, vocab_size=args.vocab, stage="sft", fingerprint=tokenizer.fingerprint
    )
    tokens = np.concatenate([np.concatenate((c.prompt, c.answers[0])) for c in chats])
    lengths = np.array([len(c.prompt) + len(c.answers[0]) for c in chats])
    mask = np.concatenate(
        [np.repeat((0, 1), (len(c.prompt), len(c.answers[0]))) for c in chats]
    ).astype(np.uint8)
    writer.append(tokens.astype(np.int64), lengths, mask, n_bytes=0)
    writer.close()
    shard = MmapFileHandler(path)
    try:
        data: Any = RandomData([RandomGroup([shard])], stage="sft")
        dataset = TokenDataset.open(data, config.window, pad_id=tokenizer.pad_id, plan_dir=folder)
        rows, micro = rows_per_step(config, parallel, model.config.hidden_size)
        strategy = SFTStrategy(dataset, rows, micro, parallel)
        started = time.perf_counter()
        plan = calibrate(model, config, parallel, strategy, rows, micro, Console(stderr=True))
        ready = time.perf_counter() - started

        def useful(batch: Any) -> int:
            # A chat of L tokens has L - 1 inputs.
            pieces = batch.doc_ids.amax(1) + 1
            return int((batch.doc_ids >= 0).sum() + pieces.sum())

        return _our_steps(args, config, model, tokenizer, parallel, plan, strategy, useful, ready)
    finally:
        shard.close()


def _ours_dpo(
    args: argparse.Namespace, folder: Path, config: Any, model: Any, tokenizer: Any, parallel: Any
) -> dict[str, Any]:
    """Opens a run as `trainer.stages.assembly.assemble_pairs` does, without reading text."""
    from rich.console import Console

    from khaosz.data.records.preference import EncodedPair
    from khaosz.trainer.calibration import apply_plan
    from khaosz.trainer.open_run import OpenRun, RunOrigin
    from khaosz.trainer.stages.assembly import plan_packed
    from khaosz.trainer.stages.dpo import DPOStrategy, reference_logprobs
    from khaosz.trainer.stages.pairs import PairSet
    from khaosz.trainer.stages.reference import add_reference
    from khaosz.trainer.strategy import BatchLayout

    pairs = [EncodedPair(s.prompt, s.answers[0], s.answers[1]) for s in ragged(args)]
    console = Console(stderr=True)
    run = OpenRun(RunOrigin(config), parallel, console, config, tokenizer)
    run.model = model
    layout = BatchLayout(args.batch, run.window, run.rows()[1], tokenizer.pad_id, config.seed)
    strategy = DPOStrategy(PairSet(pairs), PairSet([]), layout, parallel, config=config.preference)
    started = time.perf_counter()
    plan = plan_packed(run, strategy)
    compute = apply_plan(plan, model, config)
    reference_logprobs(model.train(), strategy.micro_batches(0)[0], compute)  # compiles
    ready = time.perf_counter() - started
    started = time.perf_counter()
    add_reference(strategy, strategy.data, model, compute, folder / "reference", console)
    reference = (time.perf_counter() - started) / (args.warmups + args.steps)

    def useful(batch: Any) -> int:
        return int((batch.doc_ids >= 0).sum())

    return _our_steps(
        args, config, model, tokenizer, parallel, plan, strategy, useful, ready, reference
    )


def _our_steps(
    args: argparse.Namespace,
    config: Any,
    model: Any,
    tokenizer: Any,
    parallel: Any,
    plan: Any,
    strategy: Any,
    useful: Callable[[Any], int],
    ready: float,
    reference: float = 0.0,
) -> dict[str, Any]:
    """`reference`: seconds for the reference's numbers of one step's pairs."""
    from bench.ours import open_trainer

    trainer = open_trainer(config, model, tokenizer, parallel, plan, strategy)
    seconds, tokens, cells, loss = 0.0, 0, 0, 0.0
    for step in range(args.warmups + args.steps):
        before = time.perf_counter()
        metrics = trainer.step(step)
        took = time.perf_counter() - before
        assert metrics is not None, trainer.context.stopping
        if step >= args.warmups:
            batches = strategy.micro_batches(step)  # a function of the step: the same once more
            seconds += took
            tokens += sum(map(useful, batches))
            cells += sum(batch.ids.numel() for batch in batches)
            loss = metrics["loss"]
    once = seconds + reference * args.steps
    return {
        **_result(args, tokens, cells, once, loss, ready),
        "later_tokens_per_s": round(tokens / seconds, 1),
        "dtype": plan.dtype,
        "compiled": plan.compiled,
        "parameters": model.config.parameters(),
        "reasons": plan.reasons,
    }


# -- TRL ---------------------------------------------------------------------------------------


def run_trl(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`SFTTrainer` or `DPOTrainer`, its own loop from the second warm-up step to the last."""
    import transformers
    import trl

    model = _trl_model(args, folder)
    kind, configuration = (
        (trl.SFTTrainer, trl.SFTConfig) if args.stage == "sft" else (trl.DPOTrainer, trl.DPOConfig)
    )

    class Counted(kind):  # type: ignore[misc, valid-type]
        useful, cells, loss = 0, 0, 0.0

        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            mask = inputs["attention_mask"]
            self.useful += int(mask.sum())
            self.cells += mask.numel()
            loss = super().training_step(model, inputs, *rest, **more)
            self.loss = loss  # a tensor: reading it at every step would cost time
            return loss

    class Clock(transformers.TrainerCallback):
        """The time and the tokens at the end of every step: loading and logging are between."""

        ends: list[tuple[float, int, int]] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append((time.perf_counter(), trainer.useful, trainer.cells))

    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": args.batch,
        "max_steps": args.warmups + args.steps,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **TRL_SETTINGS[args.setting],
    }
    started = time.perf_counter()
    trainer = Counted(
        model=str(model),
        args=configuration(**settings),
        train_dataset=_trl_data(args),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        callbacks=[Clock()],
    )
    trainer.train()
    ends = Clock.ends
    (start, useful, cells), (done, all_useful, all_cells) = ends[args.warmups - 1], ends[-1]
    result = _result(
        args,
        all_useful - useful,
        all_cells - cells,
        done - start,
        float(trainer.loss),
        ends[0][0] - started,
    )
    return {
        **result,
        "later_tokens_per_s": result["tokens_per_s"],
        "dtype": "bf16" if trainer.args.bf16 else "fp32",
        "compiled": False,
        "parameters": trainer.model.num_parameters(),
        "checkpointing": trainer.args.gradient_checkpointing,
        "trl": trl.__version__,
    }


def _trl_model(args: argparse.Namespace, folder: Path) -> Path:
    """A fresh Llama with transformers' own initialisation, and a tokenizer in which the word
    "t17" is token 17: DPO takes text only."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(args.seed)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words |= {f"t{i}": i for i in range(len(words), args.vocab)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.d,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    path = folder / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _trl_data(args: argparse.Namespace) -> Any:
    import datasets

    if args.stage == "sft":
        return datasets.Dataset.from_list(
            [
                {
                    "input_ids": [*chat.prompt.tolist(), *chat.answers[0].tolist()],
                    "labels": [-100] * len(chat.prompt) + chat.answers[0].tolist(),
                }
                for chat in ragged(args)
            ]
        )

    def words(ids: np.ndarray) -> str:
        return " ".join(f"t{i}" for i in ids.tolist())

    rows = []
    for pair in ragged(args):
        # TRL adds the end token, which takes the place of the last word.
        chosen, rejected = (f" {words(answer[:-1])}" for answer in pair.answers)
        rows.append({"prompt": words(pair.prompt), "chosen": chosen, "rejected": rejected})
    return datasets.Dataset.from_list(rows)


# -- taking turns ------------------------------------------------------------------------------


def _result(
    args: argparse.Namespace, tokens: int, cells: int, seconds: float, loss: float, ready: float
) -> dict[str, Any]:
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "tokens": tokens,
        "useful": round(tokens / cells, 4),
        "seconds": round(seconds, 3),
        "steps": args.steps,
        "peak_rss_mb": peak_rss_mb(),
        "ready_s": round(ready, 2),
        "loss": round(loss, 4),
    }


def run_contender(name: str, stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of one fresh process."""
    names = ("vocab", "d", "layers", "heads", "ffn", "batch", "shortest", "longest", "seed")
    options = [
        part for n in (*names, "steps", "warmups") for part in (f"--{n}", str(vars(args)[n]))
    ]
    setting = CONTENDERS[name]
    if setting is not None:
        options += ["--setting", setting]
    python = sys.executable if setting is None else args.peer_python
    return run_json(
        name,
        [python, "-m", "bench.align", "--stage", stage, *options],
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )


def summarise(results: Runs) -> list[dict[str, Any]]:
    """`rows_of`, with ours relative to each."""
    keys = ("tokens_per_s", "later_tokens_per_s", "peak_rss_mb", "useful", "ready_s")
    return rows_of(results, OURS, keys, inverse=True)


def table(stage: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        f"### {stage.upper()}",
        "",
        "| | computes | useful tokens/s (later epochs) | ours / it | useful of computed | peak MB"
        " | ours / it | ready s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['computes']} | {row['tokens_per_s']:,.0f}"
            f" ({row['later_tokens_per_s']:,.0f}) | {row['speed_ratio']:.2f} | {row['useful']:.0%}"
            f" | {row['peak_rss_mb']:,.0f} | {row['memory_ratio']:.2f} | {row['ready_s']:.0f} |"
        )
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours against the fastest, and against the smallest, of TRL's settings."""
    peers = [row for row in rows if row["name"] != OURS]
    fastest = max(peers, key=lambda row: float(row["tokens_per_s"]))
    smallest = min(peers, key=lambda row: float(row["peak_rss_mb"]))
    return {
        "fastest_peer": fastest["name"],
        "speed": fastest["speed_ratio"],
        "smallest_peer": smallest["name"],
        "memory": smallest["memory_ratio"],
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="SFT and DPO on ragged chats, TRL and khaosz, interleaved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--peer-python", help="a Python that has trl")
    parser.add_argument("--only", choices=_STAGES, help="one stage; default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each process")
    parser.add_argument("--warmups", type=int, default=3, help="steps before the clock starts")
    shape = {"vocab": 8192, "d": 384, "layers": 8, "heads": 6, "ffn": 1024}
    lengths = {"batch": 8, "shortest": 32, "longest": 512, "seed": 0}
    for name, value in (shape | lengths).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    one = parser.add_argument_group("one process of the comparison")
    one.add_argument("--stage", choices=_STAGES, help="run this alone, ours unless --setting")
    one.add_argument("--setting", choices=tuple(TRL_SETTINGS), help="of TRL")
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.warmups < 1:
        parser.error("--warmups: 1 or more")
    if args.stage is not None:
        run = run_ours if args.setting is None else run_trl
        # Errors are ignored: Windows does not remove a file that is still mapped.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            print(json.dumps(run(args, Path(folder))))
        return
    if args.peer_python is None:
        parser.error("--peer-python: name a Python that has trl")
    machine = describe()
    report: dict[str, Any] = {"bench": "align", "machine": machine}
    print(as_markdown(machine) + "\n", flush=True)
    for stage in (args.only,) if args.only else _STAGES:
        measured = in_turns(CONTENDERS, args.rounds, partial(run_contender, stage=stage, args=args))
        rows = summarise(measured)
        found = verdict(rows)
        report[stage] = {"rows": rows, **found}
        print(table(stage, rows))
        print(
            f"\nours is {found['speed']:.2f}x the fastest ({found['fastest_peer']}) and takes"
            f" {found['memory']:.2f}x the memory of the smallest ({found['smallest_peer']})\n",
            flush=True,
        )
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
