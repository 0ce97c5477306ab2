"""Two gloo ranks under torchrun compute what one process computes, in every stage of alignment and
in the embedder's.

Samples depend on the number of the draw and not on the rank, so the answers are the same. One thing
does depend on the ranks: later epochs over a rollout shuffle each rank's answers, so the compared
runs have one update per epoch, or one epoch.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rank_gradients import record
from rich.console import Console
from safetensors.torch import load_file
from tiny import write_recipe
from torch import Tensor

from khaosz.config import RolloutConfig, TrainConfig
from khaosz.data.batches.sequences import TokenSequence
from khaosz.data.tokenizer import Tokenizer
from khaosz.interop.huggingface import save_model
from khaosz.model import RewardModel, Transformer
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.run import run
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.stages.rollout import Rollout

SCRIPT = str(Path(__file__).parent / "rank_gradients.py")
CLOCKS = {"tokens_per_s", "elapsed_s", "mfu"}
OneAndTwo = Callable[[TrainConfig], tuple[list[Any], list[Any]]]


@pytest.fixture
def start(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A policy in which every weight matters."""
    save_model(model, tmp_path / "start", pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def reward_dir(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    reward = RewardModel.from_transformer(model)
    torch.nn.init.normal_(reward.score.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    save_model(reward, tmp_path / "reward_dir", pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path / "reward_dir")
    return tmp_path / "reward_dir"


def launch(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", SCRIPT, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Ranks:
    """Two ranks that run one job after the other (`rank_gradients.serve`); new ones after a job
    that fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts, self.jobs = folder, 0, 0
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, *arguments: str) -> None:
        if self.process is None:
            self.starts, self.jobs = self.starts + 1, 0
            self.jobs_in = self.folder / str(self.starts)
            self.jobs_in.mkdir()
            self.process = launch("serve", str(self.jobs_in))
        number, self.jobs = self.jobs, self.jobs + 1
        partial = self.jobs_in / f"{number}.partial"
        partial.write_text(json.dumps(arguments), encoding="utf-8")
        partial.rename(partial.with_suffix(".json"))
        answers = [self.jobs_in / f"{number}-{rank}.txt" for rank in (0, 1)]
        deadline = time.monotonic() + 120
        while not all(answer.exists() for answer in answers):
            if self.process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        errors = [answer.read_text("utf-8") if answer.exists() else "-" for answer in answers]
        if any(errors):
            self.stop()
        assert not any(errors), "\n".join(errors)

    def stop(self) -> None:
        if self.process is not None:
            (self.jobs_in / "stop").touch()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.terminate()  # torchrun ends its ranks
                self.process.wait(timeout=60)
            self.process = None


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def written(config: TrainConfig, out: Path) -> Path:
    """A recipe that puts its run into `out`; TOML has no null."""
    values = {**config.model_dump(exclude_unset=True), "out": out}
    given = {key: value for key, value in values.items() if value is not None}
    return write_recipe(TrainConfig.parse(given), out.with_suffix(".toml"))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def one_and_two(two_ranks: Ranks, tmp_path: Path) -> OneAndTwo:
    """Metrics by step and the recorded tensors of each rank, of one process and of two."""
    return lambda config: _one_and_two(config, tmp_path, two_ranks)


def _one_and_two(
    config: TrainConfig, folder: Path, two_ranks: Ranks
) -> tuple[list[Any], list[Any]]:
    actual = []
    for ranks in (1, 2):
        recipe, out = written(config, folder / f"run{ranks}"), folder / f"recorded{ranks}"
        if ranks == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # a sum over threads has another order
            record(recipe, out)
            torch.set_num_threads(threads)
        else:
            two_ranks("record", str(recipe), str(out))
        recorded = [load_file(f"{out}-{rank}") for rank in range(ranks)]
        actual.append([metrics(folder / f"run{ranks}"), recorded])
    return actual[0], actual[1]


def assert_same(one: list[Any], two: list[Any], *, nats: float = 0.0) -> None:
    """Losses, metrics and gradients of every step. `nats`: how large the log-probabilities are of
    which `kl` is a difference; fp32 keeps seven digits of them, not of it."""
    alone, both = one[0], two[0]
    assert [row["step"] for row in alone] == [row["step"] for row in both]
    for a, b in zip(alone, both, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - CLOCKS:
            # fp32 sums in another order; an average where a sum belongs is off by a factor of two.
            near = 1e-5 + (2e-7 * nats if name.endswith("kl") else 0.0)
            output = f"step {a['step']}, {name}: {a[name]} with one, {b[name]} with two"
            assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=near), output
    (recorded,), (first, second) = one[1], two[1]
    names = [name for name in recorded if name.startswith("gradient.")]
    assert names and set(names) == {name for name in first if name.startswith("gradient.")}
    for name in names:
        scale = float(recorded[name].abs().max())
        assert scale > 0, name
        # Relative to the tensor's largest entry: single entries are sums that cancel.
        torch.testing.assert_close(
            first[name], recorded[name], rtol=0, atol=1e-5 * max(scale, 1e-3)
        )
        assert torch.equal(first[name], second[name]), f"{name}: the ranks go apart"


def answers(
    recorded: dict[str, Tensor], number: int
) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Each answer of a rollout, whole, with its score and its values per token."""
    tensors = {
        name.removeprefix(f"rollout.{number}."): tensor
        for name, tensor in recorded.items()
        if name.startswith(f"rollout.{number}.")
    }
    lengths = tensors["lengths"].tolist()
    scored = (tensors["lengths"] - tensors["scored_from"]).tolist()
    split = {
        name: torch.split(tensor, lengths if name == "ids" else scored)
        for name, tensor in tensors.items()
        if name in ("ids", "old", "reference", "values", "advantages", "returns")
    }
    actual = []
    for i, ids in enumerate(split["ids"]):
        own: dict[str, Any] = {name: parts[i] for name, parts in split.items() if name != "ids"}
        own |= {"score": tensors["scores"][i], "finished": tensors["finished"][i]}
        actual.append((tuple(ids.tolist()), own))
    return actual


def assert_same_rollouts(one: list[Any], two: list[Any], numbers: range) -> None:
    for number in numbers:
        alone = sorted(answers(one[1][0], number), key=lambda answer: answer[0])
        parts = [answers(recorded, number) for recorded in two[1]]
        assert all(parts), "each rank samples its share"
        both = sorted((a for part in parts for a in part), key=lambda answer: answer[0])
        assert [ids for ids, _ in alone] == [ids for ids, _ in both]
        for (_, a), (_, b) in zip(alone, both, strict=True):
            assert a.keys() == b.keys()
            for name, tensor in a.items():
                torch.testing.assert_close(b[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


COMMON: dict[str, Any] = {
    "grad_clip": 1e9, "lr": 1e-4, "embedding_lr": 1e-4, "weight_decay": 0.0, "eval_every": 2,
    "size": None, "model": {}, "tokenizer": None,
}  # fmt: skip


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_pairs(
    align: Any, start: Path, reward_dir: Path, one_and_two: OneAndTwo, stage: str
) -> None:
    """Five pairs a step: three and two, in micro-batches of different numbers."""
    initial = reward_dir if stage == "rm" else start
    config = align(stage, **COMMON, init_from=initial, batch_pairs=5, micro_batch=1, max_steps=4)
    one, two = one_and_two(config)
    assert {"accuracy", "margin", "val_loss", "val_accuracy"} <= one[0][-1].keys()
    assert one[0][-1]["margin"] != 0
    assert_same(one, two, nats=250.0)


PPO = {
    "prompts": 5, "group": 3, "max_new_tokens": 8, "epochs": 2, "minibatches": 1,
    "kl_target": 0.5, "kl_horizon": 50.0, "entropy": 0.01, "missing_end_penalty": 0.5,
}  # fmt: skip
GRPO = {"prompts": 4, "group": 3, "max_new_tokens": 8, "epochs": 1, "minibatches": 2}


def test_ppo(align: Any, start: Path, reward_dir: Path, one_and_two: OneAndTwo) -> None:
    """Advantages are whitened, and KL is taken, over both ranks: nine answers and six."""
    config = align(
        "ppo", **COMMON, init_from=start, rollout=PPO, reward_function=None,
        reward_model=reward_dir, max_steps=6, seed=1,  # the answers of seed 0 cancel by 1e-6 more
    )  # fmt: skip
    one, two = one_and_two(config)
    assert one[0][-1]["kl"] != 0 and one[0][-1]["kl_weight"] != one[0][0]["kl_weight"]
    assert any(name.startswith("gradient.0.value.") for name in one[1][0])
    assert_same(one, two)
    assert_same_rollouts(one, two, range(3))


@pytest.fixture
def length_reward(tmp_path: Path) -> str:
    """One that differs from answer to answer: a group of equals teaches nothing."""
    path = tmp_path / "reward.py"
    path.write_text("def length(messages, answer, extra):\n    return len(answer) / 10\n")
    return f"{path}:length"


def test_grpo(align: Any, start: Path, length_reward: str, one_and_two: OneAndTwo) -> None:
    """The halves of the first epoch are the same for one process and for two."""
    config = align(
        "grpo", **COMMON, init_from=start, rollout=GRPO, reward_function=length_reward, max_steps=6
    )
    one, two = one_and_two(config)
    assert one[0][-1]["kl"] != 0 and one[0][-1]["kl_loss"] > 0
    assert_same(one, two)
    assert_same_rollouts(one, two, range(3))


def test_stopped_run_of_two_ranks_resumes_exactly(
    align: Any, start: Path, reward_dir: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Stopped by one rank between the epochs of a rollout: each rank has a part of its answers."""
    rollout = {**PPO, "minibatches": 2}
    config = align(
        "ppo", **COMMON, init_from=start, rollout=rollout, reward_function=None,
        reward_model=reward_dir, max_steps=6, save_every=4,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = str(written(config, parts))
    two_ranks("run", str(written(config, whole)))
    two_ranks("run", recipe, "3")
    stopped = resolve(parts / "last")
    assert stopped is not None and stopped.name == "step-000003"
    two_ranks("run", recipe)
    one, two = resolve(whole / "last"), resolve(parts / "last")
    assert one is not None and two is not None and one.name == two.name == "step-000006"
    files = ["model.safetensors"]
    files += [f"state/{n}.safetensors" for n in ("optimizer", "critic", "rollout-0", "rollout-1")]
    for file in files:
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{file}: {key}"
    first, second = (load_file(one / f"state/rollout-{rank}.safetensors") for rank in (0, 1))
    assert len(first["rollout.lengths"]) == 9 and len(second["rollout.lengths"]) == 6
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert {k: v for k, v in a.items() if k not in CLOCKS} == {
            k: v for k, v in b.items() if k not in CLOCKS
        }


def test_each_rank_draws_its_own_dropout_and_resumes_it(
    align: Any, reward_dir: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    config = align(
        "rm", **COMMON, init_from=reward_dir, batch_pairs=4, max_steps=4, save_every=100,
        lora={"rank": 2, "dropout": 0.3},
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two_ranks("run", str(written(config, whole)))
    two_ranks("run", str(written(config, parts)), "2")
    two_ranks("run", str(written(config, parts)))
    one, two = resolve(whole / "last"), resolve(parts / "last")
    assert one is not None and two is not None and one.name == two.name == "step-000004"
    for file in ("adapter/adapter_model", "state/optimizer", "state/rng"):
        a, b = (load_file(path / f"{file}.safetensors") for path in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file
    assert a.keys() == {"cpu", "cpu.1"} and not torch.equal(a["cpu"], a["cpu.1"])


def test_fewer_held_out_pairs_than_ranks(
    align: Any, start: Path, pairs_file: Path, one_and_two: OneAndTwo, tmp_path: Path
) -> None:
    """A rank that has nothing to score still takes part in the sum."""
    held_out = tmp_path / "val.jsonl"
    held_out.write_text(pairs_file.read_text(encoding="utf-8").splitlines()[0] + "\n", "utf-8")
    config = align("dpo", **COMMON, init_from=start, val=held_out, max_steps=2)
    one, two = one_and_two(config)
    assert "val_loss" in one[0][-1]
    assert_same(one, two, nats=250.0)


def test_stages_follow_each_other_on_two_ranks(
    align: Any, reward_dir: Path, tmp_path: Path
) -> None:
    config = align("rm", **COMMON, init_from=reward_dir, max_steps=1)
    process = launch("stages", str(written(config, tmp_path / "stages")), "2")
    assert process.wait(timeout=120) == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_embedder(embedder: Any, start: Path, one_and_two: OneAndTwo, symmetric: bool) -> None:
    """Every query is compared with the passages of both ranks: seven pairs a step, four and three,
    in passes of different numbers, with negatives."""
    config = embedder(
        init_from=start, size=None, model={}, tokenizer=None, batch_pairs=7,
        max_steps=4, grad_clip=1e9, lr=1e-4, embedding_lr=1e-4, weight_decay=0.0, eval_every=2,
        embed={"max_length": 48, "symmetric": symmetric},
    )  # fmt: skip
    one, two = one_and_two(config)
    assert [row["step"] for row in one[0]] == [1, 2, 3, 4]
    assert {"accuracy", "val_loss", "val_accuracy", "val_mrr"} <= one[0][-1].keys()
    assert_same(one, two)


def test_no_rollout_file_remains_outside_the_checkpoints(align: Any) -> None:
    config = align("grpo", max_steps=1)
    run(config, console=Console(quiet=True))
    assert not list(config.out.glob(".rollout-*"))


def test_every_answer_is_in_one_minibatch_of_an_epoch() -> None:
    """Six answers of a rank in four updates: not 2, 2, 2 and the first one again."""
    part = cast(
        RLHFStrategy,
        SimpleNamespace(layout=SimpleNamespace(seed=0), config=RolloutConfig(minibatches=4)),
    )
    answers = [TokenSequence([1, 2], 1)] * 6
    rollout = Rollout(0, answers, torch.zeros(6), torch.ones(6, dtype=torch.bool))
    for epoch in range(2):
        shares = [RLHFStrategy._members(part, rollout, epoch, m) for m in range(4)]
        assert sorted(i for share in shares for i in share) == list(range(6))
