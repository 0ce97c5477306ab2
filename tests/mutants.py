"""Put defects back into our code, one at a time: the tests must fail.

    python -m tests.mutants                    all; exit status 1 if fewer than 95 % are caught
    python -m tests.mutants --only NAME ...    some of them
    python -m tests.mutants --list             names, files and tests

`mutants.toml` lists them. Each replaces one text, which must occur exactly once, in a copy of the
tree, and runs the one test (or group) that is there to notice. First all of those tests run on the
unchanged copy and must pass. A test that fails with a NameError or the like has noticed bad Python,
not the defect: such a mutant counts as broken, and broken and timed-out mutants count as not
caught.

Python and torch are imported once and every test runs in a fork of that process, which saves two
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
# Python's own complaints about a mutant that is not a valid program.
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


def check_texts(mutants: Iterable[Mutant]) -> list[str]:
    """Problems: mutants whose old text does not occur exactly once, and repeated names."""
    problems, names = [], set()
    for mutant in mutants:
        path = ROOT / mutant.file
        times = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
        if times != 1 or mutant.old == mutant.new:
            problems.append(f"{mutant.name}: its text occurs {times} times in {mutant.file}")
        if mutant.name in names:
            problems.append(f"{mutant.name}: listed twice")
        names.add(mutant.name)
    return problems


@dataclass
class Run:
    """A pytest run in a fork and in a copy of the tree: of a mutant, or of unchanged code."""

    tests: list[str]
    mutant: Mutant | None = None
    folder: Path = Path()
    original: str = ""  # the mutated file as it was
    pid: int = 0
    started: float = 0.0
    seconds: float = 0.0

    def start(self, folder: Path) -> None:
        self.folder = folder
        if (mutant := self.mutant) is not None:
            self.original = (folder / mutant.file).read_text(encoding="utf-8")
            self._write(mutant.file, self.original.replace(mutant.old, mutant.new))
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 98
            try:
                code = self._child()
            finally:
                os._exit(code)

    def ended(self, timeout: float) -> int | None:
        """pytest's exit code, -1 after a timeout, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.seconds = time.monotonic() - self.started
        if not pid and self.seconds <= timeout:
            return None
        if not pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.mutant is not None:
            self._write(self.mutant.file, self.original)
        return os.waitstatus_to_exitcode(status) if pid else -1

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def _write(self, file: str, text: str) -> None:
        path = self.folder / file
        path.write_text(text, encoding="utf-8")
        # Python compares size and whole seconds: bytecode of a mutant of the same length, written
        # within the same second, would pass for fresh.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def _child(self) -> int:
        """pytest, with `khaosz` from the copy here and in all processes that it starts."""
        os.setsid()  # a group of its own, so that a timeout ends torchrun's processes as well
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        copy = str(self.folder)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = copy
        os.environ["COLUMNS"] = "300"  # so that the summary is not cut
        sys.path[:] = [copy, *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        importlib.invalidate_caches()
        import pytest

        scratch = str(self.folder.with_suffix(".tmp"))
        options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", scratch]
        code = pytest.main([*options, *self.tests])
        loaded = getattr(sys.modules.get("khaosz"), "__file__", "") or ""
        if not loaded.startswith(copy):
            print(f"khaosz was imported from {loaded or 'nowhere'}, not from {copy}")
            return 99
        sys.stdout.flush()
        return int(code)


def run_all(runs: Iterable[Run], folders: list[Path], timeout: float) -> Iterator[tuple[Run, int]]:
    """Each run in the next free folder, with its exit code when it ends."""
    waiting = iter(runs)
    running: dict[Path, Run] = {}
    while True:
        for folder in folders:
            if folder not in running and (run := next(waiting, None)) is not None:
                run.start(folder)
                running[folder] = run
        if not running:
            return
        for folder, run in list(running.items()):
            if (code := run.ended(timeout)) is not None:
                yield run, code
                del running[folder]
        time.sleep(0.02)


def judge(code: int, output: str) -> tuple[str, str]:
    """(caught, survived, timeout or broken; why) of a mutant's run."""
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - (.*))?$", output, re.MULTILINE)
    test, complaint = (failed[1].rpartition("/")[2], failed[2] or "") if failed else ("", "")
    match code:
        case 0:
            return "survived", "its test passes"
        case -1:
            return "timeout", ""
        case 1 if not complaint.startswith(NO_DEFECT):
            return "caught", f"{test}  {complaint}"
        case _:
            return "broken", f"pytest ended with {code}  {test}  {complaint}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of names are enough")
    parser.add_argument("--list", action="store_true", help="names, files and tests")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a mutant")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    mutants = load_mutants()
    if problems := check_texts(mutants):
        print("error: " + "\nerror: ".join(problems), file=sys.stderr)
        return 2
    if options.only:
        mutants = [m for m in mutants if any(part in m.name for part in options.only)]
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
    # Before torch is imported: the models are tiny, and a fork with threads is a risk.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    started = time.monotonic()
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folders = [Path(scratch) / f"tree{i}" for i in range(max(1, options.jobs))]
        for folder in folders:
            folder.mkdir()
            for name in COPIED:
                if (ROOT / name).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", ".*")
                    shutil.copytree(ROOT / name, folder / name, ignore=ignored)
                else:
                    shutil.copy2(ROOT / name, folder / name)
        tests = sorted({mutant.test for mutant in mutants})
        shares = [tests[i :: len(folders)] for i in range(len(folders))]
        unchanged = [Run(share) for share in shares if share]
        for run, code in run_all(unchanged, folders, 10 * options.timeout):
            if code != 0:
                print(run.log.read_text(encoding="utf-8", errors="replace")[-5000:])
                print("error: a test fails without any mutant", file=sys.stderr)
                return 2
        print(f"{len(tests)} selections pass as they are, {time.monotonic() - started:.0f} s")
        runs = [Run([mutant.test], mutant) for mutant in mutants]
        for run, code in run_all(runs, folders, options.timeout):
            assert run.mutant is not None
            output = run.log.read_text(encoding="utf-8", errors="replace")
            outcome, why = judge(code, output)
            outcomes[run.mutant.name] = outcome
            print(f"{outcome:<9}{run.seconds:5.1f} s  {run.mutant.name:<45}{why[:160]}", flush=True)
    caught = sum(outcome == "caught" for outcome in outcomes.values())
    missed = [name for name, outcome in outcomes.items() if outcome != "caught"]
    print("".join(f"{outcomes[name]}: {name}\n" for name in missed), end="")
    share = caught / len(mutants)
    seconds = time.monotonic() - started
    print(f"{caught} of {len(mutants)} mutants caught ({share:.1%}), {seconds:.0f} s")
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
