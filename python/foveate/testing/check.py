"""The error budget: the only tolerance of the package.

    err(kernel vs float64) <= 2 (err(reference in the same dtype vs float64) + eps max|float64|)

for every output and every gradient, with eps of the output's dtype. Which elements are finite, inf
or NaN must agree with the reference in the same dtype element by element; the budget covers the
finite ones. Integer and bool outputs must be equal.

For a float64 output the reference stands for the exact value, and its error is not seen: it is
taken to be that of the reference in float32, times eps64 / eps32, since rounding scales with eps,
and is allowed once more, since the difference measured holds it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from foveate.testing.spec import Call, OpSpec


class Verdict(NamedTuple):
    """One output or gradient: its largest error, what is allowed, and what is wrong ("" if ok)."""

    name: str
    error: float
    budget: float
    wrong: str

    @property
    def ok(self) -> bool:
        return not self.wrong


def _named_outputs(result: Any, prefix: str = "out") -> dict[str, torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return {prefix: result}
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        items = zip(result._fields, result, strict=True)
    elif isinstance(result, (tuple, list)):
        items = zip(map(str, range(len(result))), result, strict=True)
    else:
        return {}
    named: dict[str, torch.Tensor] = {}
    for key, value in items:
        named.update(_named_outputs(value, f"{prefix}.{key}"))
    return named


def evaluate(api: Callable[..., Any], call: Call, backend: str) -> dict[str, torch.Tensor]:
    """Outputs of the call and gradients of its tensors that require grad, by name.

    The upstream gradient is standard normal, equal for every backend and dtype up to rounding.
    """
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    fresh = call.map(leaf)
    outputs = _named_outputs(api(*fresh.args, **fresh.kwargs, backend=backend))
    recorded = {name: value for name, value in outputs.items() if value.requires_grad}
    if recorded:
        generator = torch.Generator().manual_seed(0)
        upstream = []
        for value in recorded.values():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            upstream.append(noise.to(dtype=value.dtype).to(value.device))
        gradients = torch.autograd.grad(
            list(recorded.values()), leaves, upstream, allow_unused=True
        )
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                outputs[f"grad.{index}"] = gradient
    return {name: value.detach() for name, value in outputs.items()}


def compare(
    name: str,
    got: torch.Tensor,
    same: torch.Tensor,
    exact: torch.Tensor,
    rough: torch.Tensor | None = None,
) -> Verdict:
    """The verdict on `got`, given the reference in the same dtype, in float64 and in float32."""
    if got.shape != same.shape:
        return Verdict(name, 0.0, 0.0, f"shape {tuple(got.shape)}, not {tuple(same.shape)}")
    if got.dtype != same.dtype:
        return Verdict(name, 0.0, 0.0, f"dtype {got.dtype}, not {same.dtype}")
    if not got.is_floating_point():
        different = int((got != same).sum())
        return Verdict(name, different, 0.0, f"{different} elements differ" if different else "")
    eps = torch.finfo(got.dtype).eps
    got, same, exact = got.double(), same.double(), exact.double()
    for kind, pattern in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        different = int((pattern(got) != pattern(same)).sum())
        if different:
            return Verdict(name, float("inf"), 0.0, f"{kind} at {different} other elements")
    finite = got.isfinite() & exact.isfinite()
    if not bool(finite.any()):
        return Verdict(name, 0.0, 0.0, "")
    unseen = 0.0 if rough is None else _rounding(rough.double()[finite], exact[finite])
    got, same, exact = got[finite], same[finite], exact[finite]
    error = float((got - exact).abs().max())
    reference = max(unseen, float((same - exact).abs().max()))
    budget = 2 * (reference + eps * float(exact.abs().max())) + unseen
    return Verdict(name, error, budget, "" if error <= budget else "over budget")


def _rounding(rough: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of a float64 evaluation, from that of the same one in float32."""
    seen = rough.isfinite()
    if not bool(seen.any()):
        return 0.0
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return float((rough - exact)[seen].abs().max()) * ratio


def verdicts(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    """How the backend does on the call, by the spec's own check or the error budget."""
    if spec.check is not None:
        return spec.check(spec, call, backend)
    return _within_budget(spec, call, backend, torch.float64)


def in_float32(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    """The error budget with the reference in float32 as the exact value, for half-precision calls.

    For benchmark rows whose float64 reference would not fit the device. float32 carries 13 bits
    more than float16 and 16 more than bfloat16, so its own error is far below the budget.
    """
    for tensor in call.tensors():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 2 and tensor.numel() > 1:
            raise ValueError(f"in_float32 judges half-precision calls, got a {tensor.dtype}")
    return _within_budget(spec, call, backend, torch.float32)


def on_part(
    part: Callable[[Call], Call], take: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Callable[[OpSpec, Call, str], list[Verdict]]:
    """An oracle for calls too large for a reference in float64: the result of the whole call on
    a part of it, and the part as a call of its own with its gradients.

    Args:
        part: the call on that part, e.g. on the first samples of the batch.
        take: (name, output of the whole call) -> what belongs to the part; None if nothing does.
    """

    def oracle(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
        piece = part(call)
        found = verdicts(spec, piece, backend)
        whole = evaluate(spec.api, call.map(torch.Tensor.detach), backend)
        still = piece.map(torch.Tensor.detach)
        same = evaluate(spec.api, still, "reference")
        exact = evaluate(spec.api, still.to(torch.float64), "reference")
        taken = {name: take(name, value) for name, value in whole.items()}
        shared = [
            compare(f"whole {name}", value, same[name], exact[name])
            for name, value in taken.items()
            if value is not None
        ]
        if not shared:
            raise ValueError("on_part: take gave None for every output of the whole call")
        return [*found, *shared]

    return oracle


def _within_budget(
    spec: OpSpec, call: Call, backend: str, exact_dtype: torch.dtype
) -> list[Verdict]:
    got = evaluate(spec.api, call, backend)
    same = evaluate(spec.api, call, "reference")
    exact = evaluate(spec.api, call.to(exact_dtype), "reference")
    if got.keys() != same.keys():
        return [Verdict("outputs", 0.0, 0.0, f"{sorted(got)}, not {sorted(same)}")]
    rough: dict[str, torch.Tensor] = {}
    if any(value.dtype == torch.float64 for value in got.values()):
        rough = evaluate(spec.api, call.to(torch.float32), "reference")
    return [compare(name, got[name], same[name], exact[name], rough.get(name)) for name in got]


def assert_ok(results: list[Verdict]) -> None:
    """AssertionError listing every verdict that is not ok; at least one must have been given."""
    assert results, "nothing was compared"
    failed = [
        f"{v.name}: {v.wrong} (error {v.error:.3g}, budget {v.budget:.3g})"
        for v in results
        if not v.ok
    ]
    assert not failed, "; ".join(failed)
