"""Peak memory of the pairwise losses: flat in the number of pairs."""

from __future__ import annotations

import subprocess
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("reads /proc/self/status", allow_module_level=True)

_N, _D = 16384, 64
_PROGRAM = """
import re, sys
import torch, foveate

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

def step(n, d):
    x, y = (torch.randn(n, d).div_(d**0.5).requires_grad_() for _ in range(2))
    getattr(foveate, sys.argv[1])(x, y, 2.0, backend="cpu").backward()

step(64, 8)
before = peak()
step(int(sys.argv[2]), int(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.parametrize("loss", ["sigmoid_loss", "info_nce_loss"])
def test_a_training_step_needs_a_tile_and_the_features_not_the_matrix_of_pairs(loss):
    command = [sys.executable, "-c", _PROGRAM, loss, str(_N), str(_D)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    features = 2 * _N * _D * 4  # bytes of x and y, 8 MiB
    # The features, their raw and their scaled gradients and the tile; the matrix is 1 GiB.
    assert 0 < int(result.stdout) <= 8 * features + (32 << 20)
