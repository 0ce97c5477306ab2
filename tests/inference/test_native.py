"""The compiled kernel against the dequantised weights, and what happens where there is none."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_blocks import random_blocks
from tiny_models import random_model, tokenizer

from khaosz.inference.linear import native
from khaosz.inference.linear.load import DenseMatrix, Matrix, Products
from khaosz.inference.linear.native import MappedMatrix
from khaosz.inference.linear.packed import PackedMatrix
from khaosz.inference.runner import Chunk, Runner
from khaosz.interop.gguf.blocks import affine, is_affine, quantize
from khaosz.interop.gguf.file import TENSOR_TYPES
from khaosz.interop.gguf.model import GgufModel, load_gguf, save_gguf

KINDS = [kind for kind in TENSOR_TYPES if is_affine(kind)]
# Half a step of 1 / 32767 of the largest of 32 inputs, and fp32 sums.
BOUND = 1e-4


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KHAOSZ_NATIVE", raising=False)
        result = native.library()
    if result is None:
        pytest.skip("no compiler, or a processor without vectors")
    return result


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KHAOSZ_NATIVE", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def raw_rows(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        rng = np.random.default_rng(seed)
        return quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
    return random_blocks(kind, rows, columns, seed)


def exact(raws: list[np.ndarray], kind: str, x: torch.Tensor) -> torch.Tensor:
    """In float64; NaN inputs aside, what the product should be."""
    dense = np.concatenate([affine(raw, kind).dense() for raw in raws]).astype(np.float64)
    return x.double() @ torch.from_numpy(dense).t()


def inputs(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def columns_of(kind: str) -> list[int]:
    """Whole blocks, but no whole chunk of 256 columns, where the type allows that."""
    return [256, 1280] if TENSOR_TYPES[kind][1] == 256 else [32, 96, 608]


@pytest.mark.parametrize("kind", KINDS)
def test_product_matches_dequantised_weights(library: ctypes.CDLL, kind: str) -> None:
    for columns in columns_of(kind):
        raws = [raw_rows(kind, rows, columns, seed) for seed, rows in enumerate((16, 53, 35))]
        matrix = MappedMatrix(library, raws, kind)
        assert matrix.nbytes == sum(raw.nbytes for raw in raws)
        for rows in range(1, 18):
            x = inputs(rows, columns)
            result, expected = matrix(x), exact(raws, kind, x)
            assert result.shape == (rows, 104) and result.dtype == torch.float32
            assert (result - expected).norm() < BOUND * expected.norm(), (columns, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_row_is_bitwise_independent_of_other_rows(library: ctypes.CDLL, kind: str) -> None:
    """Whatever the rows beside it, and whatever the threads: also beyond the rows of one round."""
    raw = raw_rows(kind, 333, 1280)
    matrix = MappedMatrix(library, [raw], kind)
    x = inputs(300, 1280)
    together = matrix(x)
    for count in range(1, 18):
        assert torch.equal(matrix(x[:count]), together[:count]), count
        assert torch.equal(matrix(x[-count:]), together[-count:]), count
    torch.set_num_threads(1)
    assert torch.equal(matrix(x), together)
    torch.set_num_threads(3)
    assert torch.equal(matrix(x), together)
    matrix._pool = None  # threads of its own
    assert torch.equal(matrix(x), together)
    assert torch.equal(MappedMatrix(library, [raw[50:90]], kind)(x[7:9]), together[7:9, 50:90])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_extreme_inputs(library: ctypes.CDLL, kind: str) -> None:
    raw = raw_rows(kind, 37, 512)
    matrix = MappedMatrix(library, [raw], kind)
    x = inputs(6, 512)
    x[0] = 0.0
    x[1, 100] = 1e4  # the 32 columns of an outlier are coarse, the others as fine as ever
    x[2] *= 1e-41  # less than fp32 holds in full: counts as zero
    x[3] *= 1e-25
    x[4] *= 1e30
    x[5, ::2] = 0.0
    result, expected = matrix(x), exact([raw], kind, x)
    assert not result[0].any() and not result[2].any()
    for row in (1, 3, 4, 5):
        wrong = (result[row] - expected[row]).norm() / expected[row].norm()
        assert wrong < BOUND, (row, wrong)
    # Half a step of every input of a block, against weights that all conspire.
    sizes = torch.from_numpy(np.abs(affine(raw, kind).dense())).double().view(37, 16, 32).sum(2)
    steps = x[1].view(16, 32).abs().amax(1).double() / 32767
    assert ((result[1] - expected[1]).abs() < 0.52 * sizes @ steps).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_nan_inputs_are_not_hidden(library: ctypes.CDLL, kind: str, bad: float) -> None:
    matrix = MappedMatrix(library, [raw_rows(kind, 32, 256)], kind)
    x = inputs(3, 256)
    clean = matrix(x)
    x[1, 77] = bad
    result = matrix(x)
    assert not result[1].isfinite().any()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


def test_nan_scales_of_a_file_are_not_hidden(library: ctypes.CDLL) -> None:
    raw = raw_rows("Q4_0", 32, 64)
    for row, half in enumerate((0x7E00, 0x7C00, 0x0001, 0x8001, 0xFBFF)):  # NaN, inf, subnormal ...
        raw[row, :2] = np.array([half], dtype="<u2").view(np.uint8)
    x = inputs(2, 64)
    result, expected = MappedMatrix(library, [raw], "Q4_0")(x), exact([raw], "Q4_0", x)
    assert not result[:, :2].isfinite().any()
    assert (result - expected)[:, 2:].norm() < BOUND * expected[:, 2:].norm()


def test_inputs_of_another_dtype_or_layout(library: ctypes.CDLL) -> None:
    raw = raw_rows("Q8_0", 48, 96)
    matrix = MappedMatrix(library, [raw], "Q8_0")
    x = inputs(4, 96).bfloat16()
    assert matrix(x).dtype == torch.bfloat16
    assert torch.equal(matrix(x), matrix(x.float()).bfloat16())
    wide = inputs(96, 5)
    assert torch.equal(matrix(wide.t()), matrix(wide.t().contiguous()))
    assert matrix(x[:0]).shape == (0, 48)


def test_kernel_inputs_are_checked(library: ctypes.CDLL) -> None:
    raw = raw_rows("Q4_0", 32, 64)
    for wrong in (
        [raw[:, ::2]],
        [raw[:, :19]],
        [raw[:15]],
        [raw.view(np.int8)],
        [raw, raw[:, :18]],
    ):
        with pytest.raises(AssertionError):
            MappedMatrix(library, wrong, "Q4_0")
    matrix = MappedMatrix(library, [raw], "Q4_0")
    for x in (inputs(2, 32), inputs(2, 64)[0], inputs(2, 64)[:, :63]):
        with pytest.raises(AssertionError):
            matrix(x)


@pytest.mark.parametrize("options", [["-DKHAOSZ_PLAIN"], ["-mno-avx512f"], ["-mno-avx512vnni"]])
def test_all_paths_are_bitwise_equal(
    library: ctypes.CDLL, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plain one, that of AVX2 and that without VNNI: where the others run, these do too."""
    traits = subprocess.run(
        ["c++", "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    if "__FMA__" not in traits or "__AVX2__" not in traits:
        pytest.skip("not an x86 processor with AVX2, or no c++")
    other = native._compiled(["c++", "-march=native", *options], tmp_path)
    for kind in KINDS:
        raw, x = raw_rows(kind, 45, 512), inputs(11, 512)
        mine = MappedMatrix(other, [raw], kind)(x)
        assert torch.equal(MappedMatrix(library, [raw], kind)(x), mine), kind


# ------------------------------------------------------------------------ with and without a kernel


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    model = random_model(
        321, hidden_size=128, intermediate_size=192, head_dim=32, qkv_bias=True, qk_norm=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.3)
    save_gguf(model, tokenizer(), tmp_path / "a.gguf", "Q4_0")
    return tmp_path / "a.gguf"


def matrices(runner: Runner) -> list[Matrix]:
    """Of all blocks, queries, keys and values first."""
    products = runner.weights().linear
    assert isinstance(products, Products)
    return [product.matrix for layer in products.layers for product in layer.values()]


def test_native_model_is_close_to_dequantised_model(library: ctypes.CDLL, model_file: Path) -> None:
    runner = Runner.open(model_file)
    for matrix in (*matrices(runner), runner.weights().head):
        assert isinstance(matrix, MappedMatrix)
    exact_runner = Runner.from_module(load_gguf(model_file))
    ids = list(range(20, 60))
    result, expected = (r.run([Chunk(ids, r.new_cache(), 40)])[0] for r in (runner, exact_runner))
    # Every matrix is good to 1e-4; bf16 would be off by 1e-2.
    assert (result - expected).abs().max() < 1e-3 * expected.abs().max()
    cache = runner.new_cache()
    steps = torch.cat([runner.run([Chunk([token], cache, 1)])[0] for token in ids])
    assert (steps - expected).abs().max() < 1e-3 * expected.abs().max()


def test_smaller_cache_dtypes(library: ctypes.CDLL, model_file: Path) -> None:
    ids = list(range(20, 60))
    runner = Runner.open(model_file)
    expected = runner.run([Chunk(ids, runner.new_cache(), 1)])[0]
    for dtype in (torch.bfloat16, torch.int8):
        small = Runner.open(model_file, cache_dtype=dtype)
        result = small.run([Chunk(ids, small.new_cache(), 1)])[0]
        assert result.dtype == torch.float32
        assert 0 < (result - expected).abs().max() < 0.03 * expected.abs().max()


def test_weights_are_not_copied(library: ctypes.CDLL, model_file: Path) -> None:
    source = GgufModel.open(model_file)
    runner = Runner.from_gguf(source)
    whole = np.frombuffer(source.file._data[0], np.uint8)
    for matrix in matrices(runner):
        assert isinstance(matrix, MappedMatrix)
        assert all(np.shares_memory(whole, raw) for raw in matrix._raws)


def test_native_kernel_can_be_disabled(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHAOSZ_NATIVE", "0")
    assert native.library() is None
    runner = Runner.open(model_file)
    assert runner.dtype == torch.bfloat16
    assert isinstance(matrices(runner)[0], PackedMatrix)


@pytest.mark.parametrize("cut", [1, 5, 16, 23])
def test_deterministic_runner_is_bitwise_independent_of_chunks(
    library: ctypes.CDLL, model_file: Path, cut: int
) -> None:
    runner = Runner.open(model_file, deterministic=True)
    assert isinstance(matrices(runner)[0], MappedMatrix) and runner.dtype == torch.float32
    ids = list(range(20, 60))
    whole = runner.run([Chunk(ids, runner.new_cache(), 40)])[0]
    cache, other, rows = runner.new_cache(), runner.new_cache(), []
    for start in range(0, 40, cut):
        part = ids[start : start + cut]
        neighbour = Chunk([7, 8, 9], other, 1)
        rows.append(runner.run([neighbour, Chunk(part, cache, len(part))])[1])
    assert torch.equal(torch.cat(rows), whole)


def test_dequantised_runner_does_not_use_it(model_file: Path) -> None:
    runner = Runner.open(model_file, dtype=torch.float32)
    assert isinstance(matrices(runner)[0], DenseMatrix)


@pytest.mark.skipif(sys.platform == "win32", reason="scripts that stand for a compiler")
@pytest.mark.parametrize("script", ["exit 1", "exit 0", 'for o; do :; done; echo no > "$PWD/x"'])
def test_broken_compiler_falls_back_to_packed_matrices(
    script: str, model_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert native.library() is None
    runner = Runner.open(model_file)
    assert runner.dtype == torch.bfloat16
    assert runner.run([Chunk([20, 21], runner.new_cache(), 1)])[0].isfinite().all()


def test_no_kernel_without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path / "cache"))
    assert native.library() is None


COMPILER = ["c++", "-march=native"]
_LOAD = """
import sys
from pathlib import Path
from khaosz.inference.linear import native
native._OPTIONS.remove("-O3")  # sooner compiled
native._compiled(["c++", "-march=native"], Path(sys.argv[1]))
"""


def test_kernel_is_compiled_once(library: ctypes.CDLL, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "native"
    native._compiled(COMPILER, folder)
    (file,) = folder.iterdir()
    before = file.stat().st_mtime_ns, file.stat().st_ino
    assert folder.stat().st_mode & 0o777 == 0o700
    native._compiled(COMPILER, folder)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


def test_damaged_kernel_is_compiled_again(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Loading it would end the process, so nothing may be loaded before the hash is right."""
    monkeypatch.setattr(native, "_OPTIONS", [o for o in native._OPTIONS if o != "-O3"])
    native._compiled(COMPILER, tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    for damaged in (
        good[: len(good) // 2],
        good[:4096] + bytes(len(good) - 4096),
        bytes([*good[:-900], good[-900] ^ 1, *good[-899:]]),
        b"half a library",
        b"",
    ):
        file.unlink()  # the process keeps the library that it has mapped
        file.write_bytes(damaged)
        assert native._compiled(COMPILER, tmp_path).khaosz_level() >= 0
        (again,) = tmp_path.iterdir()
        assert again.read_bytes() == good


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
@pytest.mark.parametrize("obstacle", ["writable by others", "a file", "no folder above"])
def test_kernel_is_used_uncached_where_the_cache_is_not_usable(
    library: ctypes.CDLL,
    obstacle: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(native, "_OPTIONS", [o for o in native._OPTIONS if o != "-O3"])
    folder = tmp_path / "cache"
    match obstacle:
        case "writable by others":
            folder.mkdir()
            folder.chmod(0o777)
        case "a file":
            folder.touch()
        case _:
            folder = Path("/dev/null/native")
    assert native._compiled(COMPILER, folder).khaosz_level() >= 0
    assert "the compiled kernel is not cached" in caplog.text
    assert not folder.is_dir() or not [*folder.iterdir()]


def test_kernel_compiled_by_two_processes_at_once(library: ctypes.CDLL, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LOAD, str(tmp_path)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [each.wait(120) for each in both] == [0, 0]
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size > 0
