"""ncut on CUDA tensors: Triton's bits and partitions around the solver of csrc/cuda/ncut.cu."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from foveate._dispatch import missing_runtime
from foveate._native import can_run_cuda, native
from foveate.ops.ncut.gradient import ncut_affinity_bwd as ncut_affinity_bwd

_cuda = native("_cuda")

_ARCHITECTURE = (8, 0)  # the oldest that the module is built for
_KINDS = {torch.float32: 1, torch.float64: 2}  # csrc/cuda/ncut.h, of weights

# None once benchmarks/results has a passing record of the source that stands.
NOT_PREFERRED: str | None = "no record yet of the CUDA C++ solver on a GPU"


def unsupported(_op: str, *_args: Any) -> str | None:
    """Why the solver cannot run here; its bits come from Triton's kernels."""
    return _cannot_run()


def _cannot_run() -> str | None:
    reason = can_run_cuda() or missing_runtime("triton")
    if reason is not None:
        return reason
    found = torch.cuda.get_device_capability()
    if found < _ARCHITECTURE:
        return f"it is built for sm_80 and later, the device is sm_{found[0]}{found[1]}"
    return None


# What torch.compiler.assume_constant_result sets: the compiler cannot trace these questions.
_cannot_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def not_preferred(_op: str, *_args: Any) -> str | None:
    """Why "auto" passes the solver over although it can run."""
    return NOT_PREFERRED


class _Graph(NamedTuple):
    """A batch for the kernel: W = factor (eps + (1 - eps) B), or weights."""

    operand: torch.Tensor  # bits [b, ceil(n / 32), n] int32, or weights [b, n, n]
    kind: int
    tokens: torch.Tensor  # [b] int64
    eps: torch.Tensor  # [b] float64
    factor: torch.Tensor  # [b] float64
    degree: torch.Tensor  # [b, n] float64 of weights, 1 at padding; of bits empty


def _two_valued(
    words: torch.Tensor, tokens: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> _Graph:
    eps = torch.where(low == high, 0.0, low / high)
    return _Graph(words.contiguous(), 0, tokens, eps, high, high.new_empty(0))


def _weighted(affinity: torch.Tensor, tokens: torch.Tensor) -> _Graph:
    work = torch.float64 if affinity.dtype == torch.float64 else torch.float32
    weights = affinity.to(work)
    weights = weights.triu() + weights.triu(1).mT  # the upper triangle defines W
    degree = weights.sum(2, dtype=torch.float64)
    inside = torch.arange(weights.shape[1], device=weights.device) < tokens[:, None]
    one = torch.ones_like(tokens, dtype=torch.float64)
    return _Graph(
        weights.contiguous(),
        _KINDS[work],
        tokens,
        torch.zeros_like(one),
        one,
        torch.where(inside, degree, 1.0),
    )


def _pairs(graph: _Graph, k: int, tol: float, max_iter: int) -> Any:
    from foveate.ops.ncut.triton import Vectors

    b, n = graph.operand.shape[0], graph.operand.shape[2]
    like = graph.eps
    scratch = like.new_empty(b * _cuda.ncut_scratch(n, k))
    values, residual = like.new_empty(b, k), like.new_empty(b, k)
    vectors, gap = like.new_empty(b, k, n), like.new_empty(b)
    passes, uncertain = torch.empty_like(graph.tokens), torch.empty_like(graph.tokens)
    converged = like.new_empty(b, dtype=torch.bool)
    degenerate = torch.empty_like(converged)
    with torch.cuda.device_of(like):
        _cuda.ncut_lanczos(
            graph.operand.data_ptr(),
            graph.kind,
            graph.tokens.data_ptr(),
            graph.eps.data_ptr(),
            b,
            n,
            k,
            tol,
            min(max_iter, 1 << 30),
            scratch.data_ptr(),
            torch.cuda.current_stream(like.device).cuda_stream,
            values.data_ptr(),
            vectors.data_ptr(),
            residual.data_ptr(),
            gap.data_ptr(),
            passes.data_ptr(),
            converged.data_ptr(),
            degenerate.data_ptr(),
            uncertain.data_ptr(),
        )
    vectors = vectors / graph.factor.sqrt()[:, None, None]
    return Vectors(values, vectors, residual, gap, passes, converged, degenerate, uncertain)


def _run(launcher: str, *args: Any) -> Any:
    """The op of the Triton backend, with this solver in the place of its own."""
    from foveate.ops.ncut import triton

    solver = triton.Solver(_two_valued, _weighted, _pairs)
    return getattr(triton, launcher)(*args, solver=solver)


def ncut_fwd(*args: Any) -> Any:
    return _run("ncut_fwd", *args)


def ncut_affinity_fwd(*args: Any) -> Any:
    return _run("ncut_affinity_fwd", *args)


def maskcut_fwd(*args: Any) -> Any:
    return _run("maskcut_fwd", *args)


def tokencut_fwd(*args: Any) -> Any:
    return _run("tokencut_fwd", *args)
