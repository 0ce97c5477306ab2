"""Models that are fetched and served on request, from a local hub."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from catalogue_helpers import KNOWN, ended, hub, listed, pull_of, tiny_gguf, when
from fork_server import ForkServer
from hub_server import HubServer, forked, hub_server
from serving import Service, served, wait_until

from khaosz.interop.fetch.catalogue import catalogue
from khaosz.interop.fetch.store import models_folder, pulled_models, staging
from khaosz.serve.catalogue.routes import CatalogueReply, PullReply
from khaosz.serve.models import Limits

__all__ = ["hub", "tiny_gguf"]


@pytest.fixture
def empty(hub: HubServer, tmp_path: Path) -> Iterator[Service]:
    """A service without a model."""
    with served(runs=tmp_path / "runs") as service:
        yield service


def test_a_pulled_model_answers_without_a_restart(
    empty: Service, hub: HubServer, tmp_path: Path
) -> None:
    assert empty.ask("GET", "/v1/models")[2]["data"] == []
    assert empty.ask("GET", "/health/ready")[0] == 200
    reply = CatalogueReply.model_validate(empty.ask("GET", "/v1/catalogue")[2])
    assert reply.proposed == KNOWN
    [entry] = [each for each in reply.data if each.name == KNOWN]
    assert not entry.here and entry.fits and entry.sources == [f"Hugging Face ({hub.address[7:]})"]
    assert not hub.log, "listing asks no host"

    PullReply.model_validate(pull_of(empty, KNOWN, "POST"))
    pull = ended(empty, KNOWN)
    assert pull["state"] == "complete" and pull["bytes"] == pull["total"], pull
    assert pull["model"] == KNOWN and listed(empty, KNOWN)["served"] == KNOWN
    answer = empty.client().chat.completions.create(
        model=KNOWN, messages=[{"role": "user", "content": "fox"}], max_tokens=4
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    document = empty.ask("GET", "/openapi.json")[2]
    model = document["components"]["schemas"]["ChatRequest"]["properties"]["model"]
    assert model["enum"] == [KNOWN]
    asked = len(hub.log)
    assert pull_of(empty, KNOWN, "POST")["state"] in ("running", "complete")
    assert ended(empty, KNOWN)["model"] == KNOWN and len(hub.log) == asked, "it is here already"


def test_a_cancelled_pull_is_resumed_or_discarded(empty: Service, hub: HubServer) -> None:
    hub.pause = 0.05
    pull_of(empty, KNOWN, "POST")
    running = when(empty, KNOWN, lambda pull: pull["bytes"] > 0 and pull["rate"])
    assert running["state"] == "running" and running["remaining"] > 0
    assert running["source"].startswith("Hugging Face")
    assert pull_of(empty, KNOWN, "DELETE")["state"] == "cancelled"
    wait_until(lambda: not list(models_folder().glob(".pulling/*/.lock")))
    assert listed(empty, KNOWN)["staged"] > 0 and not pulled_models()
    pull_of(empty, KNOWN, "POST")
    when(empty, KNOWN, lambda pull: pull["bytes"] > running["bytes"])
    assert hub.ranges, "resumed"
    pull_of(empty, KNOWN, "DELETE", "?discard=true")
    wait_until(lambda: listed(empty, KNOWN)["staged"] == 0)


def test_a_failure_has_a_code_and_leaves_nothing(
    empty: Service, hub: HubServer, tiny_gguf: bytes
) -> None:
    hub.sent = {"tiny.gguf": bytes(len(tiny_gguf))}
    for name, code in ((KNOWN, "wrong_hash"), ("huge", "disk_full"), ("nowhere", "no_network")):
        pull_of(empty, name, "POST")
        pull = ended(empty, name)
        assert (pull["state"], pull["code"]) == ("failed", code), pull
        assert pull["error"] and "\n" not in pull["error"]
        assert not listed(empty, name)["here"] and not pulled_models()
        assert pull_of(empty, name, "DELETE")["state"] == "failed"
        assert empty.ask("GET", f"/v1/catalogue/{name}/pull")[0] == 404, "dismissed"


def test_a_pull_in_another_process_is_named(empty: Service) -> None:
    def hold() -> None:
        with staging(KNOWN):
            time.sleep(30)

    process = forked(hold)
    try:
        wait_until(lambda: bool(list(models_folder().glob(".pulling/*/.lock"))))
        pull_of(empty, KNOWN, "POST")
        pull = ended(empty, KNOWN)
        assert pull["code"] == "being_pulled" and str(process) in pull["error"]
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_limited_licence_is_accepted_first(empty: Service) -> None:
    path = "/v1/catalogue/limited/pull"
    status, _, answer = empty.ask("POST", path)
    assert status == 409 and answer["error"]["code"] == "licence_not_accepted"
    assert empty.ask("POST", path, json.dumps({"accept_licence": True}))[0] == 202
    assert empty.ask("POST", path, json.dumps({"licence": True}))[0] == 400
    assert empty.ask("POST", "/v1/catalogue/missing/pull")[0] == 404


def test_a_model_beyond_the_memory_limit_is_not_served(hub: HubServer, tmp_path: Path) -> None:
    with served(runs=tmp_path / "runs", limits=Limits(memory=1 << 10)) as service:
        assert listed(service, KNOWN)["fits"] is False
        pull_of(service, KNOWN, "POST")
        assert ended(service, KNOWN)["code"] == "memory_limit"
        assert service.ask("GET", "/v1/models")[2]["data"] == []


def test_files_of_other_programs_and_runs_are_served_where_they_lie(
    hub: HubServer, tmp_path: Path, tiny: Path, tiny_gguf: bytes
) -> None:
    ollama = tmp_path / "home/.ollama/models"
    digest = hashlib.sha256(tiny_gguf).hexdigest()
    manifest = ollama / "manifests/registry.ollama.ai/library/fox/1b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    (ollama / "blobs").mkdir()
    (ollama / f"blobs/sha256-{digest}").write_bytes(tiny_gguf)
    studio = tmp_path / "home/.lmstudio/models/me/broken/broken.gguf"
    studio.parent.mkdir(parents=True)
    studio.write_bytes(b"GGUF")
    trained = tmp_path / "runs/demo/dpo/last"
    trained.parent.mkdir(parents=True)
    trained.symlink_to(tiny)
    # The name that `khaosz serve` would give the trained one is in use.
    with served(f"dpo={tiny}", runs=tmp_path / "runs") as service:
        assert listed(service, "demo/dpo")["served"] == "dpo", "it is the same file"
        row = listed(service, "ollama/fox:1b")
        assert row["here"] and row["origin"] == "ollama" and row["memory"] > len(tiny_gguf)
        assert listed(service, "lmstudio/broken")["problem"]
        assert service.ask("POST", "/v1/catalogue/lmstudio/broken/pull")[0] == 409
        pull_of(service, "ollama/fox:1b", "POST")
        assert ended(service, "ollama/fox:1b")["model"] == "ollama/fox:1b"
        answer = service.client().completions.create(model="ollama/fox:1b", prompt="fox")
        assert answer.choices[0].text
        assert not hub.log


def test_pulls_need_the_key(hub: HubServer, tmp_path: Path) -> None:
    with served(runs=tmp_path / "runs", key="sesame") as service:
        assert service.ask("GET", "/v1/catalogue")[0] == 401
        assert service.ask("POST", f"/v1/catalogue/{KNOWN}/pull")[0] == 401
        foreign = {"Origin": "http://example.org", "Authorization": "Bearer sesame"}
        assert service.ask("POST", f"/v1/catalogue/{KNOWN}/pull", **foreign)[0] == 403
    assert not hub.log


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ForkServer, HubServer]]:
    """`khaosz serve` in an empty home, with the real catalogue, and its hub, which has the first
    file of the catalogue with other bytes."""
    folder = tmp_path_factory.mktemp("commands")
    entry = next(iter(catalogue().values()))
    with hub_server() as server, pytest.MonkeyPatch.context() as patch:
        content = {entry.file: bytes(entry.bytes)}
        server.files[entry.huggingface or ""] = {entry.revision or "": content}
        server.pause = 0.002
        patch.setenv("HOME", str(folder))
        patch.setenv("KHAOSZ_CACHE", str(folder / "cache"))
        patch.setenv("HF_ENDPOINT", server.address)
        patch.chdir(folder)
        (folder / "stderr").mkdir()
        forks = ForkServer(folder / "stderr")
        yield forks, server
        forks.close()


@pytest.mark.slow
def test_a_killed_service_resumes_its_pull(commands: tuple[ForkServer, HubServer]) -> None:
    """The command, which starts without any model."""
    forks, hub = commands
    name = next(iter(catalogue()))
    with forks.khaosz() as command:
        service = Service(command.port, None)  # type: ignore[arg-type]
        assert service.ask("GET", "/v1/models")[2]["data"] == []
        pull_of(service, name, "POST")
        when(service, name, lambda pull: pull["bytes"] > 0)
    assert not hub.ranges
    with forks.khaosz() as command:
        service = Service(command.port, None)  # type: ignore[arg-type]
        row = listed(service, name)
        assert row["staged"] > 0 and row["pull"] is None and not row["here"]
        assert len(hub.downloads) == 1, "a start fetches nothing"
        pull_of(service, name, "POST")
        when(service, name, lambda pull: pull["bytes"] > row["staged"])
        assert hub.ranges == [f"bytes={row['staged']}-"]
