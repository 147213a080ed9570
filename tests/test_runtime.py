"""Threads, forks and addresses beyond 32 bits."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import foveate

IDS = torch.randint(0, 2**16, (4, 257, 129), generator=torch.Generator().manual_seed(0))


def _round_trip(_: int) -> bool:
    bits = foveate.bits_encode(IDS, 16, backend="cpu")
    return torch.equal(foveate.bits_decode(bits, backend="cpu"), IDS)


@pytest.mark.cpu_op
def test_python_threads_call_kernels_at_once():
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(_round_trip, range(20)))


def _child(queue):
    torch.set_num_threads(1)  # as torch's data loader does: an OpenMP pool does not survive a fork
    queue.put(_round_trip(0))


@pytest.mark.skipif(sys.platform != "linux", reason="forks after threads are a Linux practice")
def test_a_forked_child_calls_kernels():
    assert _round_trip(0)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get()


@pytest.mark.cpu_op
def test_strides_beyond_32_bits_are_followed():
    memory = np.zeros(2**32 + 2, np.uint8)  # untouched pages cost nothing
    memory[0], memory[2**32] = 5, 7
    ids = torch.from_numpy(memory)[:: 2**32]
    assert ids.stride() == (2**32,)
    bits = foveate.bits_encode(ids, 3, backend="cpu")
    assert foveate.bits_decode(bits, backend="cpu").tolist() == [5, 7]
