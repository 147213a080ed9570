"""Attention on the CPU: sizes of real models, what is kept, what memory is taken."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.ops.topdown_attention.cpu import topdown_attention_fwd
from foveate.testing import OpSpec, assert_ok, verdicts
from foveate.testing.specs.topdown_attention import SPECS


def the_spec(name: str) -> OpSpec:
    (found,) = (spec for spec in SPECS if spec.name == name)
    return found


@pytest.mark.parametrize("d", [8, 13, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("n", [2, 50, 64, 196])
def test_every_head_width_at_the_sizes_of_models(n, d):
    spec = the_spec("topdown_sdpa")
    call = spec.make_inputs({"b": 1, "h": 1, "n": n, "d": d}, torch.float32, "cpu", n + d)
    assert_ok(verdicts(spec, call, "cpu"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [577, 1025, 3000])
def test_long_sequences_in_several_blocks(n, causal):
    spec = the_spec("topdown_sdpa")
    case = {"b": 1, "h": 1, "n": n, "d": 16, "causal": causal}
    assert_ok(verdicts(spec, spec.make_inputs(case, torch.float32, "cpu", n), "cpu"))


@pytest.mark.parametrize("size", [{"b": 3, "n": 700}, {"b": 1, "n": 2500}, {"b": 23, "n": 100}])
@pytest.mark.parametrize("queries", [None, 5])
def test_inference_in_chunks_gives_what_the_record_gives(size, queries):
    spec = the_spec("topdown_attention")
    case = {**size, "c": 24, "h": 5, "d": 8, "num_queries": queries}
    call = spec.make_inputs(case, torch.float32, "cpu", 0)
    kept = foveate.topdown_attention(*call.args, **call.kwargs, backend="cpu")
    with torch.no_grad():
        plain = foveate.topdown_attention(*call.args, **call.kwargs, backend="cpu")
    torch.testing.assert_close(plain, kept.detach(), rtol=1e-5, atol=1e-5)


def test_scores_of_any_size_keep_the_shares_of_equal_keys():
    q = torch.full((1, 1, 3, 8), 1e4, requires_grad=True)
    k = torch.full((1, 1, 20, 8), 1e4)
    v = torch.randn(1, 1, 20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = foveate.topdown_sdpa(q, k, v, backend="cpu")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    (slope,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(slope, torch.full_like(v, 3 / 20))


def test_the_bits_do_not_depend_on_the_thread_count():
    q, k, v = torch.randn(3, 2, 3, 197, 32, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(topdown_attention_fwd(q, k, v, None, None, None, None, None, False, 0.2)[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(("grad", "tokens"), [("frozen", 3), ("td", 2)])
def test_frozen_weights_keep_neither_the_tokens_nor_the_signal(grad, tokens):
    b, n, c, h = 2, 40, 32, 4
    spec = the_spec("topdown_attention")
    call = spec.make_inputs({"b": b, "n": n, "c": c, "h": h, "grad": grad}, torch.float32, "cpu", 0)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in call.args[2:]}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        foveate.topdown_attention(*call.args, **call.kwargs, backend="cpu")
    biases = 4 * c  # 2 b_v is made anew where the bias counts twice
    numbers = tokens * b * n * c + b * h * n
    assert 0 < sum(kept.values()) <= 4 * (numbers + biases)
    assert call.args[2].grad is None


def test_inference_of_long_sequences_takes_16_mib_at_most():
    b, n, c, h = 2, 4096, 256, 4
    spec = the_spec("topdown_attention")
    call = spec.make_inputs({"b": b, "n": n, "c": c, "h": h}, torch.float32, "cpu", 0)
    with (
        torch.no_grad(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        foveate.topdown_attention(*call.args, **call.kwargs, backend="cpu")
    held = peak = 0
    for event in _memory_events(profile):
        held += event.nbytes()
        peak = max(peak, held)
    assert 4 * b * n * c <= peak <= 4 * b * n * c + (16 << 20)


def _memory_events(profile):
    return [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
