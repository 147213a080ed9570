"""The registry of ops and the error budget: what tests and benchmarks are generated from."""

from foveate.testing.check import Verdict, assert_ok, evaluate, in_float32, on_part, verdicts
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec
from foveate.testing.specs import SPECS

__all__ = [
    "SPECS",
    "BadInput",
    "Bench",
    "Call",
    "Cases",
    "Cost",
    "OpSpec",
    "Verdict",
    "assert_ok",
    "evaluate",
    "in_float32",
    "on_part",
    "verdicts",
]
