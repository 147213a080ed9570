"""The benchmark suite judges before it times, and says what it measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch

import foveate.testing
from foveate.bench import command, memory, rows
from foveate.bench.peers import bind, peers_of
from foveate.bench.roofline import Ceilings
from foveate.bench.timing import Samples, interleave, times_faster, wall_sampler
from foveate.cli import main
from foveate.testing import Bench, Call, Cases, Cost, OpSpec, Verdict

KEYS = [
    "family", "op", "case", "dtype", "device", "backend", "time_us", "ratios", "gb_per_s",
    "tflop_per_s", "roofline", "peak_bytes", "error", "budget", "verdict", "samples_us",
]  # fmt: skip
CEILINGS = Ceilings(10.0, 0.1, None)


class FakeClock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float):
        """A call that takes these times in turn, the last one ever after."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def double(x, *, backend="auto"):
    """Twice x."""
    return x * 2 if backend == "reference" else x + x


double.__module__ = "foveate.ops.analog_bits.api"  # where OpSpec reads the family


def wrong_double(x, *, backend="auto"):
    """Twice x, but for its last element."""
    y = x * 2
    if backend != "reference":
        y[-1] += 0.5
    return y


wrong_double.__module__ = double.__module__


def toy(api=double, *, peers=None, grad=False, oracle=None, quick=True) -> OpSpec:
    def make(device: str) -> Call:
        return Call((torch.arange(1.0, 4097.0, device=device).requires_grad_(grad),))

    return OpSpec(
        name="double",
        api=api,
        backends=("cpu",),
        dtypes=(torch.float32,),
        make_inputs=lambda case, dtype, device, seed: make(device),
        cases=Cases({"one": {}}, lambda integers: {}),
        bench=(Bench("4096", make, peers or {}, quick, oracle=oracle), Bench("large", make, {})),
        cost=lambda call: Cost(4096, 2 * 4 * 4096),
        bad_inputs=(),
    )


@pytest.fixture
def registry(monkeypatch):
    """Replaces the registry by one op, and the ceilings by fixed ones."""

    def use(spec: OpSpec) -> None:
        monkeypatch.setattr(foveate.testing, "SPECS", (spec,))
        monkeypatch.setattr(rows, "SPECS", (spec,))
        monkeypatch.setattr(rows.matching, "__defaults__", ((spec,),))
        monkeypatch.setattr(command, "_ceilings", lambda found: {"cpu": CEILINGS})
        monkeypatch.setattr(command, "_QUICK_SECONDS", 0.02)

    return use


def measured(spec: OpSpec, **options):
    task = rows.tasks((spec,), quick=True, backend=None)[0]
    return rows.measure(task, CEILINGS, seconds=0.02, compile_too=False, **options)


# Timing


def test_a_ratio_is_the_median_of_pairs_of_one_round():
    subject = Samples({0: 1.0, 1: 10.0, 2: 1.0, 3: 1.0})
    peer = Samples({0: 2.0, 1: 20.0, 3: 9.0})
    assert times_faster(subject, peer) == 2.0  # 2, 2, 9; the medians alone would give 9


def test_samples_are_taken_in_turn_in_rotating_order():
    clock, order = FakeClock(), []

    def sampler(name: str):
        def sample() -> float:
            order.append(name)
            clock.now += 1.0
            return 1.0

        return sample

    found = interleave({"": sampler("a"), "b": sampler("b")}, seconds=8, clock=clock)
    assert "".join(order) == "ab" + "abbaabba"  # the first pair measures what a sample costs
    assert set(found[""].by_round) == set(found["b"].by_round) == {0, 1, 2, 3}


def test_a_slow_peer_takes_part_in_fewer_rounds_that_the_subject_has_too():
    clock = FakeClock()

    def sampler(seconds: float):
        def sample() -> float:
            clock.now += seconds
            return seconds

        return sample

    samplers = {"": sampler(0.1), "slow": sampler(1.0), "very slow": sampler(100.0)}
    found = interleave(samplers, seconds=12, least=3, clock=clock)
    assert set(found[""].by_round) == {-1, *range(40)}  # -1 told what a sample costs
    assert len(found["slow"].by_round) == 4
    assert set(found["very slow"].by_round) == {-1}
    for name, ratio in (("slow", 10.0), ("very slow", 1000.0)):
        assert found[name].by_round.keys() <= found[""].by_round.keys()
        assert times_faster(found[""], found[name]) == pytest.approx(ratio)


def test_a_sampler_warms_up_and_repeats_short_calls():
    clock = FakeClock()
    run = clock.takes(5.0, 20e-6)  # the first call compiles
    sample = wall_sampler(run, clock=clock)
    before = clock.now
    assert sample() == pytest.approx(20e-6)
    assert clock.now - before == pytest.approx(200e-6)


def test_a_long_warm_up_is_the_first_sample_of_what_compiles_nothing():
    clock = FakeClock()
    sample = wall_sampler(clock.takes(5.0, 7.0), first_counts=True, clock=clock)
    assert (clock.now, sample()) == (5.0, 5.0)
    assert sample() == 7.0
    clock = FakeClock()
    slow = wall_sampler(clock.takes(50.0), first_counts=True, clock=clock)
    samplers = {"": wall_sampler(clock.takes(0.1), clock=clock), "slow": slow}
    found = interleave(samplers, seconds=2, clock=clock)
    assert found["slow"].by_round == {-1: 50.0}  # called once in all
    assert clock.now < 52


def test_the_result_is_dropped_after_the_clock_has_stopped():
    events = []

    class Result:
        def __del__(self) -> None:
            events.append("dropped")

    ticks = iter(range(100))

    def clock() -> float:
        events.append("clock")
        return float(next(ticks))

    sample = wall_sampler(Result, clock=clock)
    events.clear()
    sample()
    assert events == ["clock", "clock", "dropped"]


# The gate


def test_a_right_kernel_is_timed_against_every_peer():
    spec = toy(peers={"twice": lambda x: 2 * x})
    (row,), notes = measured(spec)
    assert notes == rows.Notes("", "", {})
    assert list(row._asdict()) == KEYS
    assert row.verdict == "ok"
    assert row.dtype == "float32"
    assert set(row.ratios) == {"reference", "twice"}
    assert row.time_us > 0
    assert min(row.samples_us) <= row.time_us <= max(row.samples_us)
    assert row.gb_per_s == pytest.approx(32768 / row.time_us / 1e3)
    assert row.roofline == pytest.approx(32768 / 10e9 / (row.time_us * 1e-6))
    assert row.peak_bytes == 4 * 4096


def test_a_wrong_kernel_is_invalid_and_has_no_time():
    (row,), notes = measured(toy(wrong_double))
    assert row.verdict == "INVALID"
    assert row.error == 0.5
    assert row.error > row.budget
    assert (row.time_us, row.gb_per_s, row.roofline, row.samples_us) == (None, None, None, [])
    assert row.ratios == {}
    assert "over budget" in notes.wrong


def test_a_kernel_that_raises_is_invalid():
    def broken(x, *, backend="auto"):
        if backend == "cpu":
            raise RuntimeError("bus error")
        return x * 2

    broken.__module__ = double.__module__
    (row,), notes = measured(toy(broken))
    assert (row.verdict, row.error, row.time_us) == ("INVALID", None, None)
    assert "RuntimeError: bus error" in notes.wrong


def test_a_row_may_bring_its_own_oracle():
    def oracle(spec, call, backend):
        return [Verdict("sum", 3.0, 2.0, "over budget")]

    (row,), _ = measured(toy(oracle=oracle))
    assert (row.verdict, row.error, row.budget) == ("INVALID", 3.0, 2.0)


def test_an_oracle_that_compares_nothing_is_invalid():
    (row,), notes = measured(toy(oracle=lambda spec, call, backend: []))
    assert row.verdict == "INVALID"
    assert "nothing was compared" in notes.wrong


@pytest.mark.parametrize(("api", "verdict"), [(double, "ok"), (wrong_double, "INVALID")])
def test_the_oracle_on_a_part_judges_the_whole_call(api, verdict):
    def part(call):
        return Call((call.args[0][-7:],))

    oracle = foveate.testing.on_part(part, lambda name, value: value[-7:])
    (row,), _ = measured(toy(api, oracle=oracle))
    assert row.verdict == verdict


def test_an_error_outside_the_part_alone_is_seen_by_a_part_that_covers_it():
    # The part is right as a call of its own; only the whole call goes wrong there.
    def wrong_when_large(x, *, backend="auto"):
        y = x * 2
        if backend == "cpu" and x.numel() > 100:
            y[0] = 0
        return y

    wrong_when_large.__module__ = double.__module__
    oracle = foveate.testing.on_part(
        lambda call: Call((call.args[0][:5],)), lambda name, value: value[:5]
    )
    (row,), notes = measured(toy(wrong_when_large, oracle=oracle))
    assert row.verdict == "INVALID"
    assert "whole out" in notes.wrong


def test_the_float32_oracle_refuses_float32_calls():
    (row,), notes = measured(toy(oracle=foveate.testing.in_float32))
    assert row.verdict == "INVALID"
    assert "half-precision" in notes.wrong


@pytest.mark.parametrize(("api", "ok"), [(double, True), (wrong_double, False)])
def test_the_float32_oracle_judges_half_precision(api, ok):
    spec = toy(api)
    call = Call((torch.linspace(-1, 1, 64, dtype=torch.bfloat16),))
    found = foveate.testing.in_float32(spec, call, "cpu")
    assert all(verdict.ok for verdict in found) == ok


def test_a_peer_that_fails_prints_its_reason_and_the_row_stands():
    def failing(x):
        raise ImportError("no module named cupy")

    (row,), notes = measured(toy(peers={"cupy": failing}))
    assert row.verdict == "ok"
    assert set(row.ratios) == {"reference"}
    assert notes.peers == {"cupy": "ImportError: no module named cupy"}


def test_a_call_with_gradients_is_timed_forward_and_backward():
    spec = toy(grad=True)
    call = spec.bench[0].make("cpu")
    outputs, (gradient,) = bind(spec.api, call)()
    assert outputs[0].shape == (4096,)
    assert gradient.abs().sum() > 0
    assert call.args[0].grad is None
    (row,), _ = measured(spec)
    assert row.verdict == "ok"


def test_a_peer_that_loses_the_gradient_has_no_time():
    (row,), notes = measured(toy(grad=True, peers={"detached": lambda x: 2 * x.detach()}))
    assert row.verdict == "ok"
    assert "no output requires grad" in notes.peers["detached"]


def test_the_compiled_reference_of_an_opaque_op_is_its_function(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    spec = next(s for s in foveate.testing.SPECS if s.name == "bits_encode")
    call = Call((torch.arange(16).view(8, 2), (4, 4)), {"scale": 0.5})
    (peer,) = [
        p for p in peers_of(spec, spec.bench[0], "cpu", compile_too=True) if "comp" in p.name
    ]
    run = peer.bind(call)
    assert "foveate.ops.analog_bits.reference" in run.func.__module__
    assert torch.equal(run(), spec.api(*call.args, **call.kwargs, backend="cpu"))


def test_a_backend_that_refuses_the_arguments_is_skipped_with_its_reason():
    def picky(x, *, backend="auto"):
        if backend == "cpu":
            raise NotImplementedError("double: backend='cpu' cannot run this: it rains")
        return x * 2

    picky.__module__ = double.__module__
    found, notes = measured(toy(picky))
    assert found == []
    assert "it rains" in notes.skipped


# Memory and ceilings


def test_peak_memory_counts_temporaries_of_torch_and_of_others():
    import numpy as np

    x = torch.ones(1 << 20)
    assert 0 <= memory.peak_bytes(lambda: (x + 1) + 1, "cpu") - (8 << 20) < 64  # scalars
    numpy_peak = memory.peak_bytes(lambda: np.ones(4 << 20).sum(), "cpu")
    assert 31 << 20 <= numpy_peak <= 40 << 20


def test_no_time_beats_the_larger_of_traffic_and_arithmetic():
    ceilings = Ceilings(10.0, 0.1, 1.0)
    assert ceilings.seconds(Cost(0, 1e9), torch.float32) == pytest.approx(0.1)
    assert ceilings.seconds(Cost(1e12, 1e9), torch.float32) == pytest.approx(10)
    assert ceilings.seconds(Cost(1e12, 1e9), torch.bfloat16) == pytest.approx(1)


# The command


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_begins_with_the_environment_and_has_the_stated_keys(registry, tmp_path, capsys):
    registry(toy())
    path = tmp_path / "rows.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    environment, row = lines_of(path)
    assert environment["record"] == "environment"
    for key in ("device", "torch", "triton", "python", "foveate", "commit", "cpu", "isa",
                "threads", "ceilings", "date", "sources"):  # fmt: skip
        assert key in environment
    assert list(row) == KEYS
    assert row["samples_us"]
    assert all(isinstance(sample, float) for sample in row["samples_us"])
    assert "double" in capsys.readouterr().out


def test_a_planted_bug_exits_1_and_prints_invalid_without_a_time(registry, tmp_path, capsys):
    registry(toy(wrong_double))
    path = tmp_path / "rows.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 1
    _, row = lines_of(path)
    assert (row["verdict"], row["time_us"], row["samples_us"]) == ("INVALID", None, [])
    out = capsys.readouterr().out
    assert "INVALID" in out
    assert not re.search(r"\d (us|ms|s)\b", out)


def test_an_error_that_is_not_finite_is_still_json(registry, tmp_path):
    def nan(x, *, backend="auto"):
        return x * 2 if backend == "reference" else x * math.nan

    nan.__module__ = double.__module__
    registry(toy(nan))
    path = tmp_path / "rows.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 1
    assert lines_of(path)[1]["error"] is None


def test_quick_takes_the_quick_rows_alone():
    spec = toy()
    assert [t.bench.id for t in rows.tasks((spec,), quick=True, backend=None)] == ["4096"]
    everything = rows.tasks((spec,), quick=False, backend=None)
    assert [t.bench.id for t in everything] == ["4096", "large"]


def test_a_row_is_not_run_on_a_device_for_which_it_is_not_meant():
    spec = toy()
    gpu_only = dataclasses.replace(spec, bench=(spec.bench[0]._replace(devices=("cuda",)),))
    assert rows.tasks((gpu_only,), quick=True, backend=None) == []


def test_a_glob_matches_the_op_or_its_family():
    assert {s.name for s in rows.matching("bits_[de]*code")} == {"bits_encode", "bits_decode"}
    assert {s.family for s in rows.matching("analog_*")} == {"analog_bits"}
    assert rows.matching("*") == foveate.testing.SPECS
    assert rows.matching("code") == ()


def test_a_glob_that_matches_nothing_exits_2_with_the_names(capsys):
    assert main(["bench", "--ops", "sinkhorn*"]) == 2
    message = capsys.readouterr().err
    assert "nothing matches 'sinkhorn*'" in message
    assert "bits_encode" in message
    assert "analog_bits" in message


@pytest.mark.parametrize(
    "flags", [["--backend", "tpu"], ["--fast"], ["--json", "/no/such/place/x.json"], ["--ops"]]
)
def test_bad_flags_exit_2(flags, capsys):
    assert main(["bench", *flags]) == 2
    assert capsys.readouterr().err


def test_a_backend_that_cannot_run_is_skipped_in_sight_and_nothing_run_exits_1(
    registry, capsys, monkeypatch
):
    registry(toy())
    monkeypatch.setattr(rows, "missing_runtime", lambda backend: "the cable is out")
    assert main(["bench", "--quick"]) == 1
    captured = capsys.readouterr()
    assert "skipped [cpu]: the cable is out: double, 4096" in captured.out
    assert "nothing ran" in captured.err


def test_a_backend_without_a_kernel_for_the_op_says_so(registry, capsys):
    registry(toy())
    assert main(["bench", "--quick", "--backend", "cuda"]) == 1
    assert "double has no cuda kernel" in capsys.readouterr().out


def test_the_page_is_self_contained(registry, tmp_path):
    registry(toy(peers={"a <b> peer": lambda x: 2 * x}))
    assert main(["bench", "--quick", "--html", str(tmp_path / "page")]) == 0
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "a &lt;b&gt; peer" in page
    outside = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert outside <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}, outside
    assert not re.search(r"(src|href)=\"(?!#)", page)
