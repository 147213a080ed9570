"""Times of a CUDA device, with fakes of its streams, events and graphs; hashes of GPU sources."""

from __future__ import annotations

import shutil
import types
from contextlib import contextmanager

import pytest
import torch

from foveate.bench import gpu, rows, sources
from foveate.bench.roofline import Ceilings
from foveate.testing import Call, Verdict


class FakeCuda:
    """A device whose kernels take time on a clock of their own, as launches are recorded."""

    def __init__(self, kernel_seconds: float = 1e-3) -> None:
        self.now, self.host, self.kernel = 0.0, 0.0, kernel_seconds
        self.captured: list | None = None
        self.streams: list[str] = []
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def replay(self) -> None:
                outer.now += outer.kernel * len(self.calls)

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda _: self.streams.append("side waits"))

    def current_stream(self):
        return types.SimpleNamespace(wait_stream=lambda _: self.streams.append("main waits"))

    @contextmanager
    def stream(self, _side):
        yield

    @contextmanager
    def graph(self, graph):
        self.captured = graph.calls = []
        yield
        self.captured = None

    def launch(self) -> None:
        self.host += 10e-6
        if self.captured is not None:
            self.captured.append(1)
        else:
            self.now += self.kernel

    def synchronize(self) -> None:
        self.host = max(self.host, self.now)


def test_a_replayed_graph_gives_the_time_of_one_call():
    cuda, order = FakeCuda(), []

    def run(index):
        def call():
            order.append(index)
            cuda.launch()

        return call

    sample = gpu.graph_sampler([run(0), run(1), run(2)], grad=False, cuda=cuda)
    assert order == [0, 0, 0, 1, 2, 0, 1, 2]  # warmed up, every copy once, then captured in turn
    assert cuda.streams == ["side waits", "main waits"]
    assert sample() == pytest.approx(1e-3)
    assert len(order) == 8  # a replay launches nothing from Python


def test_short_graphs_are_replayed_within_a_sample():
    cuda = FakeCuda(kernel_seconds=2e-6)
    sample = gpu.graph_sampler([cuda.launch], grad=False, cuda=cuda)
    before = cuda.now
    assert sample() == pytest.approx(2e-6)
    assert cuda.now - before == pytest.approx(1e-3)  # the shortest sample


def test_what_cannot_be_captured_is_timed_on_the_stream():
    cuda = FakeCuda()
    sample = gpu.stream_sampler([cuda.launch, cuda.launch], grad=False, cuda=cuda)
    assert sample() == pytest.approx(1e-3)


def test_gradients_are_recorded_only_where_the_row_has_them():
    cuda, seen = FakeCuda(), []

    def run():
        seen.append(torch.is_grad_enabled())
        cuda.launch()

    for grad in (False, True):
        gpu.graph_sampler([run], grad=grad, cuda=cuda)
        gpu.eager_times(run, grad=grad, cuda=cuda, clock=lambda: cuda.host)
    half = len(seen) // 2
    assert seen == [False] * half + [True] * half


def test_an_eager_call_ends_with_the_device_and_the_host_before():
    cuda = FakeCuda()
    times = gpu.eager_times(cuda.launch, grad=False, cuda=cuda, clock=lambda: cuda.host)
    assert times.host == pytest.approx(10e-6)
    assert times.call == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("cache", "free", "copies"), [(4096, 1 << 30, 3), (0, 1 << 30, 1), (1 << 30, 1 << 30, 64),
                                  (1 << 30, 5 * 4 * 4096, 5), (1 << 30, 0, 1)],
)  # fmt: skip
def test_the_inputs_rotate_over_twice_the_cache_if_memory_allows(cache, free, copies):
    call = Call((torch.arange(1024.0, requires_grad=True), 3))
    found = gpu.rotation(call, cache_bytes=cache, free_bytes=free)
    assert len(found) == copies
    assert found[0] is call
    for copy in found[1:]:
        assert copy.args[0].equal(call.args[0])
        assert copy.args[0].data_ptr() != call.args[0].data_ptr()
        assert copy.args[0].requires_grad


def test_a_row_of_a_gpu_becomes_three_with_their_peers(monkeypatch):
    from test_bench import toy

    cuda = FakeCuda()
    spec = toy(peers={"twice": lambda x: 2 * x})
    bench = spec.bench[0]._replace(oracle=lambda *_: [Verdict("out", 0.0, 1.0, "")])
    task = rows.Task(spec, bench._replace(make=lambda _: bench.make("cpu")), "triton")
    monkeypatch.setattr(rows, "unavailable", lambda _: None)
    monkeypatch.setattr(rows, "on_backend", lambda *_: lambda x: cuda.launch())
    monkeypatch.setattr(rows, "evaluate", lambda *_: {})
    monkeypatch.setattr(rows.memory, "peak_bytes", lambda *_, **__: 7)
    monkeypatch.setattr(rows.gpu, "rotating_inputs", lambda call: [call, call])
    monkeypatch.setattr(
        rows.gpu, "graph_sampler", lambda runs, grad, real=gpu.graph_sampler: real(
            runs, grad=grad, cuda=cuda)
    )  # fmt: skip
    monkeypatch.setattr(
        rows.gpu, "eager_times", lambda run, grad, real=gpu.eager_times: real(
            run, grad=grad, cuda=cuda, clock=lambda: cuda.host)
    )  # fmt: skip
    monkeypatch.setattr(
        rows, "peers_of", lambda *_, **__: [rows.Peer("slow", lambda _: lambda: [
            cuda.launch(), cuda.launch(), cuda.launch()])]
    )  # fmt: skip
    ceilings = Ceilings(1000.0, 50.0, 500.0)
    found, notes = rows.measure(task, ceilings, seconds=0.5, compile_too=False)
    assert notes == rows.Notes("", "", {})
    kernels, eager, host = found
    assert [row.case for row in found] == ["4096", "4096, eager call", "4096, host"]
    assert kernels.time_us == pytest.approx(1000.0)
    assert kernels.ratios["slow"] == pytest.approx(3.0)
    assert eager.ratios["slow"] > 1
    assert host.time_us < eager.time_us
    assert host.ratios == {}
    assert {row.device for row in found} == {"cuda"}
    assert kernels.peak_bytes == 7


# Hashes of sources


@pytest.fixture
def package(tmp_path):
    """A copy of a family's sources, whose hashes are taken in place of the package's."""
    source = sources._PACKAGE
    target = tmp_path / "python" / "foveate"
    shutil.copytree(
        source / "ops", target / "ops", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    root = source.parents[1]
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    return target


def hashes(package):
    return {f: sources.source_hash(f, "triton", package) for f in ("analog_bits", "ncut")}


def edited(path, old, new):
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, 1))


def test_comments_and_docstrings_do_not_change_a_hash(package):
    before = hashes(package)
    for path in (package / "ops" / "analog_bits" / "triton").glob("*.py"):
        path.write_text(path.read_text() + "\n# a remark\n")
    module = package / "ops" / "analog_bits" / "triton" / "__init__.py"
    edited(module, '"""', '"""Other words. ')
    assert hashes(package) == before


@pytest.mark.parametrize("module", ["triton/codec.py", "triton/words.py", "layout.py"])
def test_code_of_a_kernel_or_of_what_it_imports_changes_its_hash_alone(package, module):
    before = hashes(package)
    path = package / "ops" / "analog_bits" / module
    path.write_text(path.read_text() + "\nedited = 1\n")
    after = hashes(package)
    assert after["analog_bits"] != before["analog_bits"]
    assert after["ncut"] == before["ncut"]


@pytest.mark.parametrize("module", ["reference/codec.py", "api/codec.py", "cpu/codec.py"])
def test_what_is_not_the_kernel_changes_no_hash(package, module):
    before = hashes(package)
    path = package / "ops" / "analog_bits" / module
    path.write_text(path.read_text() + "\nedited = 1\n")
    assert hashes(package) == before


def test_a_family_without_kernels_has_no_hash(package):
    shutil.rmtree(package / "ops" / "analog_bits" / "triton")
    assert sources.source_hash("analog_bits", "triton", package) is None


def test_a_header_that_all_families_share_changes_the_cuda_hash(package):
    family = package / "ops" / "analog_bits"
    (family / "cuda.py").write_text("launch = 1\n")
    before = sources.source_hash("analog_bits", "cuda", package)
    csrc = package.parents[1] / "csrc" / "cuda"
    (csrc / "shared.cuh").write_text("// a remark\n")
    with_header = sources.source_hash("analog_bits", "cuda", package)
    (csrc / "ncut_other.cuh").write_text("int x;\n")
    assert before != with_header
    assert sources.source_hash("analog_bits", "cuda", package) == with_header
    (csrc / "shared.cuh").write_text("/* other */ \n\n // remark\n")
    assert sources.source_hash("analog_bits", "cuda", package) == with_header
