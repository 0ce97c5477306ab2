"""Puts the defects of this field back into our code, one at a time: the tests must go red.

    python -m tests.mutants                    all of them, exit 1 if fewer than 95 % are caught
    python -m tests.mutants --only NAME ...    some of them
    python -m tests.mutants --list             what there is

Each mutant replaces one text, which must occur exactly once, in a copy of the tree and runs the one
test (or group) that is there to notice. First all of those tests run on the copy as it is and must
pass. A test that dies of a NameError or the like has noticed bad Python, not the defect: such a
mutant counts as broken, and broken and timed-out mutants count as not caught.

Python and torch are imported once and every test runs in a fork of that process, which spares two
seconds a mutant: this needs POSIX.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("khaosz", "tests", "recipes", "pyproject.toml")
PRELOADED = ("torch", "numpy", "pytest", "safetensors.torch", "tokenizers", "jinja2", "pydantic")
ENOUGH = 0.95
# Python's own complaints about a mutant that is no program.
NO_DEFECT = ("NameError", "TypeError", "AttributeError", "ImportError", "SyntaxError",
             "IndentationError", "UnboundLocalError", "ModuleNotFoundError")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One defect: in `file`, `old` becomes `new`; `test` is the pytest selection to notice it."""

    name: str
    file: str
    old: str
    new: str
    test: str


def load_mutants() -> list[Mutant]:
    table = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text(encoding="utf-8"))
    return [Mutant(**each) for each in table["mutant"]]


@dataclass
class Result:
    """What became of a mutant."""

    outcome: str  # caught | survived | timeout | broken
    seconds: float
    why: str = ""  # the failing test, or what else there is to say
    said: str = ""  # the first line of what it failed with


class Tree:
    """A copy of the tree, in which one mutant at a time is put."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, folder / name)
        self._changed: tuple[Path, str] | None = None

    def mutate(self, mutant: Mutant) -> None:
        path = self.folder / mutant.file
        before = path.read_text(encoding="utf-8")
        self._changed = (path, before)
        self._write(path, before.replace(mutant.old, mutant.new))

    def restore(self) -> None:
        if self._changed is not None:
            self._write(*self._changed)
            self._changed = None

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Bytecode is told to be stale by size and whole seconds: a mutant of the same length, put
        # in within the same second, would not be seen.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


@dataclass
class Task:
    """A pytest run in a fork: of a mutant, or of a share of the selections as they are."""

    tests: list[str]
    tree: Tree
    log: Path
    pid: int = 0
    started: float = 0.0

    def start(self) -> None:
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 98
            try:
                code = self._run()
            finally:
                os._exit(code)

    def _run(self) -> int:
        """In the child: pytest, with `khaosz` from the copy here and in all that it starts."""
        os.setsid()  # a group of its own, so that a timeout ends torchrun's processes as well
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        copy = str(self.tree.folder)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = copy
        os.environ["COLUMNS"] = "300"  # so that the summary is not cut
        sys.path[:] = [copy, *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        importlib.invalidate_caches()
        import pytest

        scratch = str(self.log.with_suffix(".tmp"))
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", scratch, *self.tests]
        )
        loaded = getattr(sys.modules.get("khaosz"), "__file__", "") or ""
        if not loaded.startswith(copy):
            print(f"khaosz was imported from {loaded or 'nowhere'}, not from {copy}")
            return 99
        sys.stdout.flush()
        return int(code)

    def ended(self, timeout: float) -> int | None:
        """pytest's exit code, -1 after a timeout, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - self.started > timeout:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return -1
        return None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def judge(code: int, output: str, seconds: float) -> Result:
    """What pytest's exit code and summary say about a mutant."""
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - (.*))?$", output, re.MULTILINE)
    test = found[1].rpartition("/")[2] if found else ""
    complaint = (found[2] or "") if found else ""
    if code == 0:
        return Result("survived", seconds)
    if code == -1:
        return Result("timeout", seconds)
    if code != 1:
        return Result("broken", seconds, f"pytest ended with {code}")
    if complaint.startswith(NO_DEFECT):
        return Result("broken", seconds, test, complaint)
    return Result("caught", seconds, test, complaint)


def check_texts(mutants: Iterable[Mutant]) -> list[str]:
    """Mutants whose old text does not occur exactly once: the code has moved on."""
    problems = []
    for mutant in mutants:
        path = ROOT / mutant.file
        times = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
        if times != 1 or mutant.old == mutant.new:
            problems.append(f"{mutant.name}: its text occurs {times} times in {mutant.file}")
    return problems


def in_turn(tasks: list[Task | None], timeout: float) -> Iterator[tuple[int, int]]:
    """(slot, exit code) of the tasks that run in the slots, as they end."""
    while any(tasks):
        for slot, task in enumerate(tasks):
            if task is not None and (code := task.ended(timeout)) is not None:
                yield slot, code
        time.sleep(0.02)


def run_unmutated(tests: list[str], trees: list[Tree], timeout: float) -> str | None:
    """Run all selections on the code as it is: the output of the first run that fails, or None."""
    share = -(-len(tests) // len(trees))
    tasks: list[Task | None] = []
    for i, tree in enumerate(trees):
        if own := tests[i * share : (i + 1) * share]:
            begun = Task(own, tree, tree.folder.with_suffix(".log"))
            begun.start()
            tasks.append(begun)
    failed = None
    for slot, code in in_turn(tasks, timeout):
        task = tasks[slot]
        assert task is not None
        if code != 0:
            failed = failed or f"{task.output()[-5000:]}\npytest ended with {code}"
        tasks[slot] = None
    return failed


def run_mutants(
    mutants: list[Mutant], trees: list[Tree], timeout: float, why: bool
) -> list[Result]:
    """One mutant at a time in each tree, each judged by its own test."""
    results: dict[str, Result] = {}
    waiting = iter(mutants)
    running: list[Mutant | None] = [None] * len(trees)
    tasks: list[Task | None] = [None] * len(trees)

    def begin(slot: int) -> None:
        mutant, tree = next(waiting, None), trees[slot]
        running[slot] = mutant
        tasks[slot] = None
        if mutant is not None:
            tree.mutate(mutant)
            task = Task([mutant.test], tree, tree.folder.with_suffix(".log"))
            task.start()
            tasks[slot] = task

    for slot in range(len(trees)):
        begin(slot)
    for slot, code in in_turn(tasks, timeout):
        mutant, task = running[slot], tasks[slot]
        assert mutant is not None and task is not None
        result = judge(code, task.output(), task.seconds)
        results[mutant.name] = result
        print(f"{result.outcome:<9}{result.seconds:5.1f} s  {mutant.name:<45}{result.why}")
        if why and result.said:
            print(f"{'':18}{result.said}")
        sys.stdout.flush()
        trees[slot].restore()
        begin(slot)
    return [results[mutant.name] for mutant in mutants]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of names are enough")
    parser.add_argument("--list", action="store_true", help="names, files and tests")
    parser.add_argument("--why", action="store_true", help="with what each test has failed")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a mutant")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    mutants = all_mutants = load_mutants()
    if options.only:
        mutants = [m for m in all_mutants if any(part in m.name for part in options.only)]
    if not mutants:
        print(f"error: no mutant is called {' or '.join(options.only)}", file=sys.stderr)
        return 2
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:<45}{mutant.file:<42}{mutant.test}")
        return 0
    if not hasattr(os, "fork"):
        print("error: this needs fork, which Windows does not have", file=sys.stderr)
        return 2
    assert len({m.name for m in all_mutants}) == len(all_mutants), "two mutants of one name"
    if problems := check_texts(mutants):
        print("error: " + "\nerror: ".join(problems), file=sys.stderr)
        return 2
    # Before torch is imported: the models are tiny, and a fork with threads is a risk.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tests = sorted({mutant.test for mutant in mutants})
        jobs = max(1, min(options.jobs, len(mutants)))
        trees = [Tree(Path(folder) / f"tree{i}") for i in range(jobs)]
        if failed := run_unmutated(tests, trees, 10 * options.timeout):
            print(f"{failed}\nerror: a test fails without any mutant", file=sys.stderr)
            return 2
        print(f"{len(tests)} selections pass as they are, {time.monotonic() - started:.0f} s")
        results = run_mutants(mutants, trees, options.timeout, options.why)
    caught = sum(result.outcome == "caught" for result in results)
    for mutant, result in zip(mutants, results, strict=True):
        if result.outcome != "caught":
            print(f"{result.outcome}: {mutant.name}, {mutant.file}  {result.why}  {result.said}")
    share = caught / len(mutants)
    print(
        f"{caught} of {len(mutants)} mutants caught ({share:.1%}),"
        f" {time.monotonic() - started:.0f} s"
    )
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
