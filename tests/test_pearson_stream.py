"""PearsonAccumulator, mutual nearest neighbours and paired correlation against float64 oracles."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foveate import LayerSpec, PearsonAccumulator, mutual_nearest_neighbors, paired_correlation


def rng(seed):
    return torch.Generator().manual_seed(seed)


def flat(maps, size):
    """Units [c, K] of maps resized to `size` in float64."""
    x = maps.double()
    if tuple(x.shape[2:]) != tuple(size):
        x = F.interpolate(x, size, mode="bilinear")
    return x.transpose(0, 1).flatten(1)


def oracle(a, b):
    """Two passes in float64 on interpolated maps, per layer pair."""
    rows = []
    for x in a:
        row = []
        for y in b:
            size = [max(s, t) for s, t in zip(x.shape[2:], y.shape[2:], strict=True)]
            u, v = flat(x, size), flat(y, size)
            u, v = u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
            row.append((u @ v.T) / torch.outer(u.norm(dim=1), v.norm(dim=1)))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def layers(n=6, seed=0, dtype=torch.float32):
    g = rng(seed)
    a = [torch.randn(n, 3, 7, 7, generator=g), torch.randn(n, 4, 4, 9, generator=g)]
    b = [torch.randn(n, 5, 14, 3, generator=g), torch.randn(n, 2, 7, 7, generator=g)]
    b[1] = b[1] + a[0][:, :2]
    return [x.to(dtype) for x in a], [x.to(dtype) for x in b]


def stream(a, b, sizes, **options):
    acc = PearsonAccumulator(**options)
    start = 0
    for size in sizes:
        acc.update([x[start : start + size] for x in a], [x[start : start + size] for x in b])
        start += size
    return acc


@pytest.mark.parametrize("store", ["products", "samples"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [(1,) * 6, (4, 2), (6,), (0, 1, 0, 5)])
def test_any_split_of_the_images_gives_the_two_pass_result(store, backend, sizes):
    a, b = layers()
    acc = stream(a, b, sizes, store=store, backend=backend)
    assert acc.count == 6
    assert (acc.compute() - oracle(a, b)).abs().max() < 2e-6
    exact = stream(*layers(dtype=torch.float64), sizes, store=store, backend=backend)
    assert exact.compute().dtype == torch.float64
    assert (exact.compute() - oracle(*layers(dtype=torch.float64))).abs().max() < 1e-12


@pytest.mark.parametrize("k_stage", [1, 50, 4096])
def test_products_in_runs_of_any_length_agree(k_stage):
    a, b = layers(9)
    got = stream(a, b, (9,), k_stage=k_stage).compute()
    assert (got - oracle(a, b)).abs().max() < 2e-6


def test_large_offsets_do_not_cost_accuracy_where_the_naive_sums_do():
    x = torch.randn(400, 3, generator=rng(1))
    y = x[:, :2] + torch.randn(400, 2, generator=rng(2))
    for offset in (1e1, 1e3, 1e4):
        a, b = x + offset, y - offset
        want = np.corrcoef(a.double().numpy(), b.double().numpy(), rowvar=False)[:3, 3:]
        acc = PearsonAccumulator()
        for start in range(0, 400, 37):
            acc.update(a[start : start + 37], b[start : start + 37])
        assert np.abs(acc.compute().numpy() - want).max() < 2e-6
    mean = (a.T @ b) / 400 - a.mean(0)[:, None] * b.mean(0)
    naive = mean / torch.outer(
        ((a * a).mean(0) - a.mean(0) ** 2).sqrt(), ((b * b).mean(0) - b.mean(0) ** 2).sqrt()
    )
    assert not bool((naive - want).abs().max() < 1e-2)


def test_means_that_drift_far_are_followed():
    x = torch.randn(10, 40, 3, generator=rng(3)) + 1e3 * torch.arange(10).view(10, 1, 1)
    y = torch.randn(10, 40, 2, generator=rng(4)) - 5e2 * torch.arange(10).view(10, 1, 1)
    acc = PearsonAccumulator()
    for a, b in zip(x, y, strict=True):
        acc.update(a, b)
    want = np.corrcoef(x.flatten(0, 1).T.double(), y.flatten(0, 1).T.double())[:3, 3:]
    assert np.abs(acc.compute().numpy() - want).max() < 2e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scales_far_from_one_stay_in_range(scale):
    a, b = layers()
    got = stream([x * scale for x in a], [y / scale for y in b], (1, 5)).compute()
    assert (got - oracle(a, b)).abs().max() < 2e-6


def test_a_unit_that_grows_by_forty_orders_keeps_its_correlation():
    g = rng(5)
    x = torch.randn(60, 1, generator=g)
    x[:20] *= 1e-25
    y = torch.cat([x, torch.randn(60, 1, generator=g)], 1)
    got = stream([x], [y], (20, 40)).compute()
    want = np.corrcoef(x.double().T, y.double().T)[:1, 1:]
    assert np.abs(got.numpy() - want).max() < 2e-6


def test_thousands_of_equal_batches_do_not_drift():
    a, b = torch.randn(16, 4, generator=rng(6)), torch.randn(16, 3, generator=rng(7))
    once = PearsonAccumulator().update(a, b)
    many = PearsonAccumulator()
    for _ in range(200):
        many.update(a, b)
    for _ in range(21):  # doubling stands for a longer stream
        many.merge_(many)
    assert many.count > 2**31
    assert (many.compute() - once.compute()).abs().max() < 1e-6


@pytest.mark.parametrize("constant", ["nan", "zero"])
def test_constant_units_follow_the_policy_and_never_match(constant):
    a = torch.randn(50, 3, generator=rng(8))
    a[:, 1] = 1.81
    b = torch.randn(50, 2, generator=rng(9))
    acc = stream([a], [b], (20, 1, 29), constant=constant)
    r = acc.compute()
    assert bool((r[1].isnan() if constant == "nan" else r[1] == 0).all())
    assert bool(r[[0, 2]].isfinite().all())
    if constant == "nan":
        assert 1 not in mutual_nearest_neighbors(acc).pairs[:, 0]
        assert acc.topk(1).indices_a[1, 0] == -1
    a[:20, 0] = 0.3  # constant in the first batch only
    want = np.corrcoef(a.double().T, b.double().T)[:3, 3:]
    got = stream([a], [b], (20, 30), constant=constant).compute().numpy()
    assert np.abs(got[[0, 2]] - want[[0, 2]]).max() < 2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_value_reaches_its_own_unit_only(bad):
    a, b = layers()
    clean = stream(a, b, (3, 3)).compute()
    a[0][1, 2, 3, 3] = bad
    got = stream(a, b, (3, 3)).compute()
    assert bool(got[2].isnan().all())
    rest = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(got[rest], clean[rest], rtol=0, atol=1e-6)
    omitted = stream(a, b, (3, 3), nan_policy="omit")
    assert (omitted.count, omitted.omitted) == (5, 1)
    keep = [0, 2, 3, 4, 5]
    assert (omitted.compute() - oracle([x[keep] for x in a], [y[keep] for y in b])).abs().max() < (
        2e-6
    )
    strict = PearsonAccumulator(nan_policy="raise").update([x[2:] for x in a], [y[2:] for y in b])
    before = strict.compute()
    with pytest.raises(ValueError, match=r"a must be finite .* 1 non-finite .* channel 2 .*'0'"):
        strict.update(a, b)
    assert torch.equal(before, strict.compute())
    assert strict.count == 4


def test_weights_multiply_the_images():
    a, b = layers(4)
    weight = torch.tensor([1.0, 3.0, 0.0, 2.0])
    got = PearsonAccumulator().update(a, b, weight=weight).compute()
    index = [0, 1, 1, 1, 3, 3]
    assert (got - oracle([x[index] for x in a], [y[index] for y in b])).abs().max() < 2e-6


@pytest.mark.parametrize("store", ["products", "samples"])
def test_merged_shards_equal_one_pass_in_any_association(store):
    a, b = layers(12)
    a = [x + 50 for x in a]
    parts = []
    for start, stop in ((0, 1), (1, 1), (1, 6), (6, 12)):
        acc = PearsonAccumulator(store=store)
        parts.append(acc.update([x[start:stop] for x in a], [y[start:stop] for y in b]))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = PearsonAccumulator(store=store)
        for index in order:
            before = parts[index].count and parts[index].compute()
            total.merge_(parts[index])
            assert not parts[index].count or torch.equal(before, parts[index].compute())
        assert total.count == 12
        assert (total.compute() - oracle(a, b)).abs().max() < 2e-6


def iccv2023(a, b, means, batch):
    """The original's score, one layer a side."""
    scores = []
    for start in range(0, len(a), batch):
        size = [max(s, t) for s, t in zip(a.shape[2:], b.shape[2:], strict=True)]
        x, y = (
            flat(z[start : start + batch].double() - m.view(-1, 1, 1), size)
            for z, m in ((a, means[0]), (b, means[1]))
        )
        score = x @ y.T / (x.square().sum(1)[:, None] * y.square().sum(1)).sqrt()
        scores.append(score.nan_to_num(0.0))
    return torch.stack(scores).mean(0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("batch", [10, 16, 13])
def test_iccv2023_is_the_mean_of_the_batches_scores(backend, batch):
    g = rng(10)
    a = torch.randn(30, 3, 4, 4, generator=g, dtype=torch.float64)
    b = torch.randn(30, 5, 8, 8, generator=g, dtype=torch.float64)
    a[:, 1] = 0.7
    means = [x.mean((0, 2, 3)) for x in (a, b)]
    means[0][1] = 0.7
    acc = PearsonAccumulator(mode="iccv2023", means=means, backend=backend)
    for start in range(0, 30, batch):
        acc.update(a[start : start + batch], b[start : start + batch])
    want = iccv2023(a, b, means, batch)
    assert (acc.compute() - want).abs().max() < 1e-10
    assert bool((acc.compute()[1] == 0).all())
    assert torch.equal(acc.topk(2).values_a, acc.compute().topk(2, 1)[0])


def test_tokens_channels_last_and_crops_are_read_as_maps():
    maps = torch.randn(5, 3, 4, 4, generator=rng(11))
    other = torch.randn(5, 2, generator=rng(12))
    want = PearsonAccumulator().update(maps, other).compute()
    tokens = maps.flatten(2).transpose(1, 2)
    for prefix in (1, 5):
        given = torch.cat([torch.randn(5, prefix, 3, generator=rng(13)), tokens], 1)
        spec = LayerSpec(prefix_tokens=prefix)
        got = PearsonAccumulator(layers_a=spec).update(given, other).compute()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    last = maps.permute(0, 2, 3, 1).contiguous()
    got = PearsonAccumulator(layers_a={"x": LayerSpec(layout="nhwc")}).update({"x": last}, other)
    torch.testing.assert_close(got.compute(), want, rtol=0, atol=1e-6)
    framed = F.pad(maps, (3, 4, 1, 2), value=9.0)
    got = PearsonAccumulator(layers_a=LayerSpec(crop=(1, 2, 3, 4))).update(framed, other)
    torch.testing.assert_close(got.compute(), want, rtol=0, atol=1e-6)
    wide = LayerSpec(grid_hw=(2, 8))
    assert PearsonAccumulator(layers_a=wide).update(tokens, other).layout_a[0].grid == (2, 8)


def test_later_batches_match_layers_by_name():
    a, b = layers()
    acc = PearsonAccumulator()
    acc.update({"x": a[0][:3], "y": a[1][:3]}, b[0][:3])
    acc.update({"y": a[1][3:], "x": a[0][3:]}, b[0][3:])
    assert [info.name for info in acc.layout_a] == ["x", "y"]
    assert acc.layout_a[1].start == 3
    assert (acc.compute() - oracle(a, b[:1])).abs().max() < 2e-6


def brute(r, k, by):
    key = np.abs(r) if by == "abs" else r
    key = np.where(np.isnan(r), -np.inf, key)
    rows = [[j for j in np.argsort(-x, kind="stable") if x[j] > -np.inf][: k[0]] for x in key]
    cols = [[i for i in np.argsort(-x, kind="stable") if x[i] > -np.inf][: k[1]] for x in key.T]
    return [(i, int(j)) for i, row in enumerate(rows) for j in sorted(row) if i in cols[j]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("by", ["signed", "abs"])
def test_matches_are_those_of_brute_force(backend, by):
    for seed, k in itertools.product(range(6), ((1, 1), (1, 5), (4, 2))):
        c1, c2 = 5 + 31 * (seed % 2), 6 + 17 * (seed % 3)
        r = (torch.rand(c1, c2, generator=rng(seed)) * 2 - 1).mul(8).round() / 8  # ties
        r[2] = float("nan")
        found = mutual_nearest_neighbors(r, k, by=by, backend=backend)
        assert [tuple(p) for p in found.pairs.tolist()] == brute(r.numpy(), k, by)
        assert torch.equal(found.scores, r[found.pairs[:, 0], found.pairs[:, 1]])
        assert bool((found.rank_a < k[0]).all())
        assert bool((found.rank_b < k[1]).all())
        kept = mutual_nearest_neighbors(r, k, by=by, min_corr=0.5, backend=backend)
        size = kept.scores.abs() if by == "abs" else kept.scores
        assert bool((size >= 0.5).all())
        turned = mutual_nearest_neighbors(r.T, k[::-1], by=by, backend=backend)
        assert sorted(map(tuple, turned.pairs.flip(1).tolist())) == brute(r.numpy(), k, by)


def test_a_planted_permutation_is_found_without_the_matrix():
    x = torch.randn(300, 40, generator=rng(14))
    order = torch.randperm(40, generator=rng(15))
    acc = PearsonAccumulator().update(x, x[:, order])
    found = mutual_nearest_neighbors(acc)
    assert torch.equal(order[found.pairs[:, 1]], found.pairs[:, 0])
    assert len(found) == 40
    assert bool((found.scores > 1 - 1e-6).all())
    dense = mutual_nearest_neighbors(acc.compute().numpy())
    assert torch.equal(dense.pairs, found.pairs)


def test_topk_of_ranges_keeps_global_indices():
    a, b = layers()
    acc = stream(a, b, (6,))
    r = acc.compute()
    top = acc.topk(2, rows=(2, 6), cols=(1, 6))
    part = r[2:6, 1:6]
    values, index = part.topk(2, 1)
    assert torch.equal(top.values_a, values)
    assert torch.equal(top.indices_a, index + 1)
    assert torch.equal(top.indices_b.T, part.topk(2, 0)[1] + 2)
    assert acc.topk((1, 7), side="a").values_b is None
    assert acc.topk(1, side="b").indices_a is None
    stored = stream(a, b, (6,), store="samples").topk(2, rows=(2, 6), cols=(1, 6))
    assert torch.equal(stored.indices_b, top.indices_b)


def test_summary_counts_and_moments():
    a, b = layers()
    a[0][:, 0] = 3.0
    acc = stream(a, b, (6,))
    r = acc.compute().numpy()
    got = acc.summary(bins=20, tails=4)
    finite = r[np.isfinite(r)]
    assert got.nan == 7
    assert np.array_equal(got.histogram.numpy(), np.histogram(finite, 20, (-1, 1))[0])
    np.testing.assert_allclose(got.mean_a[1:], r[1:].mean(1), atol=1e-6)
    np.testing.assert_allclose(got.var_b, r[1:].var(0), atol=1e-6)
    np.testing.assert_allclose(got.max_b, r[1:].max(0), atol=1e-7)
    assert bool(got.mean_a[0].isnan())
    d = r[1:].astype(float) - r[1:].mean(0, dtype=float)
    np.testing.assert_allclose(got.kurt_b, (d**4).mean(0) / (d**2).mean(0) ** 2, rtol=1e-6)
    np.testing.assert_allclose(got.skew_b, (d**3).mean(0) / (d**2).mean(0) ** 1.5, rtol=1e-5)
    np.testing.assert_array_equal(got.top_scores, np.sort(finite)[::-1][:4])
    i, j = got.bottom_pairs[0].tolist()
    assert r[i, j] == finite.min()


@pytest.mark.parametrize("store", ["products", "samples"])
def test_saving_and_resuming_is_bit_identical(store):
    a, b = layers(8)
    whole = stream(a, b, (3, 5), store=store)
    half = stream(a, b, (3,), store=store)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = PearsonAccumulator(store=store)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.update([x[3:] for x in a], [y[3:] for y in b])
    assert torch.equal(resumed.compute(), whole.compute())
    assert (resumed.count, resumed.layout_a) == (8, whole.layout_a)
    resumed.reset()
    assert resumed.count == 0
    with pytest.raises(RuntimeError, match="at least one image"):
        resumed.compute()


def test_float32_co_moments_and_out_are_taken():
    a, b = layers()
    acc = stream(a, b, (3, 3), acc_dtype=torch.float32)
    out = torch.empty(7, 7)
    assert acc.compute(out=out) is out
    assert (out - oracle(a, b)).abs().max() < 4e-6


def _rank(rank, path, out):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    acc = PearsonAccumulator()
    if rank == 0:
        acc.update(*layers())
    acc.all_reduce_()
    torch.save(acc.compute(), f"{out}.{rank}")
    with pytest.raises(RuntimeError, match="reset"):
        acc.update(*layers())
    dist.destroy_process_group()


def test_all_ranks_end_with_the_global_state(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path / "meet", tmp_path / "r"), nprocs=2)
    want = oracle(*layers())
    for rank in (0, 1):
        assert (torch.load(tmp_path / f"r.{rank}") - want).abs().max() < 2e-6


def test_paired_is_the_matrix_at_its_pairs_and_differentiable():
    a, b = layers(3, dtype=torch.float64)
    pairs = torch.tensor([(i, j) for i in range(7) for j in range(7)] + [(0, 0)])
    got = paired_correlation(a, b, pairs)
    want = oracle(a, b)[pairs[:, 0], pairs[:, 1]]
    assert (got - want).abs().max() < 1e-12
    each = paired_correlation(a, b, pairs, per_image=True)
    for image in range(3):
        part = oracle([x[image : image + 1] for x in a], [y[image : image + 1] for y in b])
        assert (each[image] - part[pairs[:, 0], pairs[:, 1]]).abs().max() < 1e-12
    few = torch.tensor([(0, 0), (4, 2), (4, 6), (0, 0)])
    leaves = [x[:2, :, :3, :3].clone().requires_grad_() for x in (*a, *b)]
    leaves[2] = b[0][:2, :, :5, :2].clone().requires_grad_()

    def loss(x, y, u, v):
        return paired_correlation([x, y], [u, v], few)

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert paired_correlation(a, b, pairs[:0]).shape == (0,)


def test_paired_centres_on_given_means_and_has_a_policy_for_constants():
    g = rng(16)
    x, y = (torch.randn(4, 3, 5, 5, generator=g, dtype=torch.float64) for _ in range(2))
    means = (torch.randn(3, generator=g).double(), torch.randn(3, generator=g).double())
    pairs = torch.tensor([(0, 1), (2, 2)])
    u = (x - means[0].view(-1, 1, 1)).transpose(0, 1).flatten(1)[pairs[:, 0]]
    v = (y - means[1].view(-1, 1, 1)).transpose(0, 1).flatten(1)[pairs[:, 1]]
    got = paired_correlation(x, y, pairs, center=means)
    torch.testing.assert_close(got, torch.cosine_similarity(u, v), rtol=0, atol=1e-12)
    plain = paired_correlation(x, y, pairs, center=False)
    u, v = (z.transpose(0, 1).flatten(1)[pairs[:, s]] for s, z in ((0, x), (1, y)))
    torch.testing.assert_close(plain, torch.cosine_similarity(u, v), rtol=0, atol=1e-12)
    x[:, 0] = 0.1
    x.requires_grad_()
    zero = paired_correlation(x, y, pairs, constant="zero")
    zero.sum().backward()
    assert zero[0] == 0
    assert bool((x.grad[:, 0] == 0).all())
    assert bool((x.grad[:, 2] != 0).all())
    assert bool(paired_correlation(x, y, pairs)[0].isnan())


def test_one_sample_warns_and_is_constant():
    x = torch.ones(1, 3)
    acc = PearsonAccumulator(constant="zero").update(x, x)
    with pytest.warns(UserWarning, match="one sample"):
        assert bool((acc.compute() == 0).all())
