"""Generated from the registry: random sizes and values, gradients of the reference, bad inputs."""

from __future__ import annotations

import re

import pytest
import torch
from generated import device_of, marks, spec_backends, strided, transposed
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.testing import SPECS, assert_ok, evaluate, verdicts

_LAYOUTS = (lambda call: call, strided, transposed)
_SPECIAL = (float("nan"), float("inf"), float("-inf"), 1e30, 1e-30, 1e-42, 0.0, -0.0)


def _planted(call, integers):
    """The call with a few special values written into its floating tensors."""

    def plant(tensor):
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.layout != torch.strided:
            return tensor
        values = tensor.detach().clone().flatten()
        for _ in range(integers(0, 2)):
            values[integers(0, tensor.numel() - 1)] = _SPECIAL[integers(0, len(_SPECIAL) - 1)]
        return values.view(tensor.shape).requires_grad_(tensor.requires_grad)

    return call.map(plant)


@pytest.mark.parametrize(("spec", "backend"), list(spec_backends()))
def test_random_sizes_layouts_and_values_give_the_references_answer(request, spec, backend):
    emulated = request.config.getoption("--ttsem")

    @settings(settings.get_profile("emulated") if emulated else settings.default)
    @given(st.data())
    def run(data):
        def integers(low, high):
            return data.draw(st.integers(low, high))

        case = spec.cases.draw(integers)
        dtype = spec.dtypes[integers(0, len(spec.dtypes) - 1)]
        call = spec.make_inputs(case, dtype, device_of(backend), integers(0, 99))
        if integers(0, 1):
            call = _planted(call, integers)
        call = _LAYOUTS[integers(0, 2)](call)
        try:
            evaluate(spec.api, call, "reference")
        except ValueError as error:  # a planted value breaks the contract: the kernel says the same
            with pytest.raises(ValueError, match=re.escape(str(error))):
                evaluate(spec.api, call, backend)
            return
        assert_ok(verdicts(spec, call, backend))

    run()


def test_the_profile_named_on_the_command_line_is_the_one_that_runs(request):
    name = request.config.getoption("--hypothesis-profile") or "ci"
    assert settings.default.max_examples == settings.get_profile(name).max_examples


def _differentiable():
    for spec in SPECS:
        call = spec.make_inputs(next(iter(spec.cases.listed.values())), torch.float64, "cpu", 0)
        if any(tensor.requires_grad for tensor in call.tensors()):
            yield pytest.param(spec, id=spec.name)


@pytest.mark.parametrize("spec", list(_differentiable()))
def test_the_reference_has_the_gradient_of_its_values(spec):
    for name, case in spec.cases.listed.items():
        call = spec.make_inputs(case, torch.float64, "cpu", 0)
        leaves = [tensor for tensor in call.tensors() if tensor.requires_grad]
        if not 0 < sum(leaf.numel() for leaf in leaves) <= 200:
            continue

        def function(*values, call=call):
            given = list(values)
            fresh = call.map(lambda t, g=given: g.pop(0) if t.requires_grad else t)
            outputs = spec.api(*fresh.args, **fresh.kwargs, backend="reference")
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(
                value
                for value in outputs
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            )

        assert torch.autograd.gradcheck(function, leaves), name


def _bad_inputs():
    for spec in SPECS:
        for backend in (*[b for b in spec.backends if device_of(b) == "cpu"], "reference"):
            for bad in spec.bad_inputs:
                yield pytest.param(
                    spec, backend, bad, id=f"{spec.name}-{backend}-{bad.id}", marks=marks(backend)
                )


@pytest.mark.parametrize(("spec", "backend", "bad"), list(_bad_inputs()))
def test_bad_input_raises_the_stated_error(spec, backend, bad):
    call = bad.call()
    kwargs = {"backend": backend, **call.kwargs}
    with pytest.raises(bad.error, match=bad.match) as caught:
        spec.api(*call.args, **kwargs)
    assert type(caught.value) is bad.error
