"""How the generated tests walk the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate._native import can_run_cuda, load_native
from foveate.testing import SPECS, Call, OpSpec

CUDA_BACKENDS = ("triton", "cuda")


def device_of(backend: str) -> str:
    return "cuda" if backend in CUDA_BACKENDS else "cpu"


def marks(backend: str) -> list[pytest.MarkDecorator]:
    found = []
    if backend in CUDA_BACKENDS:
        found.append(pytest.mark.gpu)
    if backend == "cuda":
        found.append(pytest.mark.cuda_only)
        if (reason := can_run_cuda()) is not None:
            found.append(pytest.mark.skip(reason=reason))
    if backend == "cpu":
        found.append(pytest.mark.cpu_op)
    return found


def isas() -> list[str]:
    cpu = load_native("_cpu")
    return ["absent"] if isinstance(cpu, str) else cpu.isas()


def spec_backends(*, reference: bool = False) -> Iterator[Any]:
    """One parameter per op and backend; the reference alone for an op without kernels."""
    for spec in SPECS:
        names = (*spec.backends, "reference") if reference else spec.backends
        for backend in names:
            yield pytest.param(spec, backend, marks=marks(backend), id=f"{spec.name}-{backend}")


def spec_cases() -> Iterator[Any]:
    """One parameter per op, backend (CPU: instruction set), case and dtype."""
    for spec in SPECS:
        for backend in spec.backends:
            for isa in isas() if backend == "cpu" else [""]:
                for name, case in spec.cases.listed.items():
                    for dtype in spec.dtypes:
                        short = str(dtype).removeprefix("torch.")
                        found = marks(backend)
                        other = dtype != spec.dtypes[0] and case is not a_case(spec)
                        if other or not case.get("emulated", True):
                            found.append(pytest.mark.full_grid)
                        kernel = f"{backend}[{isa}]" if isa else backend
                        yield pytest.param(
                            spec,
                            backend,
                            isa,
                            case,
                            dtype,
                            marks=found,
                            id=f"{spec.name}-{kernel}-{name}-{short}",
                        )


def mixed_product(mm: Callable[..., Any]) -> Callable[..., Any]:
    """torch.mm with the products of half-precision matrices in float32, which CPUs do not have."""

    def mm_out_dtype(a: Any, b: Any, *, out: Any = None, out_dtype: Any = None) -> Any:
        if out_dtype is not None:
            a, b = a.to(out_dtype), b.to(out_dtype)
        return mm(a, b) if out is None else mm(a, b, out=out)

    return mm_out_dtype


def strided(call: Call) -> Call:
    """The same values in memory that is neither contiguous nor at the start of its storage."""

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.layout != torch.strided:
            return tensor
        room = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
        view = room[..., 1::2]
        view.copy_(tensor.detach())
        return view.requires_grad_(tensor.requires_grad)

    return call.map(spread)


def transposed(call: Call) -> Call:
    """The same values with the axes' order in memory reversed."""

    def reverse(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2 or tensor.layout != torch.strided:
            return tensor
        axes = tuple(reversed(range(tensor.ndim)))
        view = tensor.detach().permute(axes).contiguous().permute(axes)
        return view.requires_grad_(tensor.requires_grad)

    return call.map(reverse)


class RecordRawOps(TorchDispatchMode):
    """Notes each call of a foveate raw op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "foveate":
            self.calls.append((func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def raw_calls(f: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    with RecordRawOps() as record, torch.no_grad():
        f()
    return record.calls


def a_case(spec: OpSpec) -> dict[str, Any]:
    """The first case with elements: small, and not degenerate."""
    return next(
        case
        for name, case in spec.cases.listed.items()
        if name not in ("empty", "one", "one pixel")
    )
