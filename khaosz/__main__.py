"""The `khaosz` command, also as `python -m khaosz`.

Signals are handled here, before anything else is imported: Ctrl-C is one line and status 130,
SIGTERM one line and status 143, also while modules are imported.
"""

import os
import signal
import sys
from types import FrameType

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_received = 0


def main() -> None:
    for number, default in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is default:  # else the parent ignores it: nohup, `&` in scripts
            signal.signal(number, _stop)
    from khaosz.cli import main as run

    try:
        run()
    except SystemExit as end:
        if _received and end.code == 128 + _received:
            _say(_received)
        raise


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind the command, so that it cleans up. Not for the import of a module: C code
    that imports, such as torch's check for numpy, would drop the exception."""
    global _received
    _received = number
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _say(number)
            os._exit(128 + number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _say(number: int) -> None:
    shown = "\033[?25h" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
    sys.stderr.write(f"{shown}{_WORDS[signal.Signals(number)]}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
