"""The real inputs of benchmarks: their shapes, and that they carry what they claim to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.testing import inputs


def test_tokens_of_one_image_have_cosines_of_both_signs_and_neighbours_alike():
    tokens = inputs.tokens(2, 20, 384)
    assert tokens.shape == (2, 400, 384)
    assert tokens.mean(1).abs().max() < 1e-4
    units = F.normalize(tokens[0], dim=-1).unflatten(0, (20, 20))
    neighbours = (units[:, 1:] * units[:, :-1]).sum(-1).mean()
    across = (units[:, 10:] * units[:, :10]).sum(-1).mean()
    assert neighbours > across + 0.3
    cosines = units.flatten(0, 1) @ units.flatten(0, 1).T
    assert 0.1 < (cosines > 0.2).float().mean() < 0.7


def test_prefix_tokens_come_first():
    plain, prefixed = inputs.tokens(1, 7, 96), inputs.tokens(1, 7, 96, prefix=2)
    assert prefixed.shape == (1, 51, 96)
    assert torch.equal(prefixed[:, 2:], plain)
    assert torch.isfinite(prefixed).all()


@pytest.mark.parametrize("size", [7, 28, 130])
def test_activation_maps_of_two_networks_correlate(size):
    a = inputs.activation_maps(2, 48, size)
    b = inputs.activation_maps(2, 32, size, seed=1)
    assert a.shape == (2, 48, size, size)
    assert b.shape == (2, 32, size, size)
    assert 0.3 < (a == 0).float().mean() < 0.7
    rows = torch.cat([a, b], 1).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(rows)[:48, 48:]
    assert correlation.max() > 0.5
    assert not torch.equal(a[:, :32], b)


def test_unit_samples_are_rows_of_the_same_patches():
    a, b = inputs.unit_samples(4000, 40), inputs.unit_samples(4000, 24, seed=1)
    assert a.shape == (4000, 40)
    assert b.shape == (4000, 24)
    assert torch.corrcoef(torch.cat([a, b], 1).T)[:40, 40:].max() > 0.5


def test_paired_embeddings_are_unit_rows_whose_partners_are_closest():
    image, text, label = inputs.paired_embeddings(2000, 64)
    for tower in (image, text):
        assert tower.shape == (2000, 64)
        torch.testing.assert_close(tower.norm(dim=1), torch.ones(2000))
    cosines = image @ text.T
    same = label.unsqueeze(1) == label
    assert cosines.diag().mean() > cosines[same].mean() > cosines[~same].mean() + 0.3
    found = (cosines.argmax(1) == torch.arange(2000)).float().mean()
    assert found > 50 / 2000, "retrieval must be far above chance, 1 / 2000"


def test_patches_hold_the_pixels_of_the_images():
    pixels = inputs.patches(1, 4, 8)
    assert pixels.shape == (1, 16, 192)
    image = inputs.images(1, 32)
    assert torch.equal(pixels[0, 5].view(3, 8, 8), image[0, :, 8:16, 8:16])


def test_written_copies_leave_the_cache_alone():
    inputs.tokens(1, 7, 96).zero_()
    assert inputs.tokens(1, 7, 96).abs().sum() > 0
    inputs.paired_embeddings(20, 8).image.zero_()
    assert inputs.paired_embeddings(20, 8).image.abs().sum() > 0
