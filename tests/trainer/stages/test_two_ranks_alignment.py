"""Two gloo ranks under torchrun give what one process gives, in every stage of alignment.

What is sampled hangs on the number of the draw and not on the rank, so it is the same answers. One
thing does hang on the ranks: later epochs over a rollout shuffle each rank's own answers, so what
is compared has one update an epoch, or one epoch.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
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
from khaosz.interop import save_model
from khaosz.model import RewardModel, Transformer
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.run import run
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.stages.rollout import Rollout

SCRIPT = str(Path(__file__).parent / "rank_gradients.py")
CLOCKS = {"tokens_per_s", "elapsed_s", "mfu"}


@pytest.fixture
def start(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A policy in which every weight matters."""
    save_model(model, tmp_path / "start", pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def judge(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    reward = RewardModel.from_transformer(model)
    torch.nn.init.normal_(reward.score.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    save_model(reward, tmp_path / "judge", pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path / "judge")
    return tmp_path / "judge"


def together(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def written(config: TrainConfig, out: Path) -> Path:
    """A recipe that puts its run into `out`; TOML has no null."""
    values = {**config.model_dump(exclude_unset=True), "out": out}
    given = {key: value for key, value in values.items() if value is not None}
    return write_recipe(TrainConfig.parse(given), out.with_suffix(".toml"))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def one_and_two(config: TrainConfig, folder: Path) -> tuple[list[Any], list[Any]]:
    """For one process and for two: metrics by step, and what each rank has recorded."""
    found = []
    for ranks in (1, 2):
        recipe, out = written(config, folder / f"run{ranks}"), folder / f"kept{ranks}"
        if ranks == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # a sum over threads has another order
            record(recipe, out)
            torch.set_num_threads(threads)
        else:
            together("record", str(recipe), str(out))
        kept = [load_file(f"{out}-{rank}") for rank in range(ranks)]
        found.append([metrics(folder / f"run{ranks}"), kept])
    return found[0], found[1]


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
            said = f"step {a['step']}, {name}: {a[name]} with one, {b[name]} with two"
            assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=near), said
    (kept,), (first, second) = one[1], two[1]
    names = [name for name in kept if name.startswith("gradient.")]
    assert names and set(names) == {name for name in first if name.startswith("gradient.")}
    for name in names:
        scale = float(kept[name].abs().max())
        assert scale > 0, name
        # Relative to the tensor's largest entry: single entries are sums that cancel.
        torch.testing.assert_close(first[name], kept[name], rtol=0, atol=1e-5 * max(scale, 1e-3))
        assert torch.equal(first[name], second[name]), f"{name}: the ranks go apart"


def answers(kept: dict[str, Tensor], number: int) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Each answer of a rollout, whole, with its score and its values per token."""
    held = {
        name.removeprefix(f"rollout.{number}."): tensor
        for name, tensor in kept.items()
        if name.startswith(f"rollout.{number}.")
    }
    lengths = held["lengths"].tolist()
    scored = (held["lengths"] - held["scored_from"]).tolist()
    split = {
        name: torch.split(tensor, lengths if name == "ids" else scored)
        for name, tensor in held.items()
        if name in ("ids", "old", "reference", "values", "advantages", "returns")
    }
    found = []
    for i, ids in enumerate(split["ids"]):
        own: dict[str, Any] = {name: parts[i] for name, parts in split.items() if name != "ids"}
        own |= {"score": held["scores"][i], "finished": held["finished"][i]}
        found.append((tuple(ids.tolist()), own))
    return found


def assert_same_rollouts(one: list[Any], two: list[Any], numbers: range) -> None:
    for number in numbers:
        alone = sorted(answers(one[1][0], number), key=lambda answer: answer[0])
        parts = [answers(kept, number) for kept in two[1]]
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
def test_pairs(align: Any, start: Path, judge: Path, tmp_path: Path, stage: str) -> None:
    """Five pairs a step: three and two, in micro-batches of different numbers."""
    initial = judge if stage == "rm" else start
    config = align(stage, **COMMON, init_from=initial, batch_pairs=5, micro_batch=1, max_steps=4)
    one, two = one_and_two(config, tmp_path)
    assert {"accuracy", "margin", "val_loss", "val_accuracy"} <= one[0][-1].keys()
    assert one[0][-1]["margin"] != 0
    assert_same(one, two, nats=250.0)


PPO = {
    "prompts": 5, "group": 3, "max_new_tokens": 8, "epochs": 2, "minibatches": 1,
    "kl_target": 0.5, "kl_horizon": 50.0, "entropy": 0.01, "missing_end_penalty": 0.5,
}  # fmt: skip
GRPO = {"prompts": 4, "group": 3, "max_new_tokens": 8, "epochs": 1, "minibatches": 2}


def test_ppo(align: Any, start: Path, judge: Path, tmp_path: Path) -> None:
    """Advantages are whitened, and KL is taken, over both ranks: nine answers and six."""
    config = align(
        "ppo", **COMMON, init_from=start, rollout=PPO, reward_function=None, reward_model=judge,
        max_steps=6,
    )  # fmt: skip
    one, two = one_and_two(config, tmp_path)
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


def test_grpo(align: Any, start: Path, length_reward: str, tmp_path: Path) -> None:
    """The halves of the first epoch are the same for one process and for two."""
    config = align(
        "grpo", **COMMON, init_from=start, rollout=GRPO, reward_function=length_reward, max_steps=6
    )
    one, two = one_and_two(config, tmp_path)
    assert one[0][-1]["kl"] != 0 and one[0][-1]["kl_loss"] > 0
    assert_same(one, two)
    assert_same_rollouts(one, two, range(3))


def test_a_stopped_run_of_two_ranks_resumes_exactly(
    align: Any, start: Path, judge: Path, tmp_path: Path
) -> None:
    """Stopped by one rank amid the epochs of a rollout: half of its answers lie on each rank."""
    rollout = {**PPO, "minibatches": 2}
    config = align(
        "ppo", **COMMON, init_from=start, rollout=rollout, reward_function=None,
        reward_model=judge, max_steps=6, save_every=4,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = str(written(config, parts))
    together("run", str(written(config, whole)))
    together("run", recipe, "3")
    stopped = resolve(parts / "last")
    assert stopped is not None and stopped.name == "step-000003"
    together("run", recipe)
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


def test_fewer_held_out_pairs_than_ranks(
    align: Any, start: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """A rank that has nothing to score still takes part in the sum."""
    held_out = tmp_path / "val.jsonl"
    held_out.write_text(pairs_file.read_text(encoding="utf-8").splitlines()[0] + "\n", "utf-8")
    config = align("dpo", **COMMON, init_from=start, val=held_out, max_steps=2)
    one, two = one_and_two(config, tmp_path)
    assert "val_loss" in one[0][-1]
    assert_same(one, two, nats=250.0)


def test_stages_follow_each_other_on_two_ranks(align: Any, judge: Path, tmp_path: Path) -> None:
    config = align("rm", **COMMON, init_from=judge, max_steps=1)
    together("stages", str(written(config, tmp_path / "stages")), "2")


def test_no_rollout_is_left_beside_the_checkpoints(align: Any) -> None:
    config = align("grpo", max_steps=1)
    run(config, console=Console(quiet=True))
    assert not list(config.out.glob(".rollout-*"))


def test_every_answer_is_in_one_minibatch_of_an_epoch() -> None:
    """Six answers of a rank in four updates: not 2, 2, 2 and the first one again."""
    part = cast(RLHFStrategy, SimpleNamespace(seed=0, config=RolloutConfig(minibatches=4)))
    answers = [TokenSequence([1, 2], 1)] * 6
    rollout = Rollout(0, answers, torch.zeros(6), torch.ones(6, dtype=torch.bool))
    for epoch in range(2):
        shares = [RLHFStrategy._members(part, rollout, epoch, m) for m in range(4)]
        assert sorted(i for share in shares for i in share) == list(range(6))
