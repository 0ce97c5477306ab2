"""Pulling by reference and from a local path: against a server that speaks as the hubs do."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer, forked, hub_server

from khaosz.errors import FetchError, ModelError
from khaosz.files import exclusive
from khaosz.interop.fetch.pull import pull
from khaosz.interop.fetch.store import models_folder, pulled_models, read_record
from khaosz.interop.gguf.file import GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.local_models import find_model
from khaosz.interop.models import load_model, open_tokenizer

FOX = "m-q8_0.gguf"


@pytest.mark.parametrize("host", ["hf", "ms"])
def test_repository_is_fetched_once_and_runs(
    hub: HubServer, directory: dict[str, bytes], host: str
) -> None:
    hub.add("me/tiny", {**directory, "README.md": b"not needed", "x.gguf": b"neither"})
    seen: list[tuple[str, int, int]] = []
    path = pull(f"{host}:me/tiny", lambda *at: seen.append(at))
    assert load_model(path).config.hidden_size == 32
    assert open_tokenizer(path).encode("the fox")
    assert not (path / "README.md").exists() and not (path / "x.gguf").exists()
    assert ("model.safetensors", seen[-1][2], seen[-1][2]) == seen[-1], "the weights come last"
    before = len(hub.downloads)
    assert pull(f"{host}:me/tiny") == path and len(hub.downloads) == before
    assert pulled_models() == [path]


def test_every_file_of_a_tokenizer_is_fetched(hub: HubServer, directory: dict[str, bytes]) -> None:
    more = {
        "special_tokens_map.json": b'{"eos_token": "<|eos|>"}',
        "added_tokens.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"T",
        "chat_template.jinja": b"D",
    }
    hub.add("me/tiny", {**directory, **more})
    path = pull("hf:me/tiny")
    assert open_tokenizer(path).chat_templates == {"default": "D", "tool_use": "T"}
    assert (path / "special_tokens_map.json").exists() and (path / "added_tokens.json").exists()


def test_files_of_one_name_in_two_repositories_are_two_models(
    hub: HubServer, new_gguf: bytes, old_gguf: bytes
) -> None:
    hub.add("one/m", {FOX: new_gguf})
    hub.add("two/m", {FOX: old_gguf})
    first, second = pull(f"hf:one/m/{FOX}"), pull(f"hf:two/m/{FOX}")
    assert first.read_bytes() == new_gguf and second.read_bytes() == old_gguf


def test_broken_connections_are_continued(hub: HubServer, new_gguf: bytes) -> None:
    hub.add("me/tiny", {FOX: new_gguf})
    hub.cuts = [50_000, 70_000]
    assert pull(f"hf:me/tiny/{FOX}").read_bytes() == new_gguf
    assert f"bytes={50_000}-" in hub.ranges and f"bytes={120_000}-" in hub.ranges


def test_a_server_without_ranges_starts_again(hub: HubServer, new_gguf: bytes) -> None:
    hub.add("me/tiny", {FOX: new_gguf})
    hub.cuts, hub.ignores_ranges = [1 << 20, 50_000], True  # the header is read first
    assert pull(f"hf:me/tiny/{FOX}").read_bytes() == new_gguf


def interrupted_pull(hub: HubServer, content: bytes) -> None:
    """80,000 bytes arrive, and the retries get nothing."""
    hub.add("me/tiny", {FOX: content})
    hub.cuts = [80_000, 0, 0, 0]
    with pytest.raises(FetchError, match="peer closed connection") as caught:
        pull(f"hf:me/tiny/{FOX}")
    assert caught.value.hint is not None and "to resume" in caught.value.hint


def test_interrupted_download_resumes_at_another_time(hub: HubServer, new_gguf: bytes) -> None:
    interrupted_pull(hub, new_gguf)
    assert not pulled_models(), "a half is not a model"
    hub.log.clear()
    assert pull(f"hf:me/tiny/{FOX}").read_bytes() == new_gguf
    assert "bytes=80000-" in hub.ranges


def test_resumed_download_does_not_mix_revisions(
    hub: HubServer, new_gguf: bytes, old_gguf: bytes
) -> None:
    interrupted_pull(hub, old_gguf)
    hub.add("me/tiny", {FOX: new_gguf})
    assert pull(f"hf:me/tiny/{FOX}").read_bytes() == new_gguf
    assert not list((models_folder() / ".pulling").rglob("*.part")), "the old part is removed"


def test_a_new_commit_is_fetched_and_an_old_one_by_its_name(
    hub: HubServer, new_gguf: bytes, old_gguf: bytes
) -> None:
    old = hub.add("me/tiny", {FOX: old_gguf})
    assert pull(f"hf:me/tiny/{FOX}").read_bytes() == old_gguf
    hub.add("me/tiny", {FOX: new_gguf})
    path = pull(f"hf:me/tiny/{FOX}")
    assert path.read_bytes() == new_gguf
    assert pull(f"hf:me/tiny/{FOX}@{old}").read_bytes() == old_gguf
    record = read_record(path.parent)
    assert record is not None and record.revision == old and record.licence == "mit"


def test_a_part_that_is_longer_than_the_file_is_dropped(
    hub: HubServer, new_gguf: bytes, old_gguf: bytes
) -> None:
    interrupted_pull(hub, new_gguf)
    (part,) = (models_folder() / ".pulling").rglob("*.part")
    part.write_bytes(old_gguf + new_gguf)
    assert pull(f"hf:me/tiny/{FOX}").read_bytes() == new_gguf
    hub.add("me/other", {FOX: new_gguf})  # whole, with the wrong content
    stage = models_folder() / ".pulling/me--other--m-q8_0"
    stage.mkdir(parents=True)
    (stage / part.name).write_bytes(old_gguf[: len(new_gguf)])
    assert pull(f"hf:me/other/{FOX}").read_bytes() == new_gguf


def test_wrong_content_is_refused(hub: HubServer, new_gguf: bytes, old_gguf: bytes) -> None:
    hub.add("me/tiny", {FOX: new_gguf})
    for sent in (old_gguf[: len(new_gguf)], new_gguf + b"more"):
        hub.sent = {FOX: sent}
        with pytest.raises(FetchError, match=r"does not have its published hash|sends more than"):
            pull(f"hf:me/tiny/{FOX}")
        assert not pulled_models()


def test_unsupported_models_are_refused_before_their_weights(
    hub: HubServer, directory: dict[str, bytes], new_gguf: bytes
) -> None:
    config = json.loads(directory["config.json"])
    changed = json.dumps({**config, "model_type": "mamba"}).encode()
    hub.add("me/mamba", {**directory, "config.json": changed})
    with pytest.raises(ModelError, match="mamba") as caught:
        pull("hf:me/mamba")
    assert "khaosz pull" in (caught.value.hint or "")
    assert not any("safetensors" in path for path in hub.downloads)
    # Of a large file, the header is read alone.
    mamba = new_gguf.replace(b"llama", b"mamba") + bytes(40 << 20)
    hub.add("me/gguf", {FOX: mamba})
    hub.log.clear()
    with pytest.raises(ModelError, match=r"architecture mamba, which is not supported") as caught:
        pull(f"hf:me/gguf/{FOX}")
    assert "khaosz pull" in (caught.value.hint or "")
    assert hub.ranges == [f"bytes=0-{(2 << 20) - 1}"]
    assert not pulled_models()


def test_quantised_types_and_split_files_are_chosen(
    hub: HubServer, new_gguf: bytes, old_gguf: bytes
) -> None:
    hub.add(
        "me/many",
        {"m-Q4_K_M.gguf": new_gguf, "m-Q8_0.gguf": old_gguf, "mmproj-Q8_0.gguf": b"picture"},
    )
    assert pull("hf:me/many").name == "m-Q4_K_M.gguf"
    assert pull("hf:me/many:q8_0").read_bytes() == old_gguf
    with pytest.raises(FetchError, match="no Q2_K file") as caught:
        pull("hf:me/many:Q2_K")
    assert caught.value.hint == "its files: m-Q4_K_M.gguf, m-Q8_0.gguf"
    hub.add("me/split", {"m-Q8_0-00001-of-00002.gguf": new_gguf, "README.md": b"x"})
    with pytest.raises(FetchError, match=r"part m-Q8_0-00002-of-00002\.gguf is missing"):
        pull("hf:me/split:Q8_0")


def test_all_parts_of_a_split_file_are_fetched(
    hub: HubServer, tiny_folder: Path, tmp_path: Path
) -> None:
    whole = GgufFile.open(tiny_folder / "new.gguf")
    whole_keys = {
        key: value.tolist() if isinstance(value, np.ndarray) and value.dtype == bool else value
        for key, value in whole.metadata.items()
    }
    names = sorted(whole.tensors)
    parts: dict[str, bytes] = {}
    for number, members in enumerate((names[:5], names[5:])):
        keys = whole_keys if number == 0 else {}
        keys = {**keys, "split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        tensors = [
            TensorToWrite(name, "F32", whole.tensors[name].shape, lambda n=name: [whole.raw(n)])
            for name in members
        ]
        file = tmp_path / f"m-F32-0000{number + 1}-of-00002.gguf"
        write_gguf(file, keys, tensors)
        parts[file.name] = file.read_bytes()
    hub.add("me/split", parts)
    path = pull("hf:me/split:F32")
    assert path.name == "m-F32-00001-of-00002.gguf" and path.parent.name == "me--split--m-F32"
    assert load_model(path).config.hidden_size == 32
    assert pulled_models() == [path] and find_model("me--split--m-F32") == path
    other = parts["m-F32-00002-of-00002.gguf"].replace(b"blk.1", b"blk.7")
    hub.add("me/other", {**parts, "m-F32-00002-of-00002.gguf": other})
    with pytest.raises(ModelError, match=r"tensor 'blk\.1"):
        pull("hf:me/other:F32")
    assert pulled_models() == [path]


def test_missing_things_are_named(hub: HubServer, directory: dict[str, bytes]) -> None:
    hub.add("me/tiny", directory)
    with pytest.raises(FetchError, match=r"me/other: not found at 127.* \(404\)"):
        pull("hf:me/other")
    with pytest.raises(FetchError, match=r"x\.gguf not found in me/tiny"):
        pull("hf:me/tiny/x.gguf")
    with pytest.raises(FetchError, match=r"not found at .* \(404\)"):
        pull(f"hf:me/tiny@{'0' * 40}")
    hub.add("me/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(FetchError, match="no safetensors model and no GGUF file"):
        pull("hf:me/pickle")
    with pytest.raises(FetchError, match="model 'smollm3' not found"):
        pull("smollm3")


def test_a_mirror_that_lists_names_only_is_asked_for_each_file(
    hub: HubServer, directory: dict[str, bytes], new_gguf: bytes, old_gguf: bytes
) -> None:
    hub.add("me/tiny", directory)
    hub.lists_names_only = True
    assert load_model(pull("hf:me/tiny")).config.hidden_size == 32
    hub.add("me/file", {FOX: new_gguf})
    hub.sent = {FOX: old_gguf[: len(new_gguf)]}
    with pytest.raises(FetchError, match="does not have its published hash"):
        pull(f"hf:me/file/{FOX}")


@pytest.mark.parametrize(("status", "words"), [(401, "refuses access"), (503, "answers 503")])
def test_refusals_are_named(hub: HubServer, status: int, words: str) -> None:
    hub.status = status
    with pytest.raises(FetchError, match=words) as caught:
        pull("hf:me/tiny")
    assert caught.value.hint == (
        "set HF_TOKEN to a token that has access" if status == 401 else "try again later"
    )


def test_token_opens_a_gated_repository_and_stays_with_its_host(
    hub: HubServer, new_gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/gated", {FOX: new_gguf})
    hub.gated = "hf_secret"
    with pytest.raises(FetchError, match=r"gated \(403\)") as caught:
        pull(f"hf:me/gated/{FOX}")
    assert "accept its terms" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub_server() as storage:  # files lie on another host, as they do at the hubs
        storage.files, storage.head = hub.files, hub.head
        hub.redirect = f"http://localhost:{storage.port}"
        assert pull(f"hf:me/gated/{FOX}").read_bytes() == new_gguf
        assert {each[3] for each in hub.log[-2:]} == {"Bearer hf_secret"}
        assert storage.log and all(each[3] is None for each in storage.log)


def test_silence_is_a_timeout(
    hub: HubServer, new_gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("me/tiny", {FOX: new_gguf})
    hub.stall = 5
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with pytest.raises(FetchError, match=r"^timeout: 127.0.0.1:\d+ sent nothing for"):
        pull(f"hf:me/tiny/{FOX}")


def test_no_server_and_offline_mode_are_named(
    hub: HubServer, new_gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("me/tiny", {FOX: new_gguf})
    path = pull(f"hf:me/tiny/{FOX}")
    notes: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(f"hf:me/tiny/{FOX}", note=notes.append) == path
    assert "HF_HUB_OFFLINE is set; using what is here" in notes[0]
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
        pull("hf:me/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match=r"cannot connect to 127\.0\.0\.1:9"):
        pull("hf:me/other")


def test_one_process_pulls_a_model_at_a_time(hub: HubServer, new_gguf: bytes) -> None:
    hub.add("me/tiny", {FOX: new_gguf})
    with (
        exclusive(models_folder() / ".pulling/me--tiny--m-q8_0"),
        pytest.raises(FetchError, match=f"is being pulled by process {os.getpid()}"),
    ):
        pull(f"hf:me/tiny/{FOX}")
    assert pull(f"hf:me/tiny/{FOX}").exists()


def test_a_full_disk_is_named_and_what_arrived_stays(
    hub: HubServer, new_gguf: bytes, tmp_path: Path
) -> None:
    hub.add("me/tiny", {FOX: new_gguf})
    said = tmp_path / "said"

    def pull_on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            pull(f"hf:me/tiny/{FOX}")
        except FetchError as error:
            said.write_text(f"{error}; {error.hint}")

    os.waitpid(forked(pull_on_a_full_disk), 0)
    assert said.read_text().startswith("cannot write: ")
    assert "free some space" in said.read_text()
    assert not pulled_models()
    hub.log.clear()
    assert pull(f"hf:me/tiny/{FOX}").read_bytes() == new_gguf
    assert any(range_.startswith("bytes=") and range_[6] != "0" for range_ in hub.ranges)


def test_local_models_are_checked_and_copied(tiny_folder: Path, tmp_path: Path) -> None:
    path = pull(str(tiny_folder))
    assert path != tiny_folder and load_model(path).config.hidden_size == 32
    file = pull(str(tiny_folder / "new.gguf"))
    assert GgufModel.open(file).config.hidden_size == 32
    with pytest.raises(FetchError, match="exists"):
        pull(str(tiny_folder))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cut short"):
        pull(str(broken))


def test_half_a_folder_of_an_earlier_version_is_not_offered(directory: dict[str, bytes]) -> None:
    folder = models_folder() / "g--gemma-3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(directory["config.json"])
    (folder / ".model.safetensors.partial").write_bytes(b"half")
    assert pulled_models() == []
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1", "b": "2"}}')
    (folder / "1").touch()
    assert pulled_models() == []
    (folder / "2").touch()
    assert pulled_models() == [folder]
