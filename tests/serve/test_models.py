"""Several models and adapters behind one address."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serving import Service, served, wait_until

from khaosz.config import LoRAConfig
from khaosz.errors import ConfigError, ModelError
from khaosz.inference.generator import Generator
from khaosz.inference.prefix_cache import PrefixCache
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.adapter import merge_adapter, save_adapter
from khaosz.interop.huggingface_config import load_config
from khaosz.interop.models import convert, load_model
from khaosz.model.lora import add_lora, named_adapters
from khaosz.serve.models import Limits, Models
from khaosz.serve.run import named_models

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
ASKED: dict[str, Any] = {"messages": HELLO, "max_tokens": 24, "temperature": 0}


def answer_of(service: Service, model: str, **more: Any) -> str | None:
    request = {**ASKED, "model": model, **more}
    return service.client().chat.completions.create(**request).choices[0].message.content


def alone(path: Path) -> str:
    generator = Generator.from_directory(path)
    return generator.chat(HELLO, SamplingParams(max_tokens=24, temperature=0.0)).text


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of `tiny`."""
    model = load_model(tiny)
    random = torch.Generator().manual_seed(1)
    add_lora(model, LoRAConfig(rank=2), random)
    with torch.no_grad():
        for layer in named_adapters(model).values():
            layer.lora_B.normal_(0, 0.5, generator=random)
    directory = tmp_path_factory.mktemp("adapter") / "tuned"
    save_adapter(model, directory, tiny)
    return directory


def loaded(service: Service) -> dict[str, bool]:
    return service.ask("GET", "/health/ready")[2]["models"]


def test_models_load_on_first_use(tiny: Path, taught: Path) -> None:
    with served(tiny, f"other={taught}") as service:
        names = [(card.id, card.kind, card.parent) for card in service.client().models.list()]  # type: ignore[attr-defined]
        assert names == [("tiny", "chat", None), ("other", "chat", None)]
        assert loaded(service) == {"tiny": True, "other": False}
        assert answer_of(service, "other") == alone(taught)
        assert answer_of(service, "tiny") == alone(tiny)
        assert loaded(service) == {"tiny": True, "other": True}


def seeded(service: Service, model: str) -> dict[str, Any]:
    """Texts and log-probabilities of two choices drawn with a seed."""
    answer = service.client().chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "the quick brown fox 春眠 " * 4}],
        max_tokens=24,
        temperature=1,
        seed=2**64 - 1,
        n=2,
        logprobs=True,
        top_logprobs=3,
    )
    choices: list[Any] = answer.model_dump()["choices"]
    return {str(i): choice for i, choice in enumerate(choices)}


def test_deterministic_service_gives_the_same_bits_again(tiny: Path, tuned: Path) -> None:
    """Alone, with its prompt cached, and among other requests."""
    with served(tiny, loras=[f"tuned={tuned}"], deterministic=True) as service:
        for name in ("tiny", "tuned"):
            first = seeded(service, name)
            assert first["0"] != first["1"]
            assert seeded(service, name) == first
            with ThreadPoolExecutor(4) as pool:
                for i in range(3):
                    pool.submit(answer_of, service, "tiny", seed=i)
                assert pool.submit(seeded, service, name).result() == first


def test_adapter_is_served_by_its_name(tiny: Path, tuned: Path, tmp_path: Path) -> None:
    merged = alone(merge_adapter(tuned, tmp_path / "merged", base=tiny))
    with served(tiny, loras=[f"tuned={tuned}"]) as service:
        cards = {card.id: card.parent for card in service.client().models.list()}  # type: ignore[attr-defined]
        assert cards == {"tiny": None, "tuned": "tiny"}
        found: dict[str, str | None] = {}

        def ask(name: str) -> None:
            found[name] = answer_of(service, name)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("tiny", "tuned")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"tiny": alone(tiny), "tuned": merged}
        assert found["tiny"] != merged


def test_idle_models_are_unloaded_when_memory_is_short(tiny: Path, taught: Path) -> None:
    copies = [f"{name}={tiny}" for name in "abc"]
    room = sum(model.weights for model in named_models(copies[:2])) + 4096
    with served(*copies, limits=Limits(memory=room)) as service:
        expected = alone(tiny)
        answer_of(service, "b")
        answer_of(service, "a")  # b is now the least recently used
        assert answer_of(service, "c") == expected
        assert loaded(service)["c"] and sum(loaded(service).values()) <= 2
        for name in "bacab":
            assert answer_of(service, name) == expected
        # Models in use are not unloaded.
        streams = []
        for name in "ab":
            stream = service.client().chat.completions.create(
                **{**ASKED, "model": name, "max_tokens": 1900}, stream=True
            )
            next(iter(stream))
            streams.append(stream)
        with pytest.raises(openai.InternalServerError) as full:
            answer_of(service, "c")
        assert full.value.status_code == 503 and "retry-after" in full.value.response.headers
        for stream in streams:
            stream.close()

        def free() -> bool:
            return not any(model.loaded and model.loaded.users for model in service.models.all)

        wait_until(free)
        assert answer_of(service, "c") == expected


def test_prefix_caches_stay_below_memory_limit(tiny: Path) -> None:
    """Also those of models loaded before."""
    copies = [f"{name}={tiny}" for name in "ab"]
    room = sum(model.weights for model in named_models(copies)) + 100_000
    with served(*copies, limits=Limits(memory=room)) as service:
        expected = alone(tiny)

        def size() -> int:
            return sum(model.loaded.nbytes for model in service.models.all if model.loaded)

        for number in range(12):
            answer_of(
                service, "ab"[number % 2], messages=[{"role": "user", "content": f"{number}"}]
            )
            wait_until(lambda: size() <= room)
        assert sum(loaded(service).values()) == 2
        assert [answer_of(service, name) for name in "ab"] == [expected] * 2


def test_concurrent_requests_load_a_model_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = Models._load

    def counted(self: Models, model: Any) -> Any:
        loads.append(model.name)
        return load(self, model)

    monkeypatch.setattr(Models, "_load", counted)
    with served(f"a={tiny}", f"b={tiny}") as service:
        threads = [threading.Thread(target=answer_of, args=(service, "b")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert loads == ["a", "b"]


def test_broken_model_leaves_others_usable(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"nonsense")
    with served(tiny, broken) as service:
        with pytest.raises(openai.InternalServerError) as failed:
            answer_of(service, "broken")
        assert str(tmp_path) not in str(failed.value)
        assert answer_of(service, "tiny") == alone(tiny)
        assert loaded(service) == {"tiny": True, "broken": False}
        with pytest.raises(openai.InternalServerError):
            answer_of(service, "broken")


def test_refuses_invalid_models(tiny: Path, taught: Path, tuned: Path) -> None:
    def models(*names: str, loras: tuple[str, ...] = (), **limits: Any) -> Models:
        return Models(named_models(names, loras), Limits(**limits))

    with pytest.raises(ConfigError, match="two models are named 'tiny'"):
        models(str(tiny), f"tiny={taught}")
    with pytest.raises(ConfigError, match="two models are named 'a'"):
        models(f"a={tiny}", loras=(f"a={tuned}",))
    with pytest.raises(ConfigError, match=r"needs .* MB, --memory-limit leaves 0"):
        models(str(tiny), memory=1000)
    for wrong in ("tuned", "=x", "x=", f"unknown:a={tuned}"):
        with pytest.raises(ConfigError, match="is not NAME=DIR"):
            models(str(tiny), loras=(wrong,))
    with pytest.raises(ModelError, match="does not exist"):
        models("/nowhere")
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        models(str(tiny), loras=(f"a={tiny}",))
    with pytest.raises(ModelError, match="expected"):  # of another model
        models(str(taught), loras=(f"a={tuned}",))
    both = models(f"a={tiny}", f"b={tiny}", loras=(f"b:x={tuned}", f"y={tuned}"))
    assert [model.names for model in both.all] == [["a", "y"], ["b", "x"]]


def test_request_timeout(tiny: Path) -> None:
    with served(tiny, timeout=0.4) as service:
        never = {str(token): -100 for token in service.engine.end_ids}
        long = {**ASKED, "model": "tiny", "max_tokens": 1900, "n": 8, "logit_bias": never}
        with pytest.raises(openai.APIStatusError) as late:
            service.client().chat.completions.create(**long)
        assert late.value.status_code == 504 and late.value.code == "request_timeout"
        assert late.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="longer than the time limit"):
            list(service.client().chat.completions.create(**long, stream=True))
        wait_until(lambda: not service.engine.unfinished)
        assert answer_of(service, "tiny") == alone(tiny)


def test_tokenize(service: Service, tiny: Path) -> None:
    generator = Generator.from_directory(tiny)

    def tokens(**request: Any) -> dict[str, Any]:
        status, _, body = service.ask("POST", "/tokenize", json.dumps({"model": "tiny", **request}))
        assert status == 200, body
        return body

    found = tokens(prompt="春眠 the fox")
    assert found["tokens"] == generator.prompt_ids("春眠 the fox")
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == generator.context
    assert tokens(messages=HELLO)["tokens"] == generator.chat_ids(HELLO)
    for wrong in ({}, {"prompt": "x", "messages": HELLO}, {"prompt": "x", "more": 1}):
        body = json.dumps({"model": "tiny", **wrong})
        assert service.ask("POST", "/tokenize", body)[0] == 400
    assert service.ask("POST", "/tokenize", '{"model": "x", "prompt": "y"}')[0] == 404


def test_metrics(tiny: Path) -> None:
    with served(tiny) as service:
        request = {**ASKED, "model": "tiny", "messages": [{"role": "user", "content": "fox " * 20}]}
        service.client().chat.completions.create(**request)
        list(service.client().chat.completions.create(**request, stream=True))
        service.ask("GET", "/v1/models/nothing")
        service.ask("GET", "/some/secret/path")
        status, text = service.text("/metrics")
    assert status == 200 and "secret" not in text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    chat = 'khaosz_requests_total{route="/v1/chat/completions",status="200"}'
    assert float(found[chat]) == 2
    assert float(found['khaosz_requests_total{route="/v1/models/{model:path}",status="404"}']) == 1
    assert float(found['khaosz_requests_total{route="other",status="404"}']) == 1
    assert float(found['khaosz_generated_tokens_total{model="tiny"}']) == 48
    assert float(found['khaosz_first_token_seconds_count{model="tiny"}']) == 2
    assert float(found['khaosz_requests_held{model="tiny"}']) == 0
    assert float(found['khaosz_model_loaded{model="tiny"}']) == 1
    cached = float(found['khaosz_cached_tokens_total{model="tiny"}'])
    assert 0 < cached < float(found['khaosz_prompt_tokens_total{model="tiny"}'])


def test_cache_size_is_read_while_caches_change(tiny: Path) -> None:
    """/metrics and unloading read it from another thread than the engine's."""
    runner = Generator.from_directory(tiny).engine.runner
    caches = [runner.new_cache() for _ in range(64)]
    for cache in caches:
        cache.reserve(16)
        cache.length = 16
    prefixes, failed = PrefixCache(64 * caches[0].nbytes), []
    done, interval = threading.Event(), sys.getswitchinterval()

    def count() -> None:
        try:
            while not done.is_set():
                prefixes.nbytes  # noqa: B018
        except RuntimeError as error:
            failed.append(error)

    counting = threading.Thread(target=count)
    sys.setswitchinterval(1e-6)
    try:
        counting.start()
        for number in range(3000):
            prefixes.put([number] * 16, caches[number % 64])
    finally:
        done.set()
        counting.join()
        sys.setswitchinterval(interval)
    assert not failed


def test_gguf_counts_as_it_is_computed_with(tiny: Path, tmp_path: Path) -> None:
    """F16 matrices take fp32, twice their size in the file; rows of the embedding stay there."""
    files = {
        kind: str(convert(tiny, tmp_path / f"{kind}.gguf", kind=kind)) for kind in ("F16", "F32")
    }
    directory, *models = named_models([str(tiny), *files.values()])
    weights = {kind: model.weights for kind, model in zip(files, models, strict=True)}
    embedding = 4 * load_config(tiny).vocab_size * load_config(tiny).hidden_size
    assert weights["F16"] == weights["F32"] == directory.weights - embedding
