"""What every family of models must do: compute what transformers computes, through every path.

A test module of a family derives a class from `FamilyTests` and says its configuration.
"""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import SHAPE, bytewise, randomised
from torch import Tensor

from khaosz.config import LoRAConfig, ModelConfig
from khaosz.errors import ModelError
from khaosz.inference.adapter import Adapter
from khaosz.inference.engine import Engine
from khaosz.inference.runner import Chunk, Runner
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.adapter import save_adapter
from khaosz.interop.gguf.config import architecture_of
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf
from khaosz.interop.huggingface import load_model, save_model
from khaosz.interop.huggingface_config import config_from_hf, config_to_hf, load_config, model_type
from khaosz.model import Transformer
from khaosz.model.lora import add_lora, named_adapters

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

# The same network in fp32, its operations in another order: rounding of 6e-8 through four layers,
# on logits of size 1 to 10.
FP32 = 2e-5
LENGTH = 50
COMMON = {**SHAPE, "vocab_size": 276, "num_hidden_layers": 4, "rms_norm_eps": 1e-3}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, logprobs=1)


def ids(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(0, 270, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Transformer, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
    return model.logits(model(tokens, doc_ids=doc_ids))


@torch.no_grad()
def their_logits(directory: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    logits: Tensor = model.eval()(ids()).logits
    return logits


def close(one: Tensor, other: Tensor, rounding: float = FP32) -> None:
    torch.testing.assert_close(one, other, rtol=rounding, atol=rounding * float(other.abs().max()))


class FamilyTests:
    """theirs       `model_type` in transformers
    config          keys of its configuration beside `COMMON`
    architecture    in GGUF files; None where llama.cpp has none
    wide            of a model whose rows are whole blocks: what follows from its width of 64
    structural      features that have parameters of their own, so that none can be left out alone
    refused         keys with values that are refused, and a part of the message
    """

    theirs: ClassVar[str]
    config: ClassVar[dict[str, Any]]
    architecture: ClassVar[str | None]
    wide: ClassVar[dict[str, Any]] = {}
    structural: ClassVar[frozenset[str]] = frozenset()
    lora_rounding: ClassVar[float] = FP32
    document: ClassVar[int] = 23  # tokens of a packed document
    refused: ClassVar[list[tuple[dict[str, Any], str]]] = []

    @pytest.fixture(scope="class")
    @classmethod
    def directory(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A random model that transformers wrote."""
        path = tmp_path_factory.mktemp(cls.theirs) / "theirs"
        values = {**COMMON, **cls.config}
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = transformers.AutoConfig.for_model(cls.theirs, **{**special, **values})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomised(model, 0.2)
        cls.prepare(model)
        model.save_pretrained(path)
        return path

    @classmethod
    def prepare(cls, model: torch.nn.Module) -> None:
        """Change what random numbers would make unlike a trained model, theirs or ours."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, directory: Path) -> Transformer:
        return load_model(directory)

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, directory: Path) -> Tensor:
        """transformers' logits of `ids()`."""
        return their_logits(directory)

    def test_loads_from_transformers(self, model: Transformer, expected: Tensor) -> None:
        assert model_type(model.config) == self.theirs
        assert model.config.parameters() == sum(p.numel() for p in model.parameters())
        close(logits_of(model, ids()), expected)

    def test_is_written_for_transformers(
        self, model: Transformer, expected: Tensor, tmp_path: Path
    ) -> None:
        save_model(model, tmp_path, bos_id=1, eos_ids=[2], pad_id=0)
        close(their_logits(tmp_path), expected)
        again = load_model(tmp_path)
        assert again.config == model.config and config_from_hf(config_to_hf(again.config))
        close(logits_of(again, ids()), expected)

    def test_every_feature_matters(self, model: Transformer, expected: Tensor) -> None:
        """Without any one of its features the network computes something else."""
        for name in model.config.features - self.structural:
            if name in ("longrope", "proportional"):
                changes: dict[str, Any] = {"rope_scaling": None}
            else:
                changes = {name: ModelConfig.model_fields[name].default}
            if name == "partial_rotary_factor" and "longrope" in model.config.features:
                changes["rope_scaling"] = None
            if name == "rope_local_theta":
                changes[name] = model.config.rope_theta
            if name == "qk_norm":
                changes["qk_norm_after_rotary"] = False
            if name == "layer_types":
                changes |= {"sliding_window": None}
            other = Transformer(model.config.updated(**changes)).eval()
            known = other.state_dict().keys()
            other.load_state_dict({k: v for k, v in model.state_dict().items() if k in known})
            assert (logits_of(other, ids()) - expected).abs().max() > 1e-3, name

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("cuts", [[], [1, 2, 30], [7, 8, 9, 17, 40]])
    def test_cached_chunks_equal_the_whole(
        self, model: Transformer, expected: Tensor, cuts: list[int], deterministic: bool
    ) -> None:
        """Two rows in one batch, chunk by chunk; a fork and a cache cut back give the same."""
        runner = Runner.from_module(model, deterministic=deterministic)
        caches = [runner.new_cache(), runner.new_cache()]
        rows: list[list[Tensor]] = [[], []]
        bounds = [0, *cuts, LENGTH]
        for start, end in pairwise(bounds):
            chunks = [
                Chunk(row[start:end].tolist(), cache, end - start)
                for row, cache in zip(ids(), caches, strict=True)
            ]
            for row, logits in zip(rows, runner.run(chunks), strict=True):
                row.append(logits)
        for row, theirs in zip(rows, expected, strict=True):
            close(torch.cat(row), theirs)
        fork = caches[0].fork(20)
        caches[1].truncate(33)
        ends = [
            Chunk(row[cache.length :].tolist(), cache, 1)
            for row, cache in zip(ids(), (fork, caches[1]), strict=True)
        ]
        assert self.structural or (fork.length, caches[1].length) == (20, 33)
        for logits, theirs in zip(runner.run(ends), expected, strict=True):
            close(logits[0], theirs[-1])

    def test_packed_documents_are_apart(self, model: Transformer) -> None:
        tokens = ids(1)
        doc_ids = (torch.arange(LENGTH) // self.document)[None]
        positions = (torch.arange(LENGTH) % self.document)[None]
        with torch.no_grad():
            packed = model.logits(model(tokens, positions, doc_ids))[0]
        for start in range(0, LENGTH, self.document):
            part = slice(start, start + self.document)
            close(packed[part], logits_of(model, tokens[:, part])[0])

    def test_drafts_and_cached_prefixes_change_nothing(self, model: Transformer) -> None:
        """The second and third requests continue the first one's prefix."""
        prompt = [20, 21, 22, 20, 21, 22, 20, 21] * 5
        plain = self._answers(model, prompt, prompt_lookup=False, prefix_bytes=0)
        drafted = self._answers(model, prompt, prompt_lookup=True, prefix_bytes=1 << 20)
        assert [tokens for tokens, _ in plain] == [tokens for tokens, _ in drafted]
        assert drafted[1][1] > 0 and not plain[1][1]

    def _answers(
        self, model: Transformer, prompt: list[int], **settings: Any
    ) -> list[tuple[list[int], int]]:
        runner = Runner.from_module(model, deterministic=settings.pop("deterministic", False))
        engine = Engine(runner, bytewise(), step_tokens=23, **settings)
        engine.end_ids.clear()
        answers = []
        for turn in range(3):
            request = engine.add(prompt, GREEDY)
            while engine.unfinished:
                engine.step()
            outputs = engine.take(request)
            tokens = [token for output in outputs for token in output.token_ids]
            answers.append((tokens, outputs[-1].cached_tokens))
            prompt = [*prompt, *tokens[: 6 - turn], 30, 31]
        return answers

    def test_gguf(self, model: Transformer, expected: Tensor, tmp_path: Path) -> None:
        """F32 is exact, dequantised and through the runner; Q8_0 is close."""
        path = tmp_path / "model.gguf"
        if self.architecture is None:
            with pytest.raises(ModelError, match=f"no architecture for {self.theirs} models"):
                save_gguf(model, bytewise(), path, "F32")
            assert not path.exists()
            return
        save_gguf(model, bytewise(), path, "F32")
        source = GgufModel.open(path)
        assert source.file.metadata["general.architecture"] == self.architecture
        assert architecture_of(model.config) == self.architecture
        close(logits_of(load_gguf(path), ids()), expected)
        close(self._run(Runner.open(path)), expected[0])

    def test_quantised(self, model: Transformer, tmp_path: Path) -> None:
        """A Q8_0 file through the kernel computes what its dequantised matrices do."""
        if self.architecture is None:
            return
        shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **self.wide}
        wide = Transformer(model.config.updated(**shape))
        randomised(wide, 0.1)
        self.prepare(wide)
        path = tmp_path / "model.gguf"
        save_gguf(wide, bytewise(), path, "Q8_0")
        reference = logits_of(load_gguf(path), ids())[0]
        scale = float(reference.abs().max())
        # The kernel takes 16 bits of each input: 2 ** -9 of its rows' largest.
        assert (self._run(Runner.open(path)) - reference).abs().max() < 0.02 * scale

    @staticmethod
    def _run(runner: Runner, **settings: Any) -> Tensor:
        """Logits of the first row, in three chunks."""
        cache = runner.new_cache()
        parts = ids()[0].split([13, 1, LENGTH - 14])
        chunks = [Chunk(part.tolist(), cache, len(part), **settings) for part in parts]
        return torch.cat([runner.run([chunk])[0] for chunk in chunks])

    def test_lora(self, directory: Path, tmp_path: Path) -> None:
        """Trained adapters on every linear layer, in the module and beside the runner's weights."""
        model = load_model(directory)
        add_lora(model, LoRAConfig(rank=2), torch.Generator().manual_seed(0))
        before = logits_of(model, ids())
        model.train()
        model.logits(model(ids())).square().mean().backward()
        with torch.no_grad():
            for layer in named_adapters(model).values():
                assert layer.lora_B.grad is not None and layer.lora_B.grad.any()
                layer.lora_B.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
        model.eval()
        after = logits_of(model, ids())
        assert (after - before).abs().max() > 1e-2
        save_adapter(model, tmp_path, directory)
        adapter = Adapter(model.config, tmp_path)
        close(self._run(Runner.open(directory), adapter=adapter), after[0], self.lora_rounding)

    def test_hostile_settings_are_refused_or_read(self, directory: Path) -> None:
        """Any value of any key, also in its tables: a configuration or one `ModelError`."""
        values = json.loads((directory / "config.json").read_text())
        bad = (
            10**400,
            -1,
            0,
            float("nan"),
            float("inf"),
            "x",
            [],
            [None],
            {},
            {"a": 1},
            None,
            True,
        )
        places = [(key,) for key in values]
        places += [(k, key) for k, v in values.items() if isinstance(v, dict) for key in v]
        for place in places:
            for value in bad:
                changed = copy.deepcopy(values)
                table = changed if len(place) == 1 else changed[place[0]]
                table[place[-1]] = value
                with suppress(ModelError):
                    config_from_hf(changed)

    def test_unsupported_settings_are_refused(self, directory: Path) -> None:
        values = json.loads((directory / "config.json").read_text())
        assert load_config(directory)
        for changes, message in self.refused:
            with pytest.raises(ModelError, match=message):
                config_from_hf({**values, **changes})
