"""Ceilings measured in the same run: what a copy and a matrix product reach on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from foveate.testing import Cost


class Ceilings(NamedTuple):
    """The best of several runs; a copy counts each byte twice, read and written."""

    copy_gb_per_s: float
    fp32_tflop_per_s: float
    bf16_tflop_per_s: float | None  # measured on CUDA devices

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """The time that neither traffic nor arithmetic can beat."""
        rate = self.fp32_tflop_per_s
        if dtype.itemsize == 2 and self.bf16_tflop_per_s is not None:
            rate = self.bf16_tflop_per_s
        return max(cost.bytes / (1e9 * self.copy_gb_per_s), cost.flops / (1e12 * rate))


def _best(run: Callable[[], Any], device: str, repeats: int) -> float:
    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _gemm_rate(size: int, dtype: torch.dtype, device: str) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        seconds = _best(lambda: torch.mm(a, a, out=out), device, 6)
    finally:
        torch.set_float32_matmul_precision(precision)
    return 2 * size**3 / seconds / 1e12


def _copy_bandwidth(device: str, size: int) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, 10) / 1e9


def measure(device: str) -> Ceilings:
    """Copy bandwidth and GEMM rates of the device, in under two seconds."""
    on_cuda = device == "cuda"
    size = 8192 if on_cuda else 1536
    return Ceilings(
        _copy_bandwidth(device, 1 << (30 if on_cuda else 27)),
        _gemm_rate(size, torch.float32, device),
        _gemm_rate(size, torch.bfloat16, device) if on_cuda else None,
    )
