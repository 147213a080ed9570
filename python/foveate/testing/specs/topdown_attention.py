"""topdown_attention: attention with a top-down signal, selection by a prompt, feedback."""

from __future__ import annotations

import torch

import foveate
from foveate.testing.spec import Bench, OpSpec
from foveate.testing.specs.topdown_bad import (
    bad_attention,
    bad_feedback,
    bad_fold,
    bad_sdpa,
    bad_select,
)
from foveate.testing.specs.topdown_bench import (
    SELECT_PEERS,
    attention_cost,
    attention_rows,
    feedback_bench,
    feedback_cost,
    feedback_loop,
    fold_bench,
    fold_chain,
    fold_cost,
    sdpa_bench,
    sdpa_cost,
    sdpa_peer,
    select_bench,
    select_cost,
)
from foveate.testing.specs.topdown_cases import (
    ATTENTION_CASES,
    FEEDBACK_CASES,
    FOLD_CASES,
    SDPA_CASES,
    SELECT_CASES,
    attention_inputs,
    feedback_inputs,
    fold_inputs,
    sdpa_inputs,
    select_inputs,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SPECS = (
    OpSpec(
        name="topdown_attention",
        api=foveate.topdown_attention,
        backends=("cpu",),
        dtypes=_FLOATS[:3],
        make_inputs=attention_inputs,
        cases=ATTENTION_CASES,
        bench=attention_rows(),
        cost=attention_cost,
        bad_inputs=bad_attention(),
    ),
    OpSpec(
        name="topdown_sdpa",
        api=foveate.topdown_sdpa,
        backends=("cpu",),
        dtypes=_FLOATS[:3],
        make_inputs=sdpa_inputs,
        cases=SDPA_CASES,
        bench=(
            Bench(
                "ViT-B, b=8, inference",
                sdpa_bench(8, 197, 768, 12, grad=False),
                {"SDPA": sdpa_peer},
            ),
            Bench(
                "ViT-B, b=8, gradients",
                sdpa_bench(8, 197, 768, 12, grad=True),
                {"SDPA": sdpa_peer},
            ),
            Bench(
                "ViT-S/8, b=2, inference",
                sdpa_bench(2, 785, 384, 6, grad=False),
                {"SDPA": sdpa_peer},
            ),
        ),
        cost=sdpa_cost,
        bad_inputs=bad_sdpa(),
    ),
    OpSpec(
        name="prompt_select",
        api=foveate.prompt_select,
        backends=("cpu", "triton"),
        dtypes=_FLOATS[:3],
        make_inputs=select_inputs,
        cases=SELECT_CASES,
        bench=(
            Bench("ViT-B, b=8, inference", select_bench(grad=False), SELECT_PEERS, quick=True),
            Bench("ViT-B, b=8, gradients", select_bench(grad=True), SELECT_PEERS),
        ),
        cost=select_cost,
        bad_inputs=bad_select(),
    ),
    OpSpec(
        name="feedback",
        api=foveate.feedback,
        backends=(),
        dtypes=_FLOATS,
        make_inputs=feedback_inputs,
        cases=FEEDBACK_CASES,
        bench=(Bench("ViT-S, b=8", feedback_bench, {"linear": feedback_loop}),),
        cost=feedback_cost,
        bad_inputs=bad_feedback(),
    ),
    OpSpec(
        name="fold_feedback",
        api=foveate.fold_feedback,
        backends=(),
        dtypes=_FLOATS,
        make_inputs=fold_inputs,
        cases=FOLD_CASES,
        bench=(Bench("ViT-S", fold_bench, {"chain": fold_chain}),),
        cost=fold_cost,
        bad_inputs=bad_fold(),
    ),
)
