"""Documents as training texts, by the command a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_documents_become_text_records(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# 题\n\n" + "春眠不觉晓。" * 20, encoding="utf-8")
    (docs / "b.html").write_text("<h1>T</h1><p>Some text.</p><script>x()</script>")
    (docs / "c.txt").write_bytes(b"\x00\x01" * 50)
    out = tmp_path / "texts.jsonl"
    command = [sys.executable, "-m", "khaosz", "data", "from-docs", str(docs), "--out", str(out)]
    done = subprocess.run([*command, "--max-chars", "50", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert json.loads(done.stdout) == {"records": len(records), "not_read": 1, "out": str(out)}
    assert "c.txt" in done.stderr
    chinese = "".join(r["text"] for r in records if r["source"] == "a.md")
    assert chinese.count("春眠不觉晓。") == 20 and all(len(r["text"]) <= 50 for r in records)
    assert "Some text." in records[-1]["text"] and "x()" not in records[-1]["text"]


def test_no_documents_leave_the_output_unchanged(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    out = tmp_path / "texts.jsonl"
    out.write_text("before")
    command = [sys.executable, "-m", "khaosz", "data", "from-docs", str(tmp_path / "docs")]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert (
        done.returncode == 1 and "no texts found in" in done.stderr and out.read_text() == "before"
    )
