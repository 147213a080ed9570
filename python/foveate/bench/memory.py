"""Peak memory of one call above what stood before it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from typing import Any

import torch

_SLACK = 4 << 20  # bytes by which resident memory is unsure: page batches per thread, huge pages


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) << 10


def _resident_rise(run: Callable[[], Any]) -> int | None:
    """Bytes of memory touched at the peak; None where the kernel keeps no resettable peak."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # memory that the allocator holds back would be reused unseen
        trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")  # resets VmHWM, see proc_pid_clear_refs(5)
    before = _status("VmRSS:")
    result = run()
    peak = _status("VmHWM:")
    del result
    return max(peak - before, 0)


def _allocated_peak(run: Callable[[], Any]) -> int:
    """The highest sum of live bytes among the tensors that the call allocated."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it logs each start and stop to stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    del result
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_bytes(run: Callable[[], Any], device: str, *, grad: bool = False) -> int:
    """Bytes above the start at the call's peak, the result included.

    CUDA: what torch's allocator reports. CPU: tensors as torch's allocator counts them (exact),
    or the rise of the resident peak where that is clearly larger: a kernel's own scratch memory,
    NumPy and SciPy are seen only there. `run` has been called before, so that caches are warm.
    """
    with torch.set_grad_enabled(grad):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            del result
            return peak - before
        allocated = _allocated_peak(run)
        resident = _resident_rise(run)
    return allocated if resident is None or resident <= allocated + _SLACK else resident
