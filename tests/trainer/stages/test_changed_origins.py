"""What a run depends on, and what a resumed run does when it has changed, moved or gone."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import Recipe, random_model, stopping_after

from khaosz.config import TrainConfig
from khaosz.data.shards.mmap import MmapFileHandler
from khaosz.data.shards.prepare import prepare
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import CheckpointError, DataError, ModelError, TokenFileError
from khaosz.interop.adapter import merge_adapter
from khaosz.interop.huggingface import save_model
from khaosz.model import RewardModel, Transformer, weights_fingerprint
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.run import run

QUIET = Console(quiet=True)


def write_model(model: Transformer, directory: Path, tokenizer: Tokenizer) -> Path:
    save_model(model, directory, pad_id=tokenizer.pad_id)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def bases(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Two models of one shape, and a link to the first, as a run's `last`."""
    model = random_model(tokenizer)
    write_model(model, tmp_path / "bases/step-000001", tokenizer)
    with torch.no_grad():
        model.norm.weight[0] += 1e-3
    write_model(model, tmp_path / "bases/step-000002", tokenizer)
    (tmp_path / "bases/last").symlink_to("step-000001")
    return tmp_path / "bases/last"


def move(link: Path, name: str) -> None:
    link.unlink()
    link.symlink_to(name)


def stop(config: TrainConfig, step: int) -> None:
    with pytest.MonkeyPatch.context() as patched, stopping_after(step, patched):
        run(config, console=QUIET)


OF_BASE: dict[str, Any] = {"size": None, "model": {}, "tokenizer": None, "max_steps": 4}


@pytest.mark.parametrize("stage", ["pt", "dpo", "grpo"])
def test_moved_link_to_the_base_is_refused(
    recipe: Recipe, align: Any, bases: Path, stage: str
) -> None:
    """Of adapters, of DPO's reference and of a rollout's."""
    lora = {"lora": {"rank": 2}} if stage == "pt" else {}
    build = recipe if stage == "pt" else lambda **changes: align(stage, **changes)
    config = build(**OF_BASE, **lora, init_from=bases)
    stop(config, 2)
    move(bases, "step-000002")
    with pytest.raises(CheckpointError, match=r"init_from: .*last is another model") as caught:
        run(config, resume=True, console=QUIET)
    assert "step-000001" in str(caught.value.hint)
    first = bases.with_name("step-000001")
    assert run(config.updated(init_from=first), resume=True, console=QUIET).progress.step == 4


@pytest.mark.parametrize("key", ["reference", "reward_model"])
def test_changed_reference_or_reward_model_is_refused(
    align: Any, bases: Path, tokenizer: Tokenizer, tmp_path: Path, key: str
) -> None:
    other, path = random_model(tokenizer), tmp_path / "other"
    if key == "reward_model":
        other = RewardModel.from_transformer(other, torch.Generator().manual_seed(0))
    write_model(other, path, tokenizer)
    reward = {"reward_function": None} if key == "reward_model" else {}
    stage = "grpo" if key == "reward_model" else "dpo"
    config = align(stage, **OF_BASE, **reward, init_from=bases, **{key: path})
    stop(config, 2)
    with torch.no_grad():
        other.norm.weight[3] *= 1.001
    write_model(other, path, tokenizer)
    with pytest.raises(CheckpointError, match=f"{key}: .* is another model"):
        run(config, resume=True, console=QUIET)


def test_base_that_is_not_read_again_may_go(recipe: Recipe, bases: Path) -> None:
    config = recipe(**OF_BASE, init_from=bases)
    stop(config, 2)
    shutil.rmtree(bases.parent)
    assert run(config, resume=True, console=QUIET).progress.step == 4


def test_adapter_is_merged_into_its_own_base_only(
    recipe: Recipe, bases: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = recipe(**OF_BASE, init_from=bases, lora={"rank": 2})
    run(config, console=QUIET)
    adapter = config.out / "last/adapter"
    merged = load_file(merge_adapter(adapter, tmp_path / "a") / "model.safetensors")
    other = bases.with_name("step-000002")
    for base in (other, None):
        if base is None:
            move(bases, other.name)
        with pytest.raises(ModelError, match=r"another model than .*: its weights differ"):
            merge_adapter(adapter, tmp_path / "b", base=base)
    assert not (tmp_path / "b").exists()
    merge_adapter(adapter, tmp_path / "b", base=other, any_base=True)
    again = merge_adapter(
        adapter,
        tmp_path / "c",
        base=shutil.copytree(bases.with_name("step-000001"), tmp_path / "moved"),
    )
    assert all(torch.equal(merged[k], v) for k, v in load_file(again / "model.safetensors").items())
    renamed = Tokenizer(tokenizer.serialized.replace(b"<|tool|>", b"<|loot|>"), tokenizer.config)
    renamed.save(tmp_path / "moved")
    with pytest.raises(ModelError, match="its tokenizer differs"):
        merge_adapter(adapter, tmp_path / "d", base=tmp_path / "moved")


def test_fingerprint_is_of_the_values(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer).bfloat16()
    first = weights_fingerprint(model)
    assert weights_fingerprint(model.float()) == first
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-6
    assert weights_fingerprint(model) != first


# Data


def raw_data(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def texts(corpus_file: Path) -> list[str]:
    lines = corpus_file.read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:60]]


def test_other_data_with_as_many_windows_is_refused(
    recipe: Recipe, texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    others = [text.replace("1", "2") for text in texts]  # a digit is a token
    for name, part in (("data", texts), ("other", others)):
        prepare([raw_data(tmp_path / f"{name}.jsonl", part)], tokenizer, tmp_path / name, workers=0)
    config = recipe(data=tmp_path / "data", max_steps=4)
    stop(config, 2)
    shutil.move(tmp_path / "data", tmp_path / "old")
    shutil.move(tmp_path / "other", tmp_path / "data")
    with pytest.raises(CheckpointError, match="holds other windows than those"):
        run(config, resume=True, console=QUIET)
    assert run(config.updated(data=tmp_path / "old"), resume=True, console=QUIET).progress.step == 4


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_other_pairs_or_prompts_are_refused(align: Any, stage: str, tmp_path: Path) -> None:
    """As many, one answer or one key of a reward function apart; a copy may be anywhere."""
    config = align(stage, max_steps=4)
    stop(config, 2)
    records = [json.loads(line) for line in config.data.read_text("utf-8").splitlines()]
    for name in ("same", "other"):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines, "utf-8")
        key = "chosen" if stage == "dpo" else "answer"
        records[1][key] = records[1][key][:-1] + "X"
    with pytest.raises(CheckpointError, match=r"holds other (pairs|prompts) than those"):
        run(config.updated(data=tmp_path / "other.jsonl"), resume=True, console=QUIET)
    same = config.updated(data=tmp_path / "same.jsonl")
    assert run(same, resume=True, console=QUIET).progress.step == 4


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", ["touched", "moved", "gone", "replaced"])
def test_prepared_data_of_a_run_suffices(
    recipe: Recipe, texts: list[str], tokenizer_dir: Path, tmp_path: Path, change: str
) -> None:
    """The raw file is not read again; a recipe that names other raw data is refused."""
    raw = raw_data(tmp_path / "raw.jsonl", texts)
    other = raw_data(tmp_path / "other.jsonl", texts[1:])
    config = recipe(data=raw, tokenizer=tokenizer_dir, max_steps=4)
    stop(config, 2)
    with pytest.raises(DataError, match="inputs differ"):
        run(config.updated(data=other), resume=True, console=QUIET)
    match change:
        case "touched":
            touch(raw)
        case "moved":
            config = config.updated(data=raw.rename(tmp_path / "moved.jsonl"))
            touch(config.data)
        case "gone":
            raw.unlink()
        case "replaced":
            shutil.copy(other, raw)
    said = io.StringIO()
    context = run(config, resume=True, console=Console(file=said, width=1000))
    assert context.progress.step == 4
    assert ("is gone: using" in said.getvalue()) == (change == "gone")
    assert ("raw.jsonl has changed since: using" in said.getvalue()) == (change == "replaced")


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_prepared_data_is_refused(
    recipe: Recipe, texts: list[str], tokenizer_dir: Path, tmp_path: Path, split: str
) -> None:
    """On resume, and for a new run on the directory: a changed token, and one beyond the
    vocabulary."""
    config = recipe(data=raw_data(tmp_path / "raw.jsonl", texts), tokenizer=tokenizer_dir)
    config = config.updated(val_fraction=0.2, max_steps=4)
    stop(config, 2)
    shard = next((config.out / "data").glob(f"{split}-*.tok"))
    with MmapFileHandler(shard) as opened:
        start = opened.header["sections"]["tokens"]["offset"]
    for token in (b"\x01\x01", b"\xff\xff"):
        with shard.open("r+b") as file:
            file.seek(start + 8)
            file.write(token)
        with pytest.raises(TokenFileError, match=r"checksum of section tokens|token id 65535"):
            run(config, resume=True, console=QUIET)
        with pytest.raises(TokenFileError, match=r"checksum of section tokens|token id 65535"):
            run(config.updated(data=config.out / "data", out=tmp_path / "new"), console=QUIET)


def test_prepared_data_of_an_interrupted_start_is_used_for_the_same_text(
    texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(3):
        raw_data(folder / f"{i}.jsonl", texts[20 * i : 20 * i + 20])
    report = prepare([folder], tokenizer, tmp_path / "out", workers=0)
    touch(folder / "1.jsonl")
    moved = folder.rename(tmp_path / "moved")
    for place in (moved, folder):  # the second is gone
        again = prepare([place], tokenizer, tmp_path / "out", workers=0)
        assert again.already_prepared and again.documents == report.documents
    with pytest.raises(DataError, match="does not exist"):
        prepare([tmp_path / "never"], tokenizer, tmp_path / "out", workers=0)
    with pytest.raises(DataError, match="val_fraction differ"):
        prepare([folder], tokenizer, tmp_path / "out", workers=0, val_fraction=0.5)
    content = (moved / "1.jsonl").read_bytes()
    (moved / "1.jsonl").write_bytes(content.replace(b"e", b"f", 1))  # of the same size
    with pytest.raises(DataError, match="inputs differ"):
        prepare([moved], tokenizer, tmp_path / "out", workers=0)


def test_tokenizer_of_an_interrupted_start_is_not_adopted(
    recipe: Recipe, texts: list[str], tmp_path: Path
) -> None:
    raw = raw_data(tmp_path / "raw.jsonl", texts)
    config = recipe(data=raw, vocab_size=400, max_steps=1)
    run(config, console=QUIET)
    for path in config.out.iterdir():  # as if it had been killed before its first checkpoint
        if path.name != "tokenizer":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert run(config, console=QUIET).tokenizer.vocab_size == 400
    last = resolve(config.out / "last")
    assert last is not None
    for path in config.out.iterdir():
        if path.name != "tokenizer":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert run(config.updated(vocab_size=450), console=QUIET).tokenizer.vocab_size == 450
