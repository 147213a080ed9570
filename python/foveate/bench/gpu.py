"""Two times on a CUDA device: the kernels alone, replayed as a graph, and an eager call.

The graph holds one call on each of several copies of the inputs, together larger than the L2
cache, so that every call reads its inputs from memory as the first call on fresh data would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from foveate.bench.timing import Clock, Sampler
from foveate.testing import Call

_MOST_COPIES = 64
_WARM_UP = 3  # calls on a side stream before a capture, as CUDA graphs need
_SHORTEST = 1e-3  # seconds of a sample: shorter graphs are replayed several times


class EagerTimes(NamedTuple):
    """One eager call: until its result is there, and until Python goes on."""

    call: float
    host: float


def rotation(call: Call, *, cache_bytes: int, free_bytes: int) -> list[Call]:
    """The call and copies of it on other memory: twice the cache together, if memory allows."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in call.tensors())
    wanted = math.ceil(2 * cache_bytes / max(size, 1)) + 1
    fits = int(free_bytes / 4 / max(size, 1))
    copies = max(1, min(wanted, fits, _MOST_COPIES))

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return [call, *(call.map(copy) for _ in range(copies - 1))]


def rotating_inputs(call: Call) -> list[Call]:
    """`rotation` with the L2 cache and the free memory of the current device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, _ = torch.cuda.mem_get_info()
    return rotation(call, cache_bytes=properties.L2_cache_size, free_bytes=free)


def graph_sampler(runs: list[Callable[[], Any]], *, grad: bool, cuda: Any = torch.cuda) -> Sampler:
    """Seconds a call of the kernels of `runs`, captured one after the other into one graph.

    Raises:
        RuntimeError: a call cannot be captured, e.g. because it synchronises.
    """
    with torch.set_grad_enabled(grad):
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(_WARM_UP):
                runs[0]()
            for run in runs[1:]:
                run()
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            # Outputs live side by side: memory that the next call reused would stay in the cache.
            results = [run() for run in runs]
    return _event_sampler(graph.replay, len(runs), keep=results, cuda=cuda)


def stream_sampler(runs: list[Callable[[], Any]], *, grad: bool, cuda: Any = torch.cuda) -> Sampler:
    """Seconds a call between events on the stream, for calls that cannot be captured: launches
    and synchronisations included."""

    def once() -> None:
        with torch.set_grad_enabled(grad):
            for run in runs:
                run()

    once()
    return _event_sampler(once, len(runs), keep=None, cuda=cuda)


def _event_sampler(once: Callable[[], Any], calls: int, *, keep: Any, cuda: Any) -> Sampler:
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def measure(repeats: int) -> float:
        begin.record()
        for _ in range(repeats):
            once()
        end.record()
        end.synchronize()
        seconds: float = begin.elapsed_time(end) / 1e3
        return seconds / repeats

    measure(1)
    graph_seconds = measure(1)
    repeats = max(1, min(1000, round(_SHORTEST / max(graph_seconds, 1e-9))))

    def sample() -> float:
        # What the graph writes is owned by the closure, so that its memory outlives the replays.
        _ = keep
        return measure(repeats) / calls

    return sample


def eager_times(
    run: Callable[[], Any],
    *,
    grad: bool,
    cuda: Any = torch.cuda,
    clock: Clock = time.perf_counter,
) -> EagerTimes:
    """One call from an idle device: until the device is done, and until the call returned."""
    with torch.set_grad_enabled(grad):
        cuda.synchronize()
        start = clock()
        result = run()
        returned = clock()
        cuda.synchronize()
        done = clock()
    del result
    return EagerTimes(done - start, returned - start)
