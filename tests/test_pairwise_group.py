"""The pairwise losses over a process group: gloo, two to four processes."""

from __future__ import annotations

import pytest
import torch
from pairwise_group import work

import foveate


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_group_gives_every_rank_its_loss_gradients_and_refusals(tmp_path, world):
    context = torch.multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    arguments = world, str(tmp_path / "store"), failures
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    found = [failures.get() for _ in range(world) if not failures.empty()]
    assert not hung, "\n".join(["a rank hangs", *found])
    assert [process.exitcode for process in processes] == [0] * world, "\n".join(found)


@pytest.mark.parametrize("loss", [foveate.sigmoid_loss, foveate.info_nce_loss])
def test_a_group_needs_an_initialised_torch_distributed(loss):
    with pytest.raises(RuntimeError, match=r"not initialised.*init_process_group"):
        loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, group=object())
