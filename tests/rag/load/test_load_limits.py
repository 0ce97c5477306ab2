"""Workers that hang, run out of memory, die or cannot start: each is a problem of its file only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from make_documents import load, load_one, pdf_bytes, problem_of, word, write_docx

from khaosz.errors import DocumentError
from khaosz.rag.load import Limits, Problem, load_paths
from khaosz.rag.load.document import InputFile
from khaosz.rag.load.pool import WorkerPool, _Worker, read_frame, write_frame

pytest.importorskip("selectolax")
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems lack this limit")

# An HTML parser opens the elements of the first paragraph again in each later one: 220 KB become
# sixty million elements.
HUGE_TREE = "<p>" + "".join(f"<b id={n}>" for n in range(3000)) + "<p>x" * 20_000


def page(path: Path, text: str) -> Path:
    path.write_text(f"<p>{text}", encoding="utf-8")
    return path


def html(path: Path) -> InputFile:
    return InputFile(path, path.name, "html")


def test_files_of_several_formats_keep_their_order(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    pytest.importorskip("mammoth")
    for n in range(0, 100, 4):  # more than _LOOK_AHEAD
        (tmp_path / f"{n:02}.txt").write_text(f"text {n}")
        page(tmp_path / f"{n + 1:02}.html", f"text {n + 1}")
        write_docx(tmp_path / f"{n + 2:02}.docx", word(f"text {n + 2}"))
        (tmp_path / f"{n + 3:02}.pdf").write_bytes(pdf_bytes([[(72, 700, f"text {n + 3}")]]))
    loaded, problems = load(tmp_path)
    assert not problems
    texts = [document.text for _, documents in loaded.values() for document in documents]
    assert texts == [f"text {n}" for n in range(100)]


def test_source_of_a_formatted_file(tmp_path: Path) -> None:
    path = page(tmp_path / "页.html", "你好")
    ((source, _),) = load_paths([path], on_problem=pytest.fail)
    assert source.path == path.resolve() and source.size == path.stat().st_size
    assert source.mtime_ns == path.stat().st_mtime_ns and len(source.sha256) == 64


def test_worker_is_reused(tmp_path: Path) -> None:
    path = page(tmp_path / "a.html", "x")
    with WorkerPool(Limits(workers=1)) as pool:
        pool.submit(html(path)).result()
        first = _processes(pool)
        for _ in range(20):
            pool.submit(html(path)).result()
        assert _processes(pool) == first and len(first) == 1


def test_file_that_hangs_is_a_problem_and_the_others_load(tmp_path: Path) -> None:
    page(tmp_path / "a.html", "before")
    (tmp_path / "b.html").write_text(HUGE_TREE)
    page(tmp_path / "c.html", "after")
    limits = Limits(seconds=1.5, memory_bytes=1 << 40, workers=1)
    loaded, (problem,) = load(tmp_path, limits=limits)
    assert [d.text for _, (d,) in loaded.values()] == ["before", "after"]
    assert problem.path.name == "b.html" and problem.message == "takes longer than 1.5 seconds"
    assert problem.code == "too_slow"


def test_worker_is_killed_after_the_time_limit(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(HUGE_TREE)
    limits = Limits(memory_bytes=1 << 40)
    worker = _Worker(limits)
    try:
        assert worker.request({"limits": asdict(limits), "docling": False}, 60) == {}
        request = {"path": str(tmp_path / "a.html"), "name": "a.html", "format": "html"}
        with pytest.raises(DocumentError, match=r"takes longer than 0\.2 seconds"):
            worker.request(request, 0.2)
        assert worker.process.wait(60) == (1 if os.name == "nt" else -signal.SIGKILL)
    finally:
        worker.close()


@linux
def test_file_over_the_memory_limit_is_a_problem_and_the_others_load(tmp_path: Path) -> None:
    page(tmp_path / "a.html", "before")
    (tmp_path / "b.html").write_text(HUGE_TREE)
    page(tmp_path / "c.html", "after")
    loaded, (problem,) = load(tmp_path, limits=Limits(memory_bytes=200 << 20, workers=1))
    assert [d.text for _, (d,) in loaded.values()] == ["before", "after"]
    assert problem.path.name == "b.html" and "200 MB" in problem.message + problem.hint


@linux
def test_python_memory_error_is_reported_as_memory(tmp_path: Path) -> None:
    pytest.importorskip("mammoth")
    path = write_docx(tmp_path / "a.docx", "".join(word(f"{n * n:x}") for n in range(20_000)))
    with WorkerPool(Limits(memory_bytes=80 << 20)) as pool:
        with pytest.raises(DocumentError, match="needs more than 80 MB of memory") as caught:
            pool.submit(InputFile(path, path.name, "docx")).result()
        assert caught.value.code == "too_large"
        assert not _processes(pool)  # its heap is full, and its limit was lifted for the reply
    assert load_one(path).text.startswith("0\n\n1\n\n4\n\n9")


def test_worker_that_dies_loses_only_its_file(tmp_path: Path) -> None:
    path = page(tmp_path / "a.html", "x")
    with WorkerPool(Limits(workers=1)) as pool:
        pool.submit(html(path)).result()
        (dead,) = _processes(pool)
        os.kill(dead, signal.SIGTERM)
        while _is_running(dead):
            time.sleep(0.01)
        with pytest.raises(DocumentError, match="makes its parser fail"):
            pool.submit(html(path)).result()
        _, (document,) = pool.submit(html(path)).result()
        assert document.text == "x" and _processes(pool) != [dead]


def _processes(pool: WorkerPool) -> list[int]:
    return sorted(worker.process.pid for worker in pool._workers)


def _is_running(process: int) -> bool:
    """Whether a child that was not waited for is not yet a zombie."""
    if sys.platform != "linux":
        time.sleep(1)
        return False
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@linux
def test_worker_that_cannot_start_is_a_problem(tmp_path: Path) -> None:
    problem = problem_of(page(tmp_path / "a.html", "x"), Limits(memory_bytes=1 << 20))
    assert problem.hint


def test_processes_end_with_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mammoth.py").write_text("import time; time.sleep(1000)")
    monkeypatch.syspath_prepend(str(tmp_path))
    page(tmp_path / "1.html", "x")
    write_docx(tmp_path / "2.docx", word("x"))
    page(tmp_path / "3.html", "x")
    problems: list[Problem] = []
    paths = [tmp_path / name for name in ("1.html", "2.docx", "3.html")]
    others = _children()  # of earlier tests
    loading = load_paths(paths, on_problem=problems.append)
    next(loading)
    started = _children() - others
    assert started
    loading.close()  # while a worker is busy with 2.docx
    assert not _children() & started and not problems


def _children() -> set[int]:
    psutil = pytest.importorskip("psutil")
    return {child.pid for child in psutil.Process().children()}


def test_worker_ends_after_its_parent(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    page(tmp_path / "a.html", "x")
    page(tmp_path / "b.html", "x")
    code = (
        "import os, pathlib, psutil\nfrom khaosz.rag.load import load_paths\n"
        f"loading = load_paths([pathlib.Path({str(tmp_path)!r})], on_problem=print)\n"
        "next(loading)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    workers = [int(pid) for pid in done.stdout.split()]
    assert workers, done.stderr
    for pid in workers:
        if psutil.pid_exists(pid):
            try:
                psutil.Process(pid).wait(30)
            except psutil.NoSuchProcess:
                continue


@pytest.mark.parametrize(
    ("package", "name"),
    [("selectolax", "a.html"), ("mammoth", "a.docx"), ("pypdfium2", "a.pdf")],
)
def test_missing_package_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    """A package in its place fails like one that is not installed."""
    shadow = tmp_path / "site"
    shadow.mkdir()
    (shadow / f"{package}.py").write_text(
        f"raise ModuleNotFoundError('No module named {package}', name='{package}')"
    )
    monkeypatch.syspath_prepend(str(shadow))
    path = tmp_path / name
    path.write_bytes(b"<p>x")
    problem = problem_of(path)
    assert problem.message == f"needs the package {package}"
    assert problem.hint == 'pip install "khaosz[rag]"'


def test_worker_has_no_network_and_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package in the place of a parser does what a malicious file could make it do."""
    attempts = {
        "a": "import socket; socket.create_connection(('127.0.0.1', 9))",
        "b": "import subprocess; subprocess.run(['true'])",
        "c": "import os; os.system('true')",
    }
    for name, attempt in attempts.items():
        shadow = tmp_path / name
        shadow.mkdir()
        (shadow / "mammoth.py").write_text(attempt)
        path = write_docx(tmp_path / f"{name}.docx", word("x"))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(shadow))
            assert "in a document loader" in problem_of(path).message


def test_output_of_a_parser_does_not_mix_with_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mammoth.py").write_text("import os; os.write(1, b'x' * 99)\nraise ValueError('y')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_docx(tmp_path / "a.docx", word("x"))
    assert problem_of(path).message == "cannot be parsed: ValueError: y"


def test_files_over_the_size_limits(tmp_path: Path) -> None:
    path = page(tmp_path / "a.html", "x" * 1000)
    problem = problem_of(path, Limits(file_bytes=999))
    assert (problem.message, problem.code) == ("is larger than 999 bytes", "too_large")
    assert problem_of(path, Limits(text_characters=999)).message == "has more than 999 characters"


def test_frames_are_complete_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    messages = [{}, {"a": "中\udcff" * 100_000}, {"b": [1, None, True]}]
    with open(path, "wb", buffering=0) as pipe:
        for message in messages:
            write_frame(pipe, message)
    with open(path, "rb", buffering=0) as pipe:
        assert [read_frame(pipe) for _ in range(4)] == [*messages, None]
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with open(path, "rb", buffering=0) as pipe:
        assert [read_frame(pipe) for _ in range(3)] == [*messages[:2], None]
    path.write_bytes(b"\xff\xff\xff\xff")
    with open(path, "rb", buffering=0) as pipe, pytest.raises(ValueError, match="at most 1000"):
        read_frame(pipe, 1000)
    path.write_bytes(b"\0\0\0\x02[]")
    with open(path, "rb", buffering=0) as pipe, pytest.raises(ValueError, match="a list"):
        read_frame(pipe)
