"""The machinery that judges kernels sees what is planted: wrong results, dropped masks, races."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import pytest
import torch
from generated import a_case, device_of

from foveate import _dispatch
from foveate.bench import rows
from foveate.testing import SPECS, OpSpec, assert_ok, evaluate, verdicts

CPU_SPECS = [
    pytest.param(spec, id=spec.name, marks=pytest.mark.cpu_op)
    for spec in SPECS
    if "cpu" in spec.backends
]


def spoiled(value):
    """The value with the sign of the largest element of each floating tensor turned round, and an
    integer or a bool of each other tensor off by one."""
    if isinstance(value, torch.Tensor):
        wrong = value.detach().clone()
        if wrong.numel() == 0:
            return value
        flat = wrong.reshape(-1)
        if wrong.is_floating_point():
            index = flat.nan_to_num(0.0).abs().argmax()
            flat[index] = torch.where(flat[index] == 0, torch.ones_like(flat[index]), -flat[index])
        elif wrong.dtype == torch.bool:
            flat[0] = ~flat[0]
        else:
            flat[0] ^= 1
        return flat.reshape(value.shape)
    if isinstance(value, tuple):
        items = [spoiled(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [spoiled(item) for item in value]
    return value


def spoiled_launcher(launcher, called=None):
    """The launcher with its results spoiled; its name is added to the list `called`."""

    @functools.wraps(launcher)
    def wrong(*args, **kwargs):
        if called is not None:
            called.append(launcher.__name__)
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        before = [tensor.clone() for tensor in given]
        result = launcher(*args, **kwargs)
        for tensor, value in zip(given, before, strict=True):
            if not torch.equal(tensor.nan_to_num(7.0), value.nan_to_num(7.0)):
                tensor.copy_(spoiled(tensor))  # it was given as out
        return result if any(result is tensor for tensor in given) else spoiled(result)

    return wrong


@pytest.mark.parametrize("spec", CPU_SPECS)
def test_a_wrong_sign_in_the_result_of_any_kernel_fails(spec, monkeypatch):
    module = _dispatch.load_backend(spec.family, "cpu")
    assert isinstance(module, ModuleType)
    called = []
    for name in _dispatch.OPS[spec.family]:
        if hasattr(module, name):
            launcher = spoiled_launcher(getattr(module, name), called)
            monkeypatch.setattr(module, name, launcher)
    call = spec.make_inputs(a_case(spec), spec.dtypes[0], device_of("cpu"), 0)
    with pytest.raises(AssertionError):
        assert_ok(verdicts(spec, call, "cpu"))
    assert called, "no launcher of the family ran"


def _with_wrong_reference(spec: OpSpec) -> OpSpec:
    def api(*args, backend="auto", **kwargs):
        result = spec.api(*args, backend=backend, **kwargs)
        return spoiled(result) if backend == "reference" else result

    api.__module__ = spec.api.__module__
    return dataclasses.replace(spec, api=api)


@pytest.mark.parametrize("spec", CPU_SPECS)
def test_a_corrupted_reference_fails(spec):
    call = spec.make_inputs(a_case(spec), spec.dtypes[0], device_of("cpu"), 0)
    call = call.map(torch.Tensor.detach)
    assert_ok(verdicts(spec, call, "cpu"))
    with pytest.raises(AssertionError):
        assert_ok(verdicts(_with_wrong_reference(spec), call, "cpu"))


def test_a_wrong_gradient_fails():
    spec = next(spec for spec in SPECS if spec.name == "bits_loss")
    call = spec.make_inputs(a_case(spec), torch.float32, "cpu", 0)
    assert any("grad" in name for name in evaluate(spec.api, call, "cpu"))
    assert_ok(verdicts(spec, call, "cpu"))

    class Negated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return -upstream

    def api(*args, backend="auto", **kwargs):
        result = spec.api(*args, backend=backend, **kwargs)
        return Negated.apply(result) if backend == "cpu" else result

    api.__module__ = spec.api.__module__
    failed = [v for v in verdicts(dataclasses.replace(spec, api=api), call, "cpu") if not v.ok]
    assert failed
    assert all(verdict.name.startswith("grad") for verdict in failed)


def test_the_benchmark_refuses_a_wrong_kernel(monkeypatch):
    spec = next(spec for spec in SPECS if spec.name == "bits_decode")
    module = _dispatch.load_backend(spec.family, "cpu")
    monkeypatch.setattr(module, "bits_decode", spoiled_launcher(module.bits_decode))
    call = spec.make_inputs(a_case(spec), spec.dtypes[0], "cpu", 0)
    bench = spec.bench[0]._replace(make=lambda _: call, peers={})
    (row,), notes = rows.measure(
        rows.Task(spec, bench, "cpu"), object(), seconds=0.01, compile_too=False
    )
    assert (row.verdict, row.time_us, row.samples_us) == ("INVALID", None, [])
    assert notes.wrong


@pytest.mark.gpu
@pytest.mark.emulated
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("without_a_mask_kernel", "28 element.* past the end of the tensor passed as `y`"),
        ("racing_kernel", "program instances .* both touch element 0 of `y`"),
    ],
)
def test_a_dropped_mask_and_a_race_are_faults_of_an_emulated_launch(kernel, fault):
    import planted_kernels
    from ttsem.sanitize import KernelFault

    x = torch.arange(100.0, device="cuda")
    with pytest.raises(KernelFault, match=fault):
        getattr(planted_kernels, kernel)[(4,)](x, torch.empty_like(x), 100, BLOCK=32)


@pytest.mark.gpu
@pytest.mark.emulated
def test_an_element_that_no_launch_writes_is_nan():
    import planted_kernels

    x = torch.arange(100.0, device="cuda")
    y = torch.empty_like(x)
    planted_kernels.stopping_short_kernel[(4,)](x, y, 100, BLOCK=32)
    assert torch.equal(y[:-1], x[:-1])
    assert bool(y[-1].isnan())
