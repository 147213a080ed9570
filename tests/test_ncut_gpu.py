"""The Triton pieces of ncut: bits, products and masks against their definitions."""

from __future__ import annotations

import pytest
import torch

from foveate.ops.ncut import batched_partition, partition


def _unpacked(words: torch.Tensor, n: int) -> torch.Tensor:
    b, groups, _ = words.shape
    shift = torch.arange(32, device=words.device)
    bits = (words[:, :, None, :] >> shift[None, None, :, None]) & 1
    return bits.reshape(b, 32 * groups, n)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "c", "dtype", "tau"),
    [
        (5, 3, torch.float32, 0.2),
        (33, 16, torch.float32, 0.25),  # cosines of +-1 rows that tie with tau exactly
        (70, 40, torch.bfloat16, 0.1),
        (40, 7, torch.float64, -0.1),
    ],
)
def test_bits_degrees_and_products_equal_the_dense_matrix(n, c, dtype, tau):
    from foveate.ops.ncut import triton_affinity, triton_matvec

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, n, c, generator=generator)
    if c == 16:
        features = features.sign()
    features[0, 3] = 0
    features = features.to(dtype).cuda()
    tokens = torch.tensor([n, n - 2]).cuda()
    mask = torch.zeros(2, n, dtype=torch.bool)
    mask[:, 1] = True
    mask = mask.cuda()
    bits = triton_affinity.affinity_pack(features, tokens, mask, tau)
    unit = features.double() * ~mask[:, :, None]
    unit = unit / unit.norm(dim=2, keepdim=True).clamp_min(1e-12)
    place = torch.arange(n, device=features.device)
    dense = unit @ unit.mT > tau
    dense[:, place, place] = unit.abs().amax(2) > 0 if tau >= 0 else True
    inside = place < tokens[:, None]
    dense &= inside[:, None] & inside[:, :, None]
    unpacked = _unpacked(bits.words, n)
    assert not unpacked[:, n:].any()
    assert torch.equal(unpacked[:, :n].bool(), dense)
    assert torch.equal(triton_matvec.popcount(bits.words), dense.sum(2))
    x = torch.randn(2, 5, n, generator=generator, dtype=torch.float64).cuda()
    product = triton_matvec.bits_matvec(bits.words, x)
    torch.testing.assert_close(product, x @ dense.double(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_masks_of_a_batch_equal_those_of_each_image(seed):
    generator = torch.Generator().manual_seed(seed)
    cells = [(7, 9), (1, 20), (20, 1), (8, 8), (13, 5)]
    n = 70
    heights, widths = (torch.tensor(side) for side in zip(*cells, strict=True))
    grids = batched_partition.grids(heights, widths, n)
    for _ in range(10):
        x = torch.randn(5, n, generator=generator, dtype=torch.float64) * grids.inside
        x *= x.gather(1, x.abs().argmax(1, keepdim=True)).sign()
        found, seeds = batched_partition.candidate_masks(x, grids, 3)
        boxes = batched_partition.bounding_boxes(found, grids)
        for i, (h, w) in enumerate(cells):
            mask, at = partition.candidate_mask(x[i, : h * w], (h, w), 3)
            assert int(seeds[i]) == at
            assert torch.equal(found[i, : h * w], mask)
            assert not found[i, h * w :].any()
            assert torch.equal(boxes[i], partition.bounding_box(mask, (h, w)))
