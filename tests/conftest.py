"""Three legs of one suite: `pytest` on the CPU, `pytest --ttsem` without a GPU, `pytest` on one."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from generated import mixed_product
from hypothesis import HealthCheck, settings

import foveate._native as native

# Here, before pytest reads --hypothesis-profile, which loads one of them after this.
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=10_000)
settings.register_profile("sanitized", settings.get_profile("ci"), max_examples=25)
settings.register_profile("emulated", settings.get_profile("ci"), max_examples=4)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ttsem",
        action="store_true",
        help="run the gpu tests without a GPU: Triton's IR is executed on the CPU",
    )
    parser.addoption(
        "--cpu-ops-only",
        action="store_true",
        help="run the tests of the CPU kernels alone (for sanitizer builds)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ttsem"):
        from ttsem import sanitize

        config._ttsem = sanitize.session(90, "<pytest>")
        config._ttsem.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    session = getattr(config, "_ttsem", None)
    if session is not None:
        session.__exit__(None, None, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ttsem = config.getoption("--ttsem")
    cpu_ops = config.getoption("--cpu-ops-only")

    def runs(item: pytest.Item) -> bool:
        gpu = "gpu" in item.keywords
        if ttsem:
            # The emulator has no CUDA runtime, and takes milliseconds for what a GPU does in
            # microseconds: there each case runs in one dtype, and one case in all.
            return gpu and not {"cuda_only", "full_grid"} & set(item.keywords)
        if cpu_ops:
            return "cpu_op" in item.keywords
        return not gpu or (torch.cuda.is_available() and "emulated" not in item.keywords)

    dropped = [item for item in items if not runs(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: the maximum), so that an element never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def emulated_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what an emulated device does not have."""
    if not request.config.getoption("--ttsem"):
        return
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda *_: types.SimpleNamespace(cuda_stream=0)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class CpuGenerator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    monkeypatch.setattr(torch, "Generator", CpuGenerator)
    monkeypatch.setattr(torch, "mm", mixed_product(torch.mm))


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the CPU kernels of one instruction set."""
    if not request.param:
        yield ""  # not a CPU kernel
        return
    cpu = native.native("_cpu")
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
