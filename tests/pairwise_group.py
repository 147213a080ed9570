"""What each process of tests/test_pairwise_group.py does: every check of a group in one spawn."""

from __future__ import annotations

import itertools
import os
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import foveate
from foveate.nn import ClipLoss, SigLipLoss
from foveate.ops.pairwise_loss.checks import sigmoid_pairs
from foveate.ops.pairwise_loss.pairs import dense_ignored, dense_targets

N, D = 6, 5
SCALE, BIAS = 4.0, -2.0


def everything(world):
    """Features, ids and weights of all ranks, equal in every process."""
    generator = torch.Generator().manual_seed(3)
    total = world * N
    x, y = (F.normalize(torch.randn(total, D, generator=generator)).double() for _ in range(2))
    ids = torch.randint(-1, 5, (2, total), generator=generator)
    weights = (torch.randint(0, 5, (2, total), generator=generator) / 4).double()
    index = torch.randint(-1, total, (total,), generator=generator)
    targets = (torch.rand(total, total, generator=generator) < 0.2).double()
    return x, y, ids, weights, index, targets


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def mine(tensor, rank):
    return tensor[rank * N : (rank + 1) * N]


def close(name, got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}")


def scalars():
    return leaves(torch.tensor(SCALE, dtype=torch.float64), torch.tensor(BIAS, dtype=torch.float64))


def sigmoid_forms(world):
    """(name, options of one rank from a slicer, options of the dense oracle)."""
    _, _, ids, weights, index, targets = everything(world)

    def sliced(rank):
        part = mine(ids[0], rank), mine(ids[1], rank)
        return {
            "diagonal": {},
            "none": {"positives": None},
            "ids": {"positives": part},
            "shares": {"positives": part, "positive_share": "both"},
            "index": {"positives": mine(index, rank)},
            "dense": {"positives": mine(targets, rank)},
            "sparse": {"positives": mine(targets, rank).to_sparse_coo()},
            "ignored, weighted": {
                "ignore": part,
                "row_weight": mine(weights[0], rank),
                "col_weight": mine(weights[1], rank),
            },
        }

    whole = {
        "diagonal": {},
        "none": {"positives": None},
        "ids": {"positives": tuple(ids)},
        "shares": {"positives": tuple(ids), "positive_share": "both"},
        "index": {"positives": index},
        "dense": {"positives": targets},
        "sparse": {"positives": targets},
        "ignored, weighted": {
            "ignore": tuple(ids),
            "row_weight": weights[0],
            "col_weight": weights[1],
        },
    }
    return sliced, whole


def check_sigmoid(rank, world, backend):
    x, y, *_ = everything(world)
    sliced, whole = sigmoid_forms(world)
    for name, options in sliced(rank).items():
        X, Y, s, b = *leaves(x, y), *scalars()
        rows = foveate.sigmoid_loss(
            X, Y, s, b, reduction="none", backend="reference", **whole[name]
        ).view(world, N)
        ranks = rows.sum(1) / N
        dx, dy = torch.autograd.grad(ranks.sum(), (X, Y), retain_graph=True)
        ds, db = torch.autograd.grad(ranks[rank], (s, b))
        got = {}
        for how in ("gather", "ring"):
            args = *leaves(mine(x, rank), mine(y, rank)), *scalars()
            value = foveate.sigmoid_loss(
                *args, group=dist.group.WORLD, dist=how, backend=backend, **options
            )
            got[how] = (value.detach(), *torch.autograd.grad(value, args))
            for part, want in zip(
                got[how],
                (ranks[rank].detach(), mine(dx, rank), mine(dy, rank), ds, db),
                strict=True,
            ):
                close(f"{backend} {name} {how}", part, want)
        for left, right in zip(got["gather"], got["ring"], strict=True):
            assert torch.equal(left, right), name


def check_upstream_and_frozen(rank, world):
    x, y, *_ = everything(world)
    X, Y, s, b = *leaves(x, y), *scalars()
    rows = foveate.sigmoid_loss(X, Y, s, b, reduction="none", backend="reference").view(world, N)
    factors = torch.arange(1.0, world + 1, dtype=torch.float64)
    want = torch.autograd.grad((rows.sum(1) / N * factors).sum(), (X, Y))
    args = *leaves(mine(x, rank), mine(y, rank)), *scalars()
    value = foveate.sigmoid_loss(*args, group=dist.group.WORLD, grad_mode="backward", backend="cpu")
    got = torch.autograd.grad(value * factors[rank], args[:2])
    for part, whole in zip(got, want, strict=True):
        close("upstream", part, mine(whole, rank))
    features = leaves(mine(x, rank))[0]
    value = foveate.sigmoid_loss(
        features, mine(y, rank), SCALE, BIAS, group=dist.group.WORLD, backend="cpu"
    )
    value.backward()
    assert features.grad is not None


def check_stats(rank, world):
    x, y, *_ = everything(world)
    sliced, whole = sigmoid_forms(world)
    z = SCALE * x @ y.T + BIAS
    for name, options in sliced(rank).items():
        _, got = foveate.sigmoid_loss(
            mine(x, rank),
            mine(y, rank),
            SCALE,
            BIAS,
            group=dist.group.WORLD,
            return_stats=True,
            backend="cpu",
            **options,
        )
        plain = whole[name].get("positives", "diagonal"), whole[name].get("ignore")
        pairs = sigmoid_pairs(*plain, "each", x, len(y), len(y))
        targets = dense_targets(pairs, len(x), len(y), z)
        ignored = dense_ignored(pairs, targets)
        kept = torch.ones_like(targets, dtype=torch.bool) if ignored is None else ~ignored
        rows = mine(targets >= 0.5, rank)
        assert int(got.pos_count) == int(rows.sum()), name
        assert int(got.neg_count) == int((mine(kept, rank) & ~rows).sum()), name

        def top1(positive, wanted, logits, axis):
            inf = float("inf")
            best = logits.masked_fill(~wanted, -inf).amax(axis)
            hit = logits.masked_fill(~positive, -inf).amax(axis) >= best
            has = positive.any(axis)
            return ((hit & has).sum() / has.sum()).float()

        columns = slice(rank * N, (rank + 1) * N)
        positive = (targets >= 0.5)[:, columns]
        want = top1(positive, kept[:, columns], z[:, columns], 0)
        torch.testing.assert_close(got.col_top1, want, equal_nan=True, msg=name)
        want = top1(rows, mine(kept, rank), mine(z, rank), 1)
        torch.testing.assert_close(got.row_top1, want, equal_nan=True, msg=name)


def check_clip(rank, world):
    x, y, *_ = everything(world)
    for local_loss, gather_with_grad in itertools.product((True, False), repeat=2):
        X, Y, s, _ = *leaves(x, y), *scalars()
        z = s * X @ Y.T
        every = torch.arange(world * N)
        by_row = F.cross_entropy(z, every, reduction="none").view(world, N).mean(1)
        by_col = F.cross_entropy(z.T, every, reduction="none").view(world, N).mean(1)
        ranks = (by_row + by_col) / 2
        total = ranks.mean()
        (ds,) = torch.autograd.grad(total if not local_loss else ranks[rank], s, retain_graph=True)
        if local_loss and not gather_with_grad:
            dx = torch.autograd.grad(by_row[rank] / 2, X, retain_graph=True)[0]
            dy = torch.autograd.grad(by_col[rank] / 2, Y)[0]
        else:
            factor = 1 if not (local_loss or gather_with_grad) else world
            dx, dy = (factor * g for g in torch.autograd.grad(total, (X, Y)))
        want = (ranks[rank] if local_loss else total).detach()
        args = *leaves(mine(x, rank), mine(y, rank)), *scalars()
        module = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world)
        value = module(*args)
        got = torch.autograd.grad(value, args)
        name = f"clip {local_loss} {gather_with_grad}"
        close(name, value.detach(), want)
        for part, whole in zip(got[:2], (mine(dx, rank), mine(dy, rank)), strict=True):
            close(name, part, whole)
        close(name, got[2], ds)
        assert got[3].item() == 0, name


def refuses(error, text, call):
    with pytest.raises(error, match=text):
        call()


def check_refusals(rank, world):
    x, y, *_ = everything(world)
    x, y = mine(x, rank), mine(y, rank)
    group = dist.group.WORLD
    size = N - rank
    refuses(
        ValueError,
        "equal on all ranks",
        lambda: foveate.sigmoid_loss(x[:size], y[:size], 1.0, group=group),
    )
    refuses(
        ValueError,
        "equal on all ranks",
        lambda: foveate.info_nce_loss(x, y, 1.0, group=group, reduction=("sum", "mean")[rank % 2]),
    )
    bad = "nothing" if rank == 0 else "row_mean"
    refuses(
        ValueError, "reduction", lambda: foveate.sigmoid_loss(x, y, 1.0, reduction=bad, group=group)
    )
    module = SigLipLoss(rank=rank, world_size=world + 1)
    refuses(
        ValueError,
        f"{rank} and {world}",
        lambda: module(x, y, torch.tensor(1.0), torch.tensor(0.0)),
    )


def check_subgroup(rank, world):
    x, y, *_ = everything(world)
    groups = [dist.new_group([k]) for k in range(world)]
    alone = foveate.sigmoid_loss(mine(x, rank), mine(y, rank), SCALE, BIAS, backend="cpu")
    grouped = foveate.sigmoid_loss(
        mine(x, rank), mine(y, rank), SCALE, BIAS, group=groups[rank], backend="cpu"
    )
    assert torch.equal(alone, grouped)


def work(rank, world, file, failures):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        for backend in ("cpu", "reference") if world == 3 else ("cpu",):
            check_sigmoid(rank, world, backend)
        check_upstream_and_frozen(rank, world)
        check_stats(rank, world)
        check_clip(rank, world)
        check_refusals(rank, world)
        check_subgroup(rank, world)
    except Exception:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
