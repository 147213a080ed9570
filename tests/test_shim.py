"""The host shim runs sound kernel text in any order, and sees the faults it is there to see."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from shim_build import ORDERS, shim


def _run(kernel: str, order: str, *, blocks: int = 1, threads: int = 64, seed: int = 0):
    out = np.zeros(16)
    pointer = out.ctypes.data_as(ctypes.c_void_p)
    error = shim().faults_shim(kernel.encode(), blocks, threads, ORDERS[order], seed, pointer)
    return error.decode(), out


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernels_give_their_result_in_every_order(order):
    for seed in range(3):
        error, out = _run("tree sum", order, blocks=2, seed=seed)
        assert not error
        assert out[:2].tolist() == [64 * 63 / 2] * 2
        error, out = _run("warp sum", order, seed=seed)
        assert not error
        odd = 0xAAAAAAAA
        assert out[:4].tolist() == [sum(range(32)), odd, sum(range(32, 64)), odd]
        error, out = _run("swap", order, blocks=2, seed=seed)
        assert not error
        assert out[:2].tolist() == [2, 1]


@pytest.mark.parametrize(
    "kernel", ["tree sum without its first barrier", "tree sum without its loop's barrier"]
)
def test_a_missing_barrier_changes_the_sum_in_some_order(kernel):
    sums = {order: _run(kernel, order)[1][0] for order in ORDERS}
    assert any(value != 64 * 63 / 2 for value in sums.values()), sums


def test_a_missing_cluster_barrier_changes_what_blocks_read_of_each_other():
    read = [_run("swap without a barrier", order, blocks=2)[1][:2].tolist() for order in ORDERS]
    assert any(values != [2, 1] for values in read), read


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_meet_at_different_barriers_or_never_are_reported(order):
    error, _ = _run("two barriers", order)
    assert "barriers of lines" in error
    error, _ = _run("half a barrier", order)
    assert "that others never reach" in error
