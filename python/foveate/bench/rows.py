"""One benchmark row: the gate on its tensors, then memory, then times in turn with its peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from foveate._dispatch import missing_runtime
from foveate.bench import gpu, memory, timing
from foveate.bench.peers import REFERENCE, Peer, bind, differentiated, on_backend, peers_of
from foveate.bench.roofline import Ceilings
from foveate.bench.timing import Clock, Sampler, Samples
from foveate.testing import SPECS, Bench, Call, OpSpec, Verdict, evaluate, verdicts

EAGER = ", eager call"  # suffix of a CUDA row that times the whole call, not its kernels
HOST = ", host"  # the same until Python goes on
UNCAPTURED = ", not captured"  # kernels that a CUDA graph cannot hold: launches included


class Row(NamedTuple):
    """One measured row, whose fields are the keys of a JSON line; an INVALID one has no times."""

    family: str
    op: str
    case: str
    dtype: str
    device: str
    backend: str
    time_us: float | None  # median
    ratios: dict[str, float]  # peer -> how many times faster than the peer
    gb_per_s: float | None
    tflop_per_s: float | None
    roofline: float | None  # fraction of the measured ceiling
    peak_bytes: int | None
    error: float | None  # of the worst output, None if not finite
    budget: float
    verdict: str  # "ok" or "INVALID"
    samples_us: list[float]


class Notes(NamedTuple):
    """What a measurement has to say beside its rows."""

    skipped: str  # why the backend cannot run this here; "" if it can
    wrong: str  # why the row is INVALID; "" if it is not
    peers: dict[str, str]  # peer -> why it has no time


class Task(NamedTuple):
    """One row to measure."""

    spec: OpSpec
    bench: Bench
    backend: str


def device_of(backend: str) -> str:
    """The device whose tensors a backend takes; the reference is measured on the CPU."""
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def tasks(specs: tuple[OpSpec, ...], *, quick: bool, backend: str | None) -> list[Task]:
    """The rows of these ops: every backend of each, or its reference where it has no kernel."""
    found = []
    for spec in specs:
        names = (backend,) if backend else (spec.backends or ("reference",))
        for name in names:
            for bench in spec.bench:
                if (bench.quick or not quick) and device_of(name) in bench.devices:
                    found.append(Task(spec, bench, name))
    return found


def matching(glob: str, specs: tuple[OpSpec, ...] = SPECS) -> tuple[OpSpec, ...]:
    """The ops whose name or family matches the pattern."""
    return tuple(s for s in specs if fnmatchcase(s.name, glob) or fnmatchcase(s.family, glob))


def unavailable(task: Task) -> str | None:
    """Why the row cannot run here whatever its arguments; None if it may."""
    if task.backend != "reference" and task.backend not in task.spec.backends:
        return f"{task.spec.name} has no {task.backend} kernel"
    return missing_runtime(task.backend)


def judge(task: Task, call: Call) -> list[Verdict]:
    """The gate: verdicts on the very tensors that are timed, by the row's oracle or the spec's.

    Raises:
        NotImplementedError: the backend refuses these arguments; the message says why.
    """
    oracle = verdicts if task.bench.oracle is None else task.bench.oracle
    found = oracle(task.spec, call, task.backend)
    return found or [Verdict("outputs", 0.0, 0.0, "nothing was compared")]


def worst(found: list[Verdict]) -> Verdict:
    """The first that failed, else the one that used most of its budget."""
    failed = [verdict for verdict in found if not verdict.ok]
    return failed[0] if failed else max(found, key=lambda v: v.error / v.budget if v.budget else 0)


def _dtype(task: Task, call: Call) -> torch.dtype:
    """The row's dtype: of its floating input, else of its floating output, else of its input."""
    tensors = call.tensors()
    outputs = evaluate(task.spec.api, call.map(torch.Tensor.detach), task.backend).values()
    for tensor in (*tensors, *outputs):
        if tensor.is_floating_point():
            return tensor.dtype
    return tensors[0].dtype


def _samplers(
    subject: Callable[[Call], Callable[[], Any]],
    peers: list[Peer],
    sampler_of: Callable[[Callable[[Call], Callable[[], Any]]], Sampler],
    reasons: dict[str, str],
) -> dict[str, Sampler]:
    """Warmed-up samplers, the subject's first; a peer that fails leaves its reason."""
    found = {"": sampler_of(subject)}
    for peer in peers:
        try:
            found[peer.name] = sampler_of(peer.bind)
        # Peers are foreign code: whatever they raise is the reason that is printed.
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            reasons[peer.name] = f"{type(error).__name__}: {text}"[:200]
    return found


def _on_cuda(
    task: Task,
    call: Call,
    peers: list[Peer],
    seconds: float,
    reasons: dict[str, str],
) -> dict[str, dict[str, Samples]]:
    """Samples by suffix of the case: kernels, eager call and host time, each with its peers."""
    calls, grad = gpu.rotating_inputs(call), differentiated(call)
    suffix = ""

    def captured(of: Callable[[Call], Callable[[], Any]]) -> Sampler:
        return gpu.graph_sampler([of(c) for c in calls], grad=grad)

    def streamed(of: Callable[[Call], Callable[[], Any]]) -> Sampler:
        return gpu.stream_sampler([of(c) for c in calls], grad=grad)

    def subject(c: Call) -> Callable[[], Any]:
        return bind(on_backend(task.spec, task.backend), c)

    try:
        captured(subject)
        kernel_sampler = captured
    except RuntimeError as error:
        torch.cuda.synchronize()
        reasons["CUDA graph"] = str(error).strip().partition("\n")[0][:200]
        suffix, kernel_sampler = UNCAPTURED, streamed
    kernels = timing.interleave(
        _samplers(subject, peers, kernel_sampler, reasons), seconds=seconds / 2
    )

    hosts: dict[str, dict[int, float]] = {}

    def eager(name: str) -> Callable[[Callable[[Call], Callable[[], Any]]], Sampler]:
        def of(bound: Callable[[Call], Callable[[], Any]]) -> Sampler:
            run = bound(call)
            gpu.eager_times(run, grad=grad)

            def sample() -> float:
                measured = gpu.eager_times(run, grad=grad)
                mine = hosts.setdefault(name, {})
                mine[len(mine)] = measured.host
                return measured.call

            return sample

        return of

    samplers = {"": eager("")(subject)}
    for peer in peers:
        if peer.name in kernels:
            samplers[peer.name] = eager(peer.name)(peer.bind)
    calls_taken = timing.interleave(samplers, seconds=seconds / 2)
    return {
        suffix: kernels,
        EAGER: calls_taken,
        HOST: {"": Samples(hosts[""])},
    }


def measure(
    task: Task,
    ceilings: Ceilings | None,
    *,
    seconds: float,
    compile_too: bool,
    clock: Clock = time.perf_counter,
) -> tuple[list[Row], Notes]:
    """The rows of a task (three on a CUDA device), none if the backend cannot run it here."""
    spec, bench, backend = task
    reason = unavailable(task)
    if reason is not None or ceilings is None:
        return [], Notes(reason or "no ceilings of its device", "", {})
    device = device_of(backend)
    call = bench.make(device)
    grad = differentiated(call)
    try:
        with torch.set_grad_enabled(grad):
            verdict = worst(judge(task, call))
    except NotImplementedError as error:
        return [], Notes(str(error), "", {})
    # A kernel that raises on the timed tensors fails the gate, and the message says how.
    except Exception as error:
        verdict = Verdict("call", math.inf, 0.0, f"{type(error).__name__}: {error}")
    row = Row(
        family=spec.family,
        op=spec.name,
        case=bench.id,
        dtype="",
        device=device,
        backend=backend,
        time_us=None,
        ratios={},
        gb_per_s=None,
        tflop_per_s=None,
        roofline=None,
        peak_bytes=None,
        error=verdict.error if math.isfinite(verdict.error) else None,
        budget=verdict.budget,
        verdict="ok" if verdict.ok else "INVALID",
        samples_us=[],
    )
    if not verdict.ok:
        dtypes = [t.dtype for t in call.tensors() if t.is_floating_point()] or [torch.float32]
        name = str(dtypes[0]).removeprefix("torch.")
        return [row._replace(dtype=name)], Notes("", f"{verdict.name}: {verdict.wrong}", {})
    dtype = _dtype(task, call)
    run = bind(on_backend(spec, backend), call)
    with torch.set_grad_enabled(grad):
        run()
    row = row._replace(
        dtype=str(dtype).removeprefix("torch."),
        peak_bytes=memory.peak_bytes(run, device, grad=grad),
    )
    reasons: dict[str, str] = {}
    peers = peers_of(spec, bench, backend, compile_too=compile_too)
    if device == "cuda":
        sets = _on_cuda(task, call, peers, seconds, reasons)
    else:
        plain = [peer.bind for peer in peers if peer.name == REFERENCE]
        samplers = _samplers(
            lambda c: bind(on_backend(spec, backend), c),
            peers,
            lambda of: timing.wall_sampler(
                of(call), grad=grad, first_counts=of in plain, clock=clock
            ),
            reasons,
        )
        sets = {"": timing.interleave(samplers, seconds=seconds, clock=clock)}
    cost = spec.cost(call)
    rows = []
    for suffix, samples in sets.items():
        subject = samples.pop("")
        took = subject.median
        rows.append(
            row._replace(
                case=bench.id + suffix,
                time_us=1e6 * took,
                ratios={n: timing.times_faster(subject, s) for n, s in samples.items()},
                gb_per_s=cost.bytes / took / 1e9,
                tflop_per_s=cost.flops / took / 1e12,
                roofline=ceilings.seconds(cost, dtype) / took,
                samples_us=subject.us,
            )
        )
    return rows, Notes("", "", reasons)


def devices(found: list[Task]) -> Iterator[str]:
    """The devices that these rows need and that are here."""
    for device in ("cpu", "cuda"):
        if any(device_of(t.backend) == device and unavailable(t) is None for t in found):
            yield device
