"""Every defect in mutants.toml still has its place in the code and its test."""

from __future__ import annotations

from mutants import ROOT, check_texts, load_mutants


def test_every_mutant_has_its_place() -> None:
    assert not (problems := check_texts(load_mutants())), "\n".join(problems)


def test_every_mutant_has_its_test() -> None:
    for mutant in load_mutants():
        file, _, name = mutant.test.partition("::")
        source = ROOT / file
        assert source.is_file(), f"{mutant.name}: {file}"
        wanted = name.rpartition("::")[2].partition("[")[0]
        text = source.read_text(encoding="utf-8")
        assert not wanted or f"def {wanted}(" in text, f"{mutant.name}: {wanted}"
