"""Which backend runs, and what is said when one cannot."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import foveate
from foveate import _dispatch
from foveate._dispatch import BACKENDS, differentiable, load_backends, select

IDS = torch.arange(6)


def test_auto_takes_the_cpu_kernel_for_cpu_tensors():
    assert select("analog_bits", "bits_encode", "auto", "cpu") == "cpu"


def test_auto_takes_the_reference_on_devices_without_a_kernel():
    assert select("analog_bits", "bits_encode", "auto", "mps") == "reference"
    assert torch.equal(
        foveate.bits_encode(IDS, 3), foveate.bits_encode(IDS, 3, backend="reference")
    )


def test_auto_passes_over_a_backend_that_is_held_back(monkeypatch):
    module = load_backends("analog_bits")["cpu"]
    monkeypatch.setattr(module, "not_preferred", lambda *_: "no record yet", raising=False)
    assert select("analog_bits", "bits_encode", "auto", "cpu") == "reference"
    assert select("analog_bits", "bits_encode", "cpu", "cpu") == "cpu"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_named_backend_that_cannot_run_says_why(backend):
    with pytest.raises(NotImplementedError, match=f"backend='{backend}' cannot run this: .*cuda"):
        foveate.bits_encode(IDS, 3, backend=backend)


def test_a_named_backend_is_refused_with_its_own_reason(monkeypatch):
    module = load_backends("analog_bits")["cpu"]
    monkeypatch.setattr(module, "unsupported", lambda *_: "the moon is full")
    with pytest.raises(NotImplementedError, match="the moon is full"):
        foveate.bits_encode(IDS, 3, backend="cpu")


def test_an_unknown_backend_lists_the_names():
    with pytest.raises(ValueError, match="'auto', 'cuda', 'triton', 'cpu', 'reference', got 'tpu'"):
        foveate.bits_encode(IDS, 3, backend="tpu")


def test_every_backend_of_every_family_loads_or_says_why():
    for family in ("analog_bits",):
        for name, module in load_backends(family).items():
            assert name in BACKENDS
            if isinstance(module, str):
                assert module, f"{family}: {name} has no reason"
            elif name != "reference":
                assert callable(module.unsupported)


def test_numpy_arrays_come_back_as_numpy_arrays():
    ids = np.arange(6, dtype=np.int32)
    ids.flags.writeable = False
    bits = foveate.bits_encode(ids, 3)
    assert isinstance(bits, np.ndarray)
    assert bits.dtype == np.float32
    np.testing.assert_array_equal(foveate.bits_decode(bits[::-1]), ids[::-1])


def test_numpy_output_is_written_in_place():
    out = np.empty((6, 3), np.float32)
    assert foveate.bits_encode(np.arange(6), 3, out=out).base is not None
    np.testing.assert_array_equal(foveate.bits_decode(out), np.arange(6))


def test_tensors_and_arrays_are_not_mixed():
    with pytest.raises(TypeError, match="cannot be mixed: x is torch, out is numpy"):
        foveate.bits_encode(IDS, 3, out=np.empty((6, 3), np.float32))


class _Double(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


double = differentiable(_Double)


def test_a_differentiable_op_is_differentiated_in_eager_mode():
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(double(x).sum(), x)
    assert torch.equal(gradient, torch.full((3,), 2.0))
    with torch.no_grad():
        assert not double(x).requires_grad


def test_functorch_transforms_never_see_a_silent_zero():
    x = torch.ones(3)
    gradients = torch.func.vmap(torch.func.grad(lambda v: double(v).sum()))(x)
    assert torch.equal(gradients, torch.full((3,), 2.0))
    outer = torch.func.grad(lambda v: torch.func.vmap(double)(v).sum())(x)
    assert torch.equal(outer, torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(double, (x,), (x,))


def test_a_raw_op_is_visible_to_dispatch_modes():
    from generated import raw_calls

    calls = raw_calls(lambda: foveate.bits_encode(IDS, 3))
    assert [call[0].name() for call in calls] == ["foveate::bits_encode"]


def test_importing_changes_nothing_and_loads_neither_triton_nor_the_lazy_parts():
    # What torch's own import loads does not count.
    code = """
import sys, torch
before = set(sys.modules), torch.get_num_threads()
import foveate
late = {"triton", "foveate.bench", "foveate.testing", "foveate.methods", "foveate.nn", "timm"}
assert not late & (set(sys.modules) - before[0]), late & set(sys.modules)
assert torch.get_num_threads() == before[1]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_was_not_built_is_reported(monkeypatch):
    monkeypatch.setattr(_dispatch, "load_native", lambda name: f"{name} was not built")
    assert _dispatch.missing_runtime("cpu") == "_cpu was not built"


def test_unknown_attributes_are_named():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        foveate.nothing  # noqa: B018
    assert isinstance(foveate.testing, types.ModuleType)
