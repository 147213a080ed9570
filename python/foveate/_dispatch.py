"""Which backend runs an op: the only choice made anywhere, and the torch.library boundary.

A family is a package `foveate.ops.<family>` whose modules `reference`, `cpu`, `triton` and `cuda`
are its backends; it has those that earn their place. A backend module has one launcher per raw op,
of the same name and arguments, and

    unsupported(op, *args) -> str | None      why it cannot run these arguments
    not_preferred(op, *args) -> str | None    why "auto" passes it over although it can (optional)

both called with the arguments that the family's api passes to `select`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from foveate._native import can_run_cuda, load_native

BACKENDS = ("cuda", "triton", "cpu", "reference")
_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
_AUTO = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # device type -> order in which auto tries

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # types that no __torch_function__ looks on

OPS: dict[str, list[str]] = {}  # family -> its launchers, in the order of registration

_LIBRARY = torch.library.Library("foveate", "FRAGMENT")


def missing_runtime(backend: str) -> str | None:
    """Why nothing of a backend can run in this environment, whatever the family; None if it can."""
    if backend == "cpu":
        module = load_native("_cpu")
        return module if isinstance(module, str) else None
    if backend == "triton":
        if (reason := _missing_triton()) is not None:
            return reason
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    return can_run_cuda() if backend == "cuda" else None


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return f"triton does not load: {error}"
    return None


def families() -> list[str]:
    """The directories under foveate/ops."""
    return [
        found.name
        for found in pkgutil.iter_modules(importlib.import_module("foveate.ops").__path__)
    ]


def missing_kernels(family: str, backend: str, op: str | None = None) -> str | None:
    """Why the backend has no kernels of the family, or none for `op`; None if it has."""
    module = load_backend(family, backend)
    if isinstance(module, str):
        return module
    if op is None or backend == "reference" or hasattr(module, op):
        return None
    return f"the {backend} backend of {family} has no {op} kernel"


def load_backend(family: str, backend: str) -> ModuleType | str:
    """The module `foveate.ops.<family>.<backend>`, or why it cannot be loaded."""
    key = f"{family}.{backend}"
    if torch.compiler.is_compiling():
        _load_all()
    elif key not in _LOADED:
        _LOADED[key] = _import_backend(family, backend)
    return _LOADED[key]


_LOADED: dict[str, ModuleType | str] = {}  # "family.backend" -> what load_backend returns


# The compiler cannot trace an import. It runs this once, at trace time, before it first looks at
# `_LOADED`, whose entries it then guards like any module's attributes.
def _load_all() -> bool:
    for family in families():
        for backend in BACKENDS:
            key = f"{family}.{backend}"
            if key not in _LOADED:
                _LOADED[key] = _import_backend(family, backend)
    return True


# What torch.compiler.assume_constant_result sets; it would import torch._dynamo to do so.
_load_all._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _import_backend(family: str, backend: str) -> ModuleType | str:
    path = f"foveate.ops.{family}.{backend}"
    if importlib.util.find_spec(path) is None:
        return f"{family} has no {backend} backend"
    if backend == "triton" and (reason := _missing_triton()) is not None:
        return reason
    if backend in ("cpu", "cuda"):
        module = load_native(f"_{backend}")
        if isinstance(module, str):
            return module
    return importlib.import_module(path)


def load_backends(family: str) -> dict[str, ModuleType | str]:
    """Every backend of a family by name: its module, or why it cannot be loaded."""
    return {name: load_backend(family, name) for name in BACKENDS}


def refusal(family: str, op: str, backend: str, device: str, *args: Any) -> str | None:
    """Why `backend` cannot run `op` on these arguments; None if it can."""
    if backend == "reference":
        return None
    if device != _DEVICE[backend]:
        return f"it runs on {_DEVICE[backend]} tensors, got {device} tensors"
    return _refusal_of(load_backend(family, backend), family, op, backend, *args)


def _refusal_of(
    module: ModuleType | str, family: str, op: str, backend: str, *args: Any
) -> str | None:
    if isinstance(module, str):
        return module
    if not hasattr(module, op):
        return missing_kernels(family, backend, op)
    reason: str | None = module.unsupported(op, *args)
    return reason


def select(family: str, op: str, backend: str, device: str, *args: Any) -> str:
    """The backend that runs `op`: the one named, or under "auto" the first that can and should.

    Args:
        family: directory under `foveate.ops`.
        op: name of the launcher, which is the name of the raw op.
        backend: "auto" or one of `BACKENDS`.
        device: device type of the inputs.
        args: what the family's `unsupported` and `not_preferred` look at.

    Raises:
        ValueError: `backend` is not a name.
        NotImplementedError: the named backend cannot run this; the message says why.
    """
    if backend == "auto":
        for name in _AUTO.get(device, ()):
            module = load_backend(family, name)
            if _refusal_of(module, family, op, name, *args) is None:
                passed_over = getattr(module, "not_preferred", None)
                if passed_over is None or passed_over(op, *args) is None:
                    return name
        return "reference"
    if backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
    reason = refusal(family, op, backend, device, *args)
    if reason is not None:
        raise NotImplementedError(f"{op}: backend={backend!r} cannot run this: {reason}")
    return backend


def register(family: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the raw op `foveate::<name>`, opaque to torch.compile; returns what calls it.

    Its first argument is a tensor, its last positional one is `str backend`, a name that `select`
    returned. The implementation is the launcher `<name>` of that backend, called with the other
    arguments. An op whose name ends in `_out` calls the launcher without the suffix and returns
    nothing: the result is its argument `out`.

    The callable goes through torch's dispatcher only where somebody looks on (the compiler,
    functorch, a dispatch mode, a tensor subclass): parsing a schema's arguments costs 20 us of a
    35 us call on the development machine. What it calls is the same launcher.
    """
    name = schema.partition("(")[0]
    writes_out = name.endswith("_out")
    launcher = name.removesuffix("_out")
    keys = {backend: f"{family}.{backend}" for backend in BACKENDS}
    launchers = OPS.setdefault(family, [])
    if launcher not in launchers:
        launchers.append(launcher)

    def implementation(*args: Any, **kwargs: Any) -> Any:
        *rest, backend = args
        result = getattr(load_backend(family, backend), launcher)(*rest, **kwargs)
        return None if writes_out else result

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"foveate::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.foveate, name).default

    def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or type(first) not in _PLAIN
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._are_functorch_transforms_active()
        ):
            return overload(first, *args, **kwargs)
        *rest, backend = args
        module = _LOADED.get(keys[backend]) or load_backend(family, backend)
        with torch._C._AutoDispatchBelowAutograd():
            result = getattr(module, launcher)(first, *rest, **kwargs)
        return None if writes_out else result

    return call


def differentiable(cls: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`cls.apply` at the price of its maths.

    `cls` has `forward(*args)`, `setup_context`, `backward` and `generate_vmap_rule = True`. `apply`
    of such a Function binds its signature at every call (50 us). This calls `forward` alone where
    nothing is recorded, an old-style twin where autograd records in eager mode, and `cls.apply`
    wherever a functorch transform, forward-mode AD or the compiler looks on: skipping the Function
    there by `requires_grad` would give zeros silently.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args_anchors_count: Any) -> Any:
            *rest, count = args_anchors_count
            args, ctx.anchors = tuple(rest[:-count]), rest[-count:]
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            gradients = cls.backward(ctx, *upstream)
            if not isinstance(gradients, tuple):
                gradients = (gradients,)
            if torch.is_grad_enabled():
                gradients = _refuse_second_derivative(ctx.anchors, gradients)
            return (*gradients, *(None,) * (len(ctx.anchors) + 1))

    Eager.__name__ = Eager.__qualname__ = cls.__name__

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
        ):
            return cls.apply(*args)
        if torch.is_grad_enabled():
            anchors = [
                _Anchor.apply(arg)
                for arg in args
                if isinstance(arg, torch.Tensor) and arg.requires_grad
            ]
            if anchors:
                return Eager.apply(*args, *anchors, len(anchors))
        return cls.forward(*args)

    return call


class _Anchor(torch.autograd.Function):
    """An empty tensor that hangs on its input in the graph and keeps none of its memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> None:
        return None


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *anchors_and_gradients: torch.Tensor) -> Any:
        return tuple(gradient.detach() for gradient in anchors_and_gradients[count:])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(
            "a fused backend is differentiable once, but its gradient was differentiated again; "
            "backend='reference' is differentiable to any order"
        )


def _refuse_second_derivative(anchors: Any, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients, whose own differentiation raises.

    torch's once_differentiable hangs its error on the upstream gradient alone: `autograd.grad`
    towards an input that the rest of a loss reaches by another path would pass it by, and return a
    wrong sum.
    """
    tensors = [gradient for gradient in gradients if isinstance(gradient, torch.Tensor)]
    if not tensors:
        return gradients
    refused = iter(_Refused.apply(len(anchors), *anchors, *tensors))
    return tuple(next(refused) if isinstance(g, torch.Tensor) else g for g in gradients)
