"""Downloads through pip; `tests/demo/test_fetch.py` runs the real one."""

from __future__ import annotations

from khaosz.interop import pip


def test_notes_hide_addresses() -> None:
    # A mirror's address may carry its password.
    stderr = "noise\nERROR: Could not reach https://me:secret@mirror.example/simple/x: refused\n"
    assert pip._last_error(stderr) == "Could not reach <index> refused"
