"""The CUDA C++ solver of ncut: its kernel text on the host shim against the CPU backend.

Not a test of speed, of the memory model or of nvcc's code: those wait for a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shim_build import ORDERS, shim

from foveate import _dispatch
from foveate._native import can_run_cuda, load_native
from foveate.bench.evidence import results_folder, standings
from foveate.ops.ncut import cpu
from foveate.ops.ncut.results import NCutResult
from foveate.testing import SPECS, assert_ok, verdicts

EPS = 1e-5


def _solve(
    operand: torch.Tensor,
    tokens: list[int],
    n: int,
    k: int,
    *,
    kind: int = 0,
    eps: float = EPS,
    tol: float = 1e-12,
    max_iter: int = 256,
    blocks: int = 1,
    threads: int = 64,
    resident: bool = True,
    order: str = "ascending",
) -> NCutResult:
    """The pairs of a batch of bits `[b, ceil(n / 32), n]`, or of weights `[b, n, n]`."""
    b = len(tokens)
    real: dict[str, Any] = {"dtype": torch.float64}
    count = torch.tensor(tokens)
    each = torch.full((b,), eps, **real)
    scratch = torch.full((b, shim().ncut_shim_scratch(n, k)), float("nan"), **real)
    values, residual = torch.full((b, k), float("nan"), **real), torch.empty(b, k, **real)
    vectors, gap = torch.empty(b, k, n, **real), torch.empty(b, **real)
    passes, uncertain = torch.empty(b, dtype=torch.int64), torch.empty(b, dtype=torch.int64)
    converged, degenerate = (torch.empty(b, dtype=torch.bool) for _ in range(2))

    def address(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    outputs = (values, vectors, residual, gap, passes, converged, degenerate, uncertain)
    error = shim().ncut_shim(
        address(operand), kind, address(count), address(each), b, n, k, ctypes.c_double(tol),
        max_iter, address(scratch), blocks, threads, int(resident), ORDERS[order],
        *map(address, outputs),
    )  # fmt: skip
    assert not error, error.decode()
    return NCutResult(*outputs)


def _expected(matrices: list[Any], k: int, eps: float = EPS) -> list[NCutResult]:
    return cpu.ncut_lanczos(matrices, eps, k, 1e-12, 256)[0]


def _assert_equal(found: NCutResult, entry: int, expected: NCutResult) -> None:
    """Equal decisions and sides of the mean; determined vectors within an angle of 1e-9 / gap."""
    n = expected.eigenvectors.shape[1]
    vectors = found.eigenvectors[entry, :, :n]
    torch.testing.assert_close(
        found.eigenvalues[entry], expected.eigenvalues, rtol=1e-10, atol=1e-10
    )
    assert bool(found.degenerate[entry]) == bool(expected.degenerate)
    assert bool(found.converged[entry]) == bool(expected.converged)
    assert bool(found.converged[entry])
    assert (found.residual[entry] <= 1e-9).all()
    assert not found.eigenvectors[entry, :, n:].any()
    if expected.degenerate:
        return
    torch.testing.assert_close(found.gap[entry], expected.gap, rtol=1e-6, atol=1e-12)
    assert int(found.uncertain[entry]) == int(expected.uncertain) == 0
    # Both stop at a residual of 1e-9, which leaves an angle of 1e-9 / gap.
    atol = 1e-9 / float(expected.gap) * float(expected.eigenvectors.abs().max())
    torch.testing.assert_close(vectors, expected.eigenvectors, rtol=0, atol=atol)
    side = vectors[0] > vectors[0].mean()
    assert torch.equal(side, expected.eigenvectors[0] > expected.eigenvectors[0].mean())


def _features(n: int, seed: int, spread: float = 0.5) -> torch.Tensor:
    """Three noisy directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 16, generator=generator)
    which = torch.randint(0, 3, (n,), generator=generator)
    return centres[which] + spread * torch.randn(n, 16, generator=generator)


def _bits(features: torch.Tensor, tau: float = 0.2, masked: torch.Tensor | None = None) -> Any:
    return cpu.affinity_pack(features, tau, masked)[0]


def _blocks(*sizes: int) -> torch.Tensor:
    """Bits of a graph of complete components."""
    return _bits(torch.eye(len(sizes)).repeat_interleave(torch.tensor(sizes), 0))


GRAPHS = {
    "33": lambda: _bits(_features(33, 0)),
    "64": lambda: _bits(_features(64, 1)),
    "65": lambda: _bits(_features(65, 2)),
    "96": lambda: _bits(_features(96, 3, 1.0)),
    "130": lambda: _bits(_features(130, 4, 1.5), 0.1),
    "masked": lambda: _bits(_features(100, 5), masked=torch.arange(100) % 4 == 0),
    "masked, tau < 0": lambda: _bits(_features(90, 6), -0.1, torch.arange(90) % 7 == 0),
    "zero tokens": lambda: _bits(_features(70, 7) * (torch.arange(70) % 9 > 0).unsqueeze(1)),
    "isolated": lambda: _blocks(40, 25, 1, 1, 1),
    "disconnected": lambda: _blocks(40, 31, 17, 9),
    "heavy noise": lambda: _bits(_features(128, 8, 6.0), 0.25),
    "200": lambda: _bits(_features(200, 9, 1.5), 0.1),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_solver_agrees_with_the_cpu_backend(graph, k):
    bits = GRAPHS[graph]()
    n = bits.shape[1]
    found = _solve(bits[None].contiguous(), [n], n, k)
    _assert_equal(found, 0, _expected([cpu._bit_matrix(bits)], k)[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("graph", ["33", "masked", "200"])
def test_neither_the_order_of_threads_nor_their_number_changes_a_bit(graph, order):
    bits = GRAPHS[graph]()[None].contiguous()
    n = bits.shape[2]
    expected = _solve(bits, [n], n, 3)
    shapes = [(1, 32, True), (2, 32, True), (4, 96, False), (16, 32, True)]
    for blocks, threads, resident in shapes:
        found = _solve(
            bits, [n], n, 3, blocks=blocks, threads=threads, resident=resident, order=order
        )
        for name, value in expected._asdict().items():
            assert torch.equal(getattr(found, name), value), (name, blocks)


def test_images_of_a_ragged_batch_equal_those_alone():
    graphs = [_bits(_features(n, n)) for n in (70, 40, 101)]
    sizes = [bits.shape[1] for bits in graphs]
    n = max(sizes)
    batch = torch.zeros(3, (n + 31) // 32, n, dtype=torch.int32)
    for bits, padded in zip(graphs, batch, strict=True):
        padded[: bits.shape[0], : bits.shape[1]] = bits
    found = _solve(batch, sizes, n, 2, blocks=2, order="random")
    for entry, bits in enumerate(graphs):
        _assert_equal(found, entry, _expected([cpu._bit_matrix(bits)], 2)[0])
        alone = _solve(bits[None].contiguous(), [sizes[entry]], sizes[entry], 2)
        for name, value in alone._asdict().items():
            padded = getattr(found, name)[entry]
            given = padded[:, : sizes[entry]] if name == "eigenvectors" else padded
            assert torch.equal(given, value[0]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [48, 90])
def test_dense_weights_agree_with_the_cpu_backend(n, dtype):
    unit = torch.nn.functional.normalize(_features(n, n), dim=1).to(dtype)
    weights = (unit @ unit.T).clamp_min(0) ** 2
    weights = ((weights + weights.T) / 2).contiguous()
    kind = 1 if dtype == torch.float32 else 2
    found = _solve(weights[None].contiguous(), [n], n, 3, kind=kind, eps=0.0, order="descending")
    matrix = cpu._Matrix(n, weights, kind, weights.sum(1, dtype=torch.float64))
    _assert_equal(found, 0, _expected([matrix], 3, 0.0)[0])


@pytest.mark.parametrize("k", [5, 16])
def test_many_pairs_agree_with_lapack(k):
    bits = _bits(_features(70, 11, 3.0), 0.2)
    n = bits.shape[1]
    found = _solve(bits[None].contiguous(), [n], n, k)
    shift = torch.arange(32)
    dense = (bits[:, None, :] >> shift[None, :, None] & 1).reshape(-1, n)[:n].double()
    w = EPS + (1 - EPS) * dense
    scale = w.sum(1).rsqrt()
    mu, _ = torch.linalg.eigh(scale[:, None] * w * scale)
    torch.testing.assert_close(found.eigenvalues[0], 1 - mu.flip(0)[1 : k + 1], rtol=0, atol=1e-10)
    x = found.eigenvectors[0]
    gram = x * w.sum(1) @ x.T
    torch.testing.assert_close(gram, torch.eye(k, dtype=gram.dtype), rtol=0, atol=1e-12)


def test_a_search_that_is_stopped_says_so_and_certifies_nothing_wrong():
    bits = GRAPHS["heavy noise"]()
    n = bits.shape[1]
    stopped = _solve(bits[None].contiguous(), [n], n, 1, max_iter=3)
    whole = _expected([cpu._bit_matrix(bits)], 1)[0]
    assert not stopped.converged.item()
    assert stopped.iterations.item() == 3
    assert stopped.residual.item() > 1e-9
    x, y = stopped.eigenvectors[0, 0], whole.eigenvectors[0]
    wrong = int(((x > x.mean()) != (y > y.mean())).sum())
    assert stopped.uncertain.item() >= min(wrong, n - wrong)


@pytest.mark.parametrize("n", [90, 200])
def test_a_search_that_is_stopped_at_once_returns_all_its_pairs(n):
    bits = _bits(_features(n, n, 6.0), 0.25)
    stopped = _solve(bits[None].contiguous(), [n], n, 16, max_iter=1)
    x = stopped.eigenvectors[0]
    degrees = EPS * n + (1 - EPS) * cpu._bit_matrix(bits).degrees.double()
    gram = x * degrees @ x.T
    torch.testing.assert_close(gram, torch.eye(16, dtype=gram.dtype), rtol=0, atol=1e-12)
    assert (stopped.eigenvalues[0].diff() >= 0).all()
    assert not stopped.converged.item()
    assert stopped.uncertain.item() == n


def test_a_cluster_is_as_large_as_the_bits_need_and_as_the_device_has_blocks_for():
    room = 227 * 1024  # bytes of a block on sm_90
    blocks = {1200: 1, 1650: 2, 2200: 4, 2900: 8, 3600: 16, 4600: -8}
    for n, expected in blocks.items():
        assert shim().ncut_shim_shape(0, 256, n, 1, room, 132, 8, 16) == expected, n
    assert shim().ncut_shim_shape(0, 256, 3600, 1, room, 132, 8, 8) == -8  # no leave for 16
    assert shim().ncut_shim_shape(0, 256, 3600, 1, room, 108, 1, 1) == -1  # no clusters
    assert shim().ncut_shim_shape(0, 8, 900, 1, room, 132, 8, 8) == 8  # processors to spare
    assert shim().ncut_shim_shape(1, 256, 900, 1, room, 132, 8, 8) == -8  # weights stay outside


def test_no_edge_and_every_edge_are_degenerate():
    for bits in (_blocks(*[1] * 70), _blocks(70)):
        found = _solve(bits[None].contiguous(), [70], 70, 2)
        _assert_equal(found, 0, _expected([cpu._bit_matrix(bits)], 2)[0])
        assert found.degenerate.item()
        assert found.uncertain.item() == 70


def _launch_on_shim(*arguments: Any) -> None:
    """`_cuda.ncut_lanczos` for addresses of the host, as the emulated device has them."""
    operand, kind, tokens, eps, b, n, k, tol, max_iter, scratch, _stream, *outputs = arguments
    error = shim().ncut_shim(
        ctypes.c_void_p(operand), kind, ctypes.c_void_p(tokens), ctypes.c_void_p(eps),
        b, n, k, ctypes.c_double(tol), max_iter, ctypes.c_void_p(scratch), 2, 32, 1, 2,
        *map(ctypes.c_void_p, outputs),
    )  # fmt: skip
    assert not error, error.decode()


@pytest.fixture
def shim_for_module(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The shim in the place of foveate._cuda, under the launchers of ops/ncut/cuda.py."""
    if not request.config.getoption("--ttsem"):
        pytest.skip("a GPU runs the kernels themselves, in test_ops.py")

    def forget() -> None:
        load_native.cache_clear()
        _dispatch._LOADED.pop("ncut.cuda", None)
        sys.modules.pop("foveate.ops.ncut.cuda", None)

    module = types.ModuleType("foveate._cuda")
    module.missing_device = lambda: None
    module.ncut_scratch = lambda n, k: shim().ncut_shim_scratch(n, k)
    module.ncut_lanczos = _launch_on_shim
    monkeypatch.setitem(sys.modules, "foveate._cuda", module)
    forget()
    importlib.import_module("foveate.ops.ncut.cuda")
    yield
    forget()


@pytest.mark.gpu
@pytest.mark.usefixtures("shim_for_module")
@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("ncut", "dense limit, masked"),
        ("ncut", "ragged"),
        ("ncut_affinity", "two values"),
        ("ncut_affinity", "weighted"),
        ("maskcut", "9 x 8, skip, upsampled"),
        ("tokencut", "6 x 11, weighted"),
    ],
)
def test_the_launchers_give_the_kernel_what_it_needs(op, case):
    spec = next(spec for spec in SPECS if spec.name == op)
    call = spec.make_inputs(spec.cases.listed[case], spec.dtypes[0], "cuda", 0)
    assert_ok(verdicts(spec, call, "cuda"))


def test_without_a_device_the_backend_says_why_it_cannot_run():
    module = _dispatch.load_backend("ncut", "cuda")
    if isinstance(module, str):
        pytest.skip(module)
    if torch.cuda.is_available():
        assert can_run_cuda() is None
    else:
        assert "CUDA runtime" in module.unsupported("ncut_fwd")


def test_auto_passes_the_solver_over_until_a_record_of_its_source_has_passed():
    module = _dispatch.load_backend("ncut", "cuda")
    if isinstance(module, str):
        pytest.skip(module)
    known = {s.op: s.current for s in standings(results_folder()) if s.backend == "cuda"}
    for op in ("ncut", "ncut_affinity", "maskcut", "tokencut"):
        assert (module.not_preferred(f"{op}_fwd") is None) <= known[op]
