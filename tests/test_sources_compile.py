"""Every GPU source compiled ahead of time, without a GPU: no spills, shared memory that fits.

The Triton variants are generated: each op of the registry is called with CPU tensors, which its
launchers cannot tell from others, and what they would launch is noted, not run. Each distinct
launch (kernel, dtypes, constexprs, options) is then compiled for sm_90 as the JIT would compile it,
and one of each kernel and its dtypes for sm_80 and sm_100.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from generated import a_case, mixed_product
from torch.overrides import TorchFunctionMode

from foveate import _dispatch
from foveate.testing import SPECS, Call, OpSpec, evaluate

if sys.platform != "linux":
    pytest.skip("Triton and nvcc are Linux tools", allow_module_level=True)
triton = pytest.importorskip("triton")

pytestmark = pytest.mark.compiles

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block can opt in
CUDA_SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))


class Launch(NamedTuple):
    """One launch that a launcher asked for."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def variant(self) -> tuple[Any, ...]:
        """What decides the compiled code, up to the alignment of pointers and divisibility."""

        def kind(param: Any, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return str(value.dtype)
            if param is None or param.is_constexpr:
                return repr(value)
            if isinstance(value, tuple):
                return tuple(kind(param, item) for item in value)
            if isinstance(value, int) and not isinstance(value, bool):
                return value == 1, -(2**31) <= value < 2**31
            return type(value)

        params = {param.name: param for param in self.kernel.params}
        given = dict(zip(params, self.args, strict=False)) | self.kwargs
        return (
            self.kernel.fn.__module__,
            self.kernel.fn.__qualname__,
            tuple(sorted((name, kind(params.get(name), value)) for name, value in given.items())),
        )

    def dtypes(self) -> tuple[Any, ...]:
        """The kernel and the dtypes of its tensors."""
        given = (*self.args, *(value for _, value in sorted(self.kwargs.items())))
        return (
            *self.variant()[:2],
            *(str(value.dtype) for value in given if isinstance(value, torch.Tensor)),
        )


class _ZeroFilled(TorchFunctionMode):
    """Fresh memory holds zeros: what a kernel that does not run leaves as counts and indices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("empty", "empty_like", "new_empty", "empty_strided"):
            result.zero_()
        return result


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Triton kernels take CPU tensors, and are noted instead of run."""
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(Launch(kernel, args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.JITFunction, "run", run))
        stack.enter_context(mock.patch.dict(_dispatch._DEVICE, triton="cpu"))
        stack.enter_context(
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0))
        )
        stack.enter_context(mock.patch.object(torch, "mm", mixed_product(torch.mm)))
        stack.enter_context(_ZeroFilled())
        yield found


@contextmanager
def _stopped_by_zeros(family: str) -> Iterator[None]:
    """What the driver of ncut makes of the zeros that no kernel filled, and nothing else.

    It looks at values in between: at what the products left, at degrees, at how far it converged.
    What it had launched by then is noted; a test below sees that no kernel is missing.
    """
    if family != "ncut":
        yield
        return
    with warnings.catch_warnings():
        for message in ("ncut did not reach a residual", "batch entry . is degenerate"):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except (torch.linalg.LinAlgError, ValueError) as error:
            if not any(reason in str(error) for reason in _STOPS):
                raise


_STOPS = ("failed to converge because the input", "must give every token a positive degree")


def _calls(spec: OpSpec) -> Iterator[Call]:
    """The listed cases, one of them in every dtype, and the quick benchmark rows (real sizes)."""
    for row in spec.bench:
        if row.quick:
            yield row.make("cpu")
    for case in spec.cases.listed.values():
        dtypes = spec.dtypes if case is a_case(spec) else spec.dtypes[:1]
        for dtype in dtypes:
            yield spec.make_inputs(case, dtype, "cpu", 0)


@functools.cache
def launches(family: str) -> tuple[Launch, ...]:
    """The distinct launches of the cases of the family's ops, forward and backward."""
    distinct: dict[Any, Launch] = {}
    for spec in TRITON_SPECS:
        if spec.family != family:
            continue
        noted: list[Launch] = []
        for call in _calls(spec):
            with recorded_launches() as found, _stopped_by_zeros(family):
                evaluate(spec.api, call, "triton")
            noted += found
        assert noted, f"the triton backend of {spec.name} launches no kernel"
        for launch in noted:
            distinct.setdefault(launch.variant(), launch)
    return tuple(distinct.values())


class _Driver:
    """What Triton's JIT asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 1000 + self.arch  # the JIT keeps a cache for each device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    driver = triton.runtime.driver
    before = driver.active if torch.cuda.is_available() else None
    driver.set_active(_Driver(arch))
    yield
    driver.set_active(before)


def _resources(cubin: bytes, path: Path) -> dict[str, int]:
    """Registers, stack and shared bytes of the one function in the cubin."""
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    listing = subprocess.run(
        [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", listing)}


def test_an_error_while_launches_are_noted_is_not_hidden():
    for family, error in (("analog_bits", ValueError("x")), ("ncut", ValueError("tau must be"))):
        with pytest.raises(ValueError, match=str(error)), _stopped_by_zeros(family):
            raise error


TRITON_SPECS = [spec for spec in SPECS if "triton" in spec.backends]


def _compiled_for(family: str, arch: int) -> tuple[Launch, ...]:
    """Every launch for sm_90; for the others one of each kernel and set of dtypes."""
    if arch == 90:
        return launches(family)
    return tuple({launch.dtypes(): launch for launch in launches(family)}.values())


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("family", sorted({spec.family for spec in TRITON_SPECS}))
def test_triton_kernels_compile_without_spills_and_fit_shared_memory(
    family, arch, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    wrong = []
    with compiling_for(arch):
        for launch in _compiled_for(family, arch):
            kernel = launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)
            used = _resources(kernel.asm["cubin"], tmp_path / "kernel.cubin")
            assert used["REG"] > 0
            if used["STACK"] > 0:
                wrong.append(f"spills {used['STACK']} bytes: {launch.variant()}")
            if kernel.metadata.shared > SHARED_MEMORY[arch]:
                wrong.append(f"shared memory {kernel.metadata.shared}: {launch.variant()}")
    assert not wrong, "\n".join(wrong)


def _kernels() -> set[tuple[str, str]]:
    """Every @triton.jit function of the package whose name ends in _kernel."""
    found = set()
    ops = importlib.import_module("foveate.ops")
    for module in pkgutil.walk_packages(ops.__path__, "foveate.ops."):
        if ".triton" not in module.name:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            kernel = getattr(value, "fn", None) if not hasattr(value, "params") else value
            if isinstance(kernel, triton.runtime.JITFunction):
                found.add((kernel.fn.__module__, kernel.fn.__qualname__))
    return {(module, name) for module, name in found if name.endswith("_kernel")}


def test_every_triton_kernel_is_among_the_compiled():
    compiled = {
        launch.variant()[:2]
        for family in {spec.family for spec in TRITON_SPECS}
        for launch in launches(family)
    }
    missing = _kernels() - compiled
    assert not missing, f"no case of the registry launches {sorted(missing)}"
    assert _kernels()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_sources_compile_without_warnings_or_spills(source, arch, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    result = subprocess.run(
        [
            "nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin",
            "-Xptxas=--warn-on-spills,--warning-as-error",
            "-Xcompiler=-Wall,-Wextra,-Wshadow,-Wconversion,-Werror",
            "-I", str(source.parents[1]), "-o", str(tmp_path / "out.cubin"), str(source),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
