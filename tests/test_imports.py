"""The one direction of imports, and what is never imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "khaosz"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package may import from packages of a lower number, and from itself.
RANK = {
    "errors": 0,
    "files": 1,
    "folders": 1,
    "database": 1,
    "config": 2,
    "parallel": 3,
    "data": 4,
    "model": 4,
    "interop": 5,
    "memory": 5,
    "inference": 6,
    "trainer": 7,
    "rag": 7,
    "evaluation": 8,
    "demo": 9,
    "doctor": 9,
    "rewards": 9,  # the name of trainer/stages/rewards.py in recipes
    "serve": 9,
    "cli": 10,
    "__main__": 11,
}
# Of `cli` and `data`, what computes; everything else there runs without torch.
USES_TORCH = {
    "cli/answers.py",
    "cli/collect.py",
    "data/batches/batch.py",
    "data/batches/dataset.py",
    "data/batches/sequences.py",
    "data/shards/show.py",
}


def torch_free() -> list[Path]:
    """Modules that run without torch: in many processes, or before the first second is over."""
    tops = [
        PACKAGE / name
        for name in ("__init__.py", "errors.py", "files.py", "folders.py", "database.py")
    ]
    folders = [*(PACKAGE / "cli").glob("*.py")]
    for name in ("config", "data"):
        folders += (PACKAGE / name).rglob("*.py")
    return [path for path in sorted([*tops, *folders]) if label(path) not in USES_TORCH]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, at its top or inside functions."""
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno} is a relative import"
            assert node.module is not None
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"


def room(dotted: str) -> str | None:
    """The room a khaosz name lives in; None for `khaosz` itself and for other packages."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "khaosz" and len(parts) > 1 and parts[1] in RANK else None


def test_every_room_has_its_place() -> None:
    rooms = {label(path).split("/")[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_go_one_way(path: Path) -> None:
    own = room(module_name(path))
    if own is None:
        return  # khaosz/__init__.py: names only, imported when they are first used (see below)
    wrong = [
        f"{label(path)}:{line} imports {name}"
        for line, name in imports(path)
        if (other := room(name)) is not None and other != own and RANK[other] >= RANK[own]
    ]
    assert not wrong, "\n".join(wrong)


def imported_modules() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, type-checking imports included."""
    names = {module_name(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for own, path in names.items():
        targets = {name if name in names else name.rpartition(".")[0] for _, name in imports(path)}
        graph[own] = {name for name in targets if name in names} - {own}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle in the order of its imports, [] if the graph has none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if closed := visit(target):
                return closed
        done.add(path.pop())
        return []

    return next((closed for node in sorted(graph) if (closed := visit(node))), [])


def test_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_modules_form_no_circle() -> None:
    assert not (closed := circle(imported_modules())), " -> ".join(closed)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=label)
def test_folders_of_a_package_form_no_circle(folder: Path) -> None:
    """Between the direct children of a package, files and folders alike."""
    prefix = module_name(folder / "__init__.py")

    def child(name: str) -> str | None:
        return name[len(prefix) + 1 :].split(".")[0] if name.startswith(f"{prefix}.") else None

    graph: dict[str, set[str]] = {}
    for own, targets in imported_modules().items():
        if (source := child(own)) is not None:
            others = {other for name in targets if (other := child(name)) is not None}
            graph.setdefault(source, set()).update(others - {source})
    assert not (closed := circle(graph)), f"{prefix}: {' -> '.join(closed)}"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_pickle_and_no_transformers(path: Path) -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    banned |= {"transformers", "trl", "datasets"}
    for line, name in imports(path):
        assert name.split(".")[0] not in banned, f"{label(path)}:{line} imports {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called != "torch.load", f"{label(path)}:{node.lineno} reads a pickle"
            if called in ("np.load", "numpy.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("allow_pickle", "False") == "False", f"{label(path)}:{node.lineno}"


@pytest.mark.parametrize("path", torch_free(), ids=label)
def test_these_files_do_not_name_torch(path: Path) -> None:
    named = [line for line, name in imports(path) if name.split(".")[0] == "torch"]
    assert not named, f"{label(path)} imports torch on lines {named}"


def modules_after(code: str) -> set[str]:
    """Names in `sys.modules` of a fresh interpreter that ran `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('\\n'.join(['', '@@', *sys.modules]))"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.partition("\n@@\n")[2].split("\n"))


def test_torch_does_not_come_in_by_another_way() -> None:
    names = ", ".join(module_name(path) for path in torch_free())
    loaded = modules_after(f"import {names}")
    assert "khaosz.data.shards.prepare" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib"}


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom khaosz.cli import main\nsys.argv = ['khaosz', '--help']\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code"
    )
    loaded = modules_after(code)
    assert "khaosz.cli" in loaded
    assert not loaded & {"torch", "numpy", "tokenizers", "pydantic", "transformers"}


def test_public_names_are_imported_when_they_are_used() -> None:
    assert "torch" not in modules_after("import khaosz; khaosz.ModelConfig")
    # Every name is there, torch or not.
    loaded = modules_after("import khaosz\nfor name in khaosz.__all__: getattr(khaosz, name)")
    assert "torch" in loaded and "transformers" not in loaded


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import khaosz

    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = khaosz.Trainr


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_is_swallowed(path: Path) -> None:
    """No `except Exception` or bare `except`, unless all it does is to raise an error of ours in
    its place (a user's function may raise anything), or it logs the error with its trace, where a
    thread would end with it unseen; no `strict=False` on weights."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[0], ast.Raise):
            if any(ast.unparse(each).startswith("_log.exception(") for each in node.body):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            where = f"{label(path)}:{node.lineno} catches {caught}"
            assert caught not in ("Exception", "BaseException", "everything"), where
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_state_dict"):
            given = [ast.unparse(keyword) for keyword in node.keywords]
            assert "strict=False" not in given, f"{label(path)}:{node.lineno}"
