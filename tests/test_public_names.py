"""Every name that guides and benches import and every `module:NAME` of the recipes exists."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("README*.md"), *ROOT.glob("docs/en/*.md"), *ROOT.glob("docs/zh/*.md")]
_CODE_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_IMPORT = re.compile(r"^\s*(?:>>> )?(?:from khaosz\S* import|import khaosz)\b", re.MULTILINE)
_RECIPE_NAME = re.compile(r"\bkhaosz[\w.]*:\w+")
# What guides and recipes showed before the modules were moved: users may have copied it.
PUBLISHED = [
    "khaosz:TrainConfig",
    "khaosz:generate",
    "khaosz:load_model",
    "khaosz:load_tokenizer",
    "khaosz:run",
    "khaosz.errors:ModelError",
    "khaosz.inference.engine:Engine",
    "khaosz.inference.generator:Generator",
    "khaosz.inference.runner:Runner",
    "khaosz.inference.sampling:SamplingParams",
    "khaosz.interop:GgufModel",
    "khaosz.interop:open_tokenizer",
    "khaosz.rag:KnowledgeBase",
    "khaosz.rag:StructureSplitter",
    "khaosz.rag.answer:ask",
    "khaosz.rag.chat_model:LocalModel",
    "khaosz.rewards:brevity",
    "khaosz.rewards:contains_answer",
]


def imported_names(code: str) -> set[str]:
    """`module:name` of every import from khaosz in a code block, `module:` for `import module`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "khaosz":
            names |= {f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names if alias.name.split(".")[0] == "khaosz"}
            names |= {f"{module}:" for module in modules}
    return names


def names_in_guides() -> set[str]:
    names: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = _CODE_BLOCK.findall(text)
        in_blocks = sum(len(_IMPORT.findall(block)) for block in blocks)
        assert in_blocks == len(_IMPORT.findall(text)), f"{page}: an import outside ```python"
        names.update(*map(imported_names, blocks))
    return names


def names_in_recipes() -> set[str]:
    recipes = (ROOT / "recipes").glob("*.toml")
    return {name for path in recipes for name in _RECIPE_NAME.findall(path.read_text("utf-8"))}


def names_in_benches() -> set[str]:
    """Benches import inside functions, and no test runs them."""
    names = [imported_names(path.read_text("utf-8")) for path in (ROOT / "bench").glob("*.py")]
    return set().union(*names)


def test_collects_imports_of_khaosz_only() -> None:
    code = "import torch\nimport khaosz.a as b\nfrom khaosz.c import (\n    d,\n    e as f,\n)\n"
    assert imported_names(code) == {"khaosz.a:", "khaosz.c:d", "khaosz.c:e"}
    assert "khaosz:generate" in names_in_guides()
    assert "khaosz.rewards:brevity" in names_in_recipes()
    assert "khaosz.rag:KnowledgeBase" in names_in_benches()


NAMES = {*PUBLISHED, *names_in_guides(), *names_in_recipes(), *names_in_benches()}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_can_be_imported(name: str) -> None:
    module, _, attribute = name.partition(":")
    imported = importlib.import_module(module)
    assert not attribute or getattr(imported, attribute, None) is not None
