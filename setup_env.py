"""Create .venv and install KHAOSZ into it: `python setup_env.py NAME [pip arguments]`.

NAME: train, dev, or clients, which is dev with what only `make test-all` needs.

On any system, without make:
    python setup_env.py run demo [arguments]      the main job     (make demo)
    python setup_env.py run test [arguments]      the tests        (make test)
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
FAST = "not slow and not network and not gpu and not browser"
WORKERS = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile"]
COMMANDS = {
    "demo": ("train", ["-m", "khaosz", "demo"]),
    "test": ("dev", ["-m", "pytest", *WORKERS, "-m", FAST]),
}
# "train" includes chat in the terminal and in the browser, for the model that the demo trains.
EXTRAS = {"train": "train,serve,rag,structured,terminal", "dev": "dev", "clients": "dev,clients"}


def install(extra: str, pip_arguments: list[str]) -> None:
    """Create the environment if it does not exist and install the package with its extras."""
    stamp = VENV / ("ready" if extra == "train" else f"ready-{extra}")
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)]
    if stamp.exists() and stamp.stat().st_mtime >= max(p.stat().st_mtime for p in sources):
        return
    if not PYTHON.exists():
        print("creating .venv", flush=True)
        venv.create(VENV, with_pip=True)
    print(f"installing KHAOSZ [{extra}] (the first time takes a few minutes)", flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    subprocess.run([*command, *pip_arguments, "-e", f".[{EXTRAS[extra]}]"], cwd=ROOT, check=True)
    stamp.touch()


def main(arguments: list[str]) -> int:
    match arguments:
        case ["run", name, *rest] if name in COMMANDS:
            extra, command = COMMANDS[name]
            install(extra, os.environ.get("PIP_ARGS", "").split())
            return subprocess.run([str(PYTHON), *command, *rest], cwd=ROOT).returncode
        case [("train" | "dev" | "clients") as extra, *rest]:
            install(extra, rest)
            return 0
        case _:
            print(__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
