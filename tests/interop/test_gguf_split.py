"""Models in several GGUF files, as llama.cpp's gguf-split writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import random_model, tokenizer
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.errors import ModelError
from khaosz.inference.runner import Chunk, Runner
from khaosz.interop.gguf.file import GgufFile, TensorToWrite, split_names, write_gguf
from khaosz.interop.gguf.model import GgufModel, save_gguf
from khaosz.interop.models import default_name

torch.set_num_threads(1)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    save_gguf(random_model(320, hidden_size=64, head_dim=16), tokenizer(), tmp_path / "a.gguf")
    return tmp_path / "a.gguf"


def split(path: Path, count: int, **changes: Any) -> list[Path]:
    """`path` in `count` files. `changes` are of the last one's keys."""
    file = GgufFile.open(path)
    metadata = {
        key: value.tolist() if isinstance(value, np.ndarray) and value.dtype == bool else value
        for key, value in file.metadata.items()
    }
    names, parts = list(file.tensors), []
    for number in range(count):
        keys = {} if number else metadata
        keys = {**keys, "split.no": number, "split.count": count}
        keys["split.tensors.count"] = len(names)
        tensors = [
            TensorToWrite(name, t.type, t.shape, lambda name=name: [file.raw(name)])
            for name, t in file.tensors.items()
            if names.index(name) % count == number
        ]
        if number == count - 1:
            keys |= changes
        parts.append(path.with_name(f"s-{number + 1:05}-of-{count:05}.gguf"))
        write_gguf(parts[-1], keys, tensors)
    return parts


def logits(path: Path) -> torch.Tensor:
    runner = Runner.open(path)
    return runner.run([Chunk(list(range(20, 40)), runner.new_cache(), 20)])[0]


def test_any_part_opens_the_whole_model(whole: Path) -> None:
    expected = logits(whole)
    parts = split(whole, 3)
    for part in parts:
        assert torch.equal(logits(part), expected)
        assert GgufModel.open(part).tokenizer().encode("the fox") == tokenizer().encode("the fox")
        assert default_name(part) == "s"
    assert GgufFile.open(parts[1]).nbytes == sum(part.stat().st_size for part in parts)
    done = CliRunner().invoke(app, ["generate", str(parts[2]), "--prompt", "the", "--json"])
    assert done.exit_code == 0, done.output


def test_missing_part_is_named(whole: Path) -> None:
    parts = split(whole, 3)
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        with pytest.raises(ModelError, match=r"part 2 of 3 is missing: s-00002-of-00003\.gguf"):
            GgufModel.open(part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.no": 0}, "s-00002-of-00002.gguf: part 1 of 2, not 2 of 2"),
        ({"split.count": 3}, "s-00002-of-00002.gguf: part 2 of 3, not 2 of 2"),
        ({"split.count": "two"}, "split.count 'two' is not a whole number"),
    ],
)
def test_parts_of_other_models_are_rejected(
    whole: Path, changes: dict[str, Any], message: str
) -> None:
    first, _ = split(whole, 2, **changes)
    with pytest.raises(ModelError, match=message.replace(".", r"\.")):
        GgufFile.open(first)


def test_parts_that_do_not_fit_are_rejected(whole: Path) -> None:
    first, second = split(whole, 2)
    renamed = first.rename(first.with_name("model.gguf"))
    with pytest.raises(ModelError, match="part 1 of 2 of a model, which its name does not say"):
        GgufFile.open(renamed)
    file = GgufFile.open(renamed.rename(first))
    tensor = TensorToWrite("more", "F32", (2,), lambda: [np.zeros(8, dtype=np.uint8)])
    write_gguf(second, {"split.no": 1, "split.count": 2}, [tensor])
    with pytest.raises(ModelError, match=f"the parts have .* tensors, not {len(file.tensors)}"):
        GgufFile.open(first)
    twice = TensorToWrite("token_embd.weight", "F32", (2,), tensor.rows)
    write_gguf(second, {"split.no": 1, "split.count": 2}, [twice])
    with pytest.raises(ModelError, match=r"tensor .token_embd\.weight. comes"):
        GgufFile.open(first)


def test_names_of_parts() -> None:
    names = ["m.Q4-00001-of-00002.gguf", "m.Q4-00002-of-00002.gguf"]
    assert split_names(names[0]) == split_names(names[1]) == names
    assert split_names("m.gguf") == ["m.gguf"]
