"""Atomic, synced writes: complete or as before, nothing left over, synced in the right order."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from khaosz import files
from khaosz.errors import FetchError
from khaosz.files import natural_key

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def by_file(path: Path, data: bytes) -> None:
    with files.atomic_file(path) as file:
        file.write(data)


def by_path(path: Path, data: bytes) -> None:
    with files.atomic_path(path) as partial:
        partial.write_bytes(data)


def by_parts(path: Path, data: bytes) -> None:
    files.write_atomic(path, (bytes([byte]) for byte in data))


WRITERS = pytest.mark.parametrize("write", [by_file, by_path, by_parts])
Write = Callable[[Path, bytes], None]


@WRITERS
def test_writes_and_replaces(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "a [1].bin"
    for data in (b"old", b"", b"new"):
        write(path, data)
        assert path.read_bytes() == data
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("context", [files.atomic_file, files.atomic_path, files.atomic_folder])
def test_error_in_block_leaves_nothing(tmp_path: Path, context: Callable) -> None:  # type: ignore[type-arg]
    with pytest.raises(KeyboardInterrupt), context(tmp_path / "new"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@WRITERS
def test_full_disk_leaves_old_file(
    tmp_path: Path, write: Write, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is synced and renamed, in order."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        done.append(f"rename {Path(old).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return done


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@WRITERS
def test_syncs_file_then_renames_then_syncs_folder(
    tmp_path: Path, write: Write, calls: list[str]
) -> None:
    write(tmp_path / "a", b"data")
    partial = f".a.{os.getpid()}.partial"
    assert calls == [f"sync {partial}", f"rename {partial}", f"sync {tmp_path.name}"]


@linux
def test_folder_is_synced_with_its_content(tmp_path: Path, calls: list[str]) -> None:
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/b").write_bytes(b"b")
        (folder / "a").write_bytes(b"a")
    assert sorted(calls[:3]) == ["sync a", "sync b", "sync inner"]
    assert calls[3:] == ["sync .out.partial", "rename .out.partial", f"sync {tmp_path.name}"]
    assert (tmp_path / "out/inner/b").read_bytes() == b"b"


def test_folder_replaces_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_bytes(b"old")
    with pytest.raises(OSError), files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"new")
    assert (tmp_path / "out/a").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from khaosz import files
from khaosz.errors import FetchError
with files.{context}(Path(sys.argv[1])) as target:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
@pytest.mark.parametrize(
    ("context", "write"),
    [
        ("atomic_file", "target.write(b'half' * 9999)"),
        ("atomic_path", "target.write_bytes(b'half')"),
        ("atomic_folder", "(target / 'a').write_bytes(b'half')"),
    ],
)
def test_kill_leaves_old_content(tmp_path: Path, context: str, write: str) -> None:
    path = tmp_path / "target"
    if context != "atomic_folder":
        path.write_bytes(b"old")
    program = KILLED.format(context=context, write=write)
    done = subprocess.run([sys.executable, "-c", program, str(path)])
    assert done.returncode == -9
    assert len(names(tmp_path)) == 1 + path.exists(), "the killed process left its part"
    if context == "atomic_folder":
        with files.atomic_folder(path):
            pass
    else:
        assert path.read_bytes() == b"old"
        files.write_atomic(path, [b"new"])
    assert names(tmp_path) == ["target"], "the next writer removes it"


def test_part_of_a_running_process_stays(tmp_path: Path) -> None:
    running, unrelated = tmp_path / f".a.{os.getppid()}.partial", tmp_path / ".a.x.partial"
    running.touch()
    unrelated.touch()
    files.write_atomic(tmp_path / "a", [b"new"])
    if os.name != "nt":
        assert running.exists()
    assert unrelated.exists()


@posix
def test_replacement_keeps_permissions(tmp_path: Path) -> None:
    path = tmp_path / "private.json"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with files.atomic_path(path) as partial:
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600, "before anything is written"
    files.write_json(path, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
def test_refuses_to_replace_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.write_atomic(tmp_path / "pipe", [b"x"])
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_json_is_readable_utf8(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"名": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"名": [1, 2.5, None]}
    assert "名" in text and text.endswith("}\n")


@linux
def test_append_syncs_and_keeps_what_is_there(tmp_path: Path, calls: list[str]) -> None:
    path = tmp_path / "lines"
    files.append(path, b"one\n")
    assert calls == ["sync lines", f"sync {tmp_path.name}"]
    files.append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    assert calls[2:] == ["sync lines"], "its name is on the disk"


def test_append_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    files.append(path, b"one\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.append(path, b"two\n")
    assert path.read_bytes() == b"one\n"


def test_writes_all_of_a_short_write() -> None:
    class AlmostFull:
        data = b""

        def write(self, data: memoryview) -> int:
            self.data += bytes(data[:3])
            return min(3, len(data))

    file = AlmostFull()
    files.write_all(file, b"ten bytes.")
    assert file.data == b"ten bytes."


def test_default_cache_is_set_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path))
    assert files.default_cache() == tmp_path
    monkeypatch.delenv("KHAOSZ_CACHE")
    assert files.default_cache().name == "khaosz"


def test_checksum_mismatch_removes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"data")
    files.verify_sha256(path, hashlib.sha256(b"data").hexdigest())
    with pytest.raises(FetchError, match="SHA-256"):
        files.verify_sha256(path, "0" * 64)
    assert not path.exists()


def test_names_are_in_natural_order() -> None:
    ordered = [
        "2.md", "10.md", "a1", "A2", "a10", "a10b2", "a10b10", "第1章", "第2章", "第10章",
        "第0012章", "第" + "9" * 5000 + "章",
    ]  # fmt: skip
    assert sorted(reversed(ordered), key=natural_key) == ordered
    assert sorted(["01", "1", "x", ""], key=natural_key) == ["", "01", "1", "x"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs files of two users")
def test_private_folder_with_files_of_another_user() -> None:
    """They stay as they are, and the others become private."""
    with tempfile.TemporaryDirectory() as name:  # `tmp_path` is closed to other users
        folder, paths = Path(name), [Path(name) / each for each in ("a", "b", "c")]
        for path in paths:
            path.write_text("x")
            path.chmod(0o644)
        for path in (folder, paths[0], paths[2]):
            os.chown(path, 65534, 65534)
        folder.chmod(0o755)
        os.seteuid(65534)
        try:
            assert files.make_private(folder)
        finally:
            os.seteuid(0)
        modes = [path.stat().st_mode & 0o777 for path in (folder, *paths)]
    assert modes == [0o700, 0o600, 0o644, 0o600]
