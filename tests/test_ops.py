"""Generated from the registry: every kernel against its reference."""

from __future__ import annotations

import pytest
import torch
from generated import a_case, device_of, raw_calls, spec_backends, spec_cases, strided, transposed

from foveate.testing import assert_ok, evaluate, verdicts


@pytest.mark.parametrize(
    ("spec", "backend", "isa", "case", "dtype"), list(spec_cases()), indirect=["isa"]
)
def test_outputs_and_gradients_stay_within_the_error_budget(spec, backend, isa, case, dtype):
    call = spec.make_inputs(case, dtype, device_of(backend), 0)
    assert_ok(verdicts(spec, call, backend))


@pytest.mark.parametrize("layout", [strided, transposed])
@pytest.mark.parametrize(("spec", "backend"), list(spec_backends()))
def test_any_strides_are_read_and_no_input_is_written(request, spec, backend, layout):
    emulated = request.config.getoption("--ttsem")
    for case in [a_case(spec)] if emulated else spec.cases.listed.values():
        call = layout(spec.make_inputs(case, spec.dtypes[0], device_of(backend), 1))
        before = [tensor.detach().clone() for tensor in call.tensors()]
        assert_ok(verdicts(spec, call, backend))
        for tensor, value in zip(call.tensors(), before, strict=True):
            if tensor.layout == torch.strided:
                torch.testing.assert_close(tensor.detach(), value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("spec", "backend"), list(spec_backends()))
def test_two_runs_give_the_same_bits(spec, backend):
    call = spec.make_inputs(a_case(spec), spec.dtypes[0], device_of(backend), 2)
    first, second = evaluate(spec.api, call, backend), evaluate(spec.api, call, backend)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("spec", "backend"), [p for p in spec_backends() if pytest.mark.cpu_op in p.marks]
)
def test_one_thread_stays_within_the_error_budget(spec, backend):
    for case in spec.cases.listed.values():
        call = spec.make_inputs(case, spec.dtypes[0], device_of(backend), 3)
        assert_ok(verdicts(spec, call, backend))


@pytest.mark.parametrize(("spec", "backend"), list(spec_backends(reference=True)))
def test_raw_ops_pass_opcheck(request, spec, backend):
    call = spec.make_inputs(a_case(spec), spec.dtypes[0], device_of(backend), 4)
    call = call.map(torch.Tensor.detach)
    calls = raw_calls(lambda: spec.api(*call.args, **call.kwargs, backend=backend))
    if not calls:
        assert backend == "reference", "the kernel was not reached through a raw op"
        return  # the reference of a differentiable op is plain autograd, no raw op
    emulated = request.config.getoption("--ttsem")
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for op, args, kwargs in calls:
        torch.library.opcheck(
            op,
            args,
            kwargs,
            test_utils=tests if emulated else [*tests, "test_aot_dispatch_dynamic"],
        )


@pytest.mark.parametrize(
    ("spec", "backend"),
    [p for p in spec_backends() if pytest.mark.gpu not in p.marks],
)
def test_fullgraph_compile_equals_eager(spec, backend):
    call = spec.make_inputs(a_case(spec), spec.dtypes[0], device_of(backend), 5)
    torch._dynamo.reset()
    compiled = torch.compile(spec.api, backend="aot_eager", fullgraph=True)
    eager, traced = evaluate(spec.api, call, backend), evaluate(compiled, call, backend)
    assert eager.keys() == traced.keys()
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, rtol=0, atol=0, equal_nan=True)
