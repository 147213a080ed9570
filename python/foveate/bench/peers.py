"""What a row runs: a function on the row's tensors, with its backward where they require grad."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate._dispatch import load_backend
from foveate.testing import Bench, Call, OpSpec

REFERENCE = "reference"
COMPILED = "torch.compile(reference)"

Function = Callable[..., Any]  # of a call's arguments


class Peer(NamedTuple):
    """A competitor: how it runs a call, given the call."""

    name: str
    bind: Callable[[Call], Callable[[], Any]]


def _recorded(result: Any) -> list[torch.Tensor]:
    """The tensors of a result that autograd can go back from."""
    if isinstance(result, torch.Tensor):
        return [result] if result.requires_grad else []
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)):
        return [tensor for item in result for tensor in _recorded(item)]
    return []


def _upstream(like: torch.Tensor) -> torch.Tensor:
    """The incoming gradient of an output: 1 for a scalar, else standard normal, always the same."""
    if like.ndim == 0:
        return torch.ones_like(like)
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device=like.device, dtype=like.dtype)


def differentiated(call: Call) -> bool:
    """Whether the row times forward and backward."""
    return any(tensor.requires_grad for tensor in call.tensors())


def with_backward(forward: Callable[[], Any], call: Call) -> Callable[[], Any]:
    """`forward`, followed by the gradients of the call's tensors that require grad, if any do."""
    leaves = [tensor for tensor in call.tensors() if tensor.requires_grad]
    if not leaves:
        return forward
    upstream: list[torch.Tensor] = []

    def run() -> Any:
        outputs = _recorded(forward())
        if not outputs:
            raise RuntimeError("no output requires grad, although an input does")
        if [g.shape for g in upstream] != [o.shape for o in outputs]:
            upstream[:] = [_upstream(output) for output in outputs]
        return outputs, torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return run


def bind(function: Function, call: Call) -> Callable[[], Any]:
    """The function on the call's tensors, with backward where they require grad."""
    return with_backward(functools.partial(function, *call.args, **call.kwargs), call)


def on_backend(spec: OpSpec, backend: str) -> Function:
    """The public function with its backend named."""
    return functools.partial(spec.api, backend=backend)


class _RawOps(TorchDispatchMode):
    """Notes each call of a raw op of the package."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "foveate":
            self.calls.append((func, args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _compiled_reference(spec: OpSpec) -> Callable[[Call], Callable[[], Any]]:
    """torch.compile of the reference, as a peer who wrote plain PyTorch would use it.

    Where the reference runs inside an opaque raw op, which the compiler cannot fuse, its function
    is compiled by itself, without the checks of the public one.
    """
    torch.compiler.reset()
    compiled: dict[str, Any] = {}

    def bound(call: Call) -> Callable[[], Any]:
        reference = functools.partial(spec.api, *call.args, **call.kwargs, backend=REFERENCE)
        with _RawOps() as record:
            reference()
        if not record.calls:
            if "api" not in compiled:
                compiled["api"] = torch.compile(spec.api, dynamic=False)
            return with_backward(
                functools.partial(compiled["api"], *call.args, **call.kwargs, backend=REFERENCE),
                call,
            )
        if len(record.calls) > 1:
            raise RuntimeError(f"the reference is {len(record.calls)} opaque ops, not one graph")
        op, (*args, _), kwargs = record.calls[0]
        launcher = op._opname.removesuffix("_out")
        if launcher not in compiled:
            module = load_backend(spec.family, REFERENCE)
            compiled[launcher] = torch.compile(getattr(module, launcher), dynamic=False)
        return functools.partial(compiled[launcher], *args, **kwargs)

    return bound


def peers_of(spec: OpSpec, bench: Bench, backend: str, *, compile_too: bool) -> list[Peer]:
    """The built-in peers that are not the subject itself, then those that the row names."""
    found = []
    if backend != REFERENCE:
        reference = on_backend(spec, REFERENCE)
        found.append(Peer(REFERENCE, functools.partial(bind, reference)))
    if compile_too:
        found.append(Peer(COMPILED, _compiled_reference(spec)))
    found += [Peer(name, functools.partial(bind, f)) for name, f in bench.peers.items()]
    return found
