"""What an op states about itself; one OpSpec generates its tests, benchmark rows and README row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a public function; tensors that require grad are differentiated."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """The call with `f` applied to every tensor, also inside tuples, lists and dicts."""

        def walk(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return f(value)
            if isinstance(value, dict):
                return {key: walk(item) for key, item in value.items()}
            if isinstance(value, (tuple, list)):
                return type(value)(walk(item) for item in value)
            return value

        return replace(self, args=walk(self.args), kwargs=walk(self.kwargs))

    def to(self, dtype: torch.dtype) -> Call:
        """The call with every floating tensor, and a floating `dtype=`, in another dtype."""

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        call = self.map(cast)
        given = call.kwargs.get("dtype")
        if isinstance(given, torch.dtype) and given.is_floating_point:
            call.kwargs["dtype"] = dtype
        return call

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the call, in a fixed order."""
        found: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found


class Cases(NamedTuple):
    """The sizes and options that `make_inputs` takes: a fixed list by name, and random ones."""

    listed: dict[str, dict[str, Any]]
    draw: Callable[[Callable[[int, int], int]], dict[str, Any]]  # from a source of ints in [lo, hi]


class BadInput(NamedTuple):
    """A call that must raise `error` with a message that matches the pattern `match`."""

    id: str
    call: Callable[[], Call]
    error: type[Exception]
    match: str


class Cost(NamedTuple):
    """What one call must do at least: floating-point operations and bytes of memory traffic."""

    flops: float
    bytes: float


class Bench(NamedTuple):
    """One benchmark row: real inputs at a real model's size, and the peers that run them too.

    If a tensor of the call requires grad, the row times forward and backward.
    """

    id: str
    make: Callable[[str], Call]  # device -> call
    peers: dict[str, Callable[..., Any]]  # name -> function of the same arguments
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")  # where this size makes sense
    # (spec, call, backend) -> verdicts on the timed call, where a reference in float64 would not
    # fit: check.in_float32, check.on_part, or a family's own. None: as the tests do.
    oracle: Callable[[OpSpec, Call, str], list[Any]] | None = None


@dataclass(frozen=True)
class OpSpec:
    """One op: ten fields, from which its tests, benchmark and README row are generated.

    Attributes:
        name: public name, `foveate.<name>`.
        api: the public function; it takes `backend=`.
        backends: those beside the reference that have a kernel for it.
        dtypes: floating dtypes that `make_inputs` is asked for.
        make_inputs: (case, dtype, device, seed) -> Call. Tensors to differentiate require grad.
        cases: sizes for every edge (0, 1, tile - 1, tile, tile + 1, odd), and random ones.
        bench: benchmark rows.
        cost: Call -> Cost, of the forward call (and backward, if a tensor requires grad).
        bad_inputs: calls with the error that each must raise.
        check: (spec, call, backend) -> verdicts, for a family that states its own accuracy;
            None is the error budget of check.py.
    """

    name: str
    api: Callable[..., Any]
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    make_inputs: Callable[[dict[str, Any], torch.dtype, str, int], Call]
    cases: Cases
    bench: tuple[Bench, ...]
    cost: Callable[[Call], Cost]
    bad_inputs: tuple[BadInput, ...]
    check: Callable[[OpSpec, Call, str], list[Any]] | None = None

    @property
    def family(self) -> str:
        """The directory of the op under foveate/ops."""
        return self.api.__module__.split(".")[2]
