"""The shims against the originals' formulas, derived again with a dense eigh."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image

from foveate.compat import cutler, cuvler, tokencut


def features(n: int = 48, c: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, c))
    return centres[np.repeat(np.arange(3), n // 3)] + 0.4 * rng.normal(size=(n, c))


def dense(tokens: np.ndarray, tau: float, eps: float = 1e-5) -> np.ndarray:
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    return np.where(unit @ unit.T > tau, 1.0, eps)


def test_affinity_and_eigenvector_are_those_of_the_dense_pencil():
    tokens = features()
    affinity, degree = cutler.get_affinity_matrix(torch.from_numpy(tokens.T), 0.3)
    np.testing.assert_array_equal(affinity, dense(tokens, 0.3))
    _, vectors = scipy.linalg.eigh(degree - affinity, degree, subset_by_index=[1, 1])
    for form in (degree, np.diag(degree).copy(), torch.from_numpy(degree)):
        given = torch.from_numpy(affinity) if isinstance(form, torch.Tensor) else affinity
        copy, vector = cutler.second_smallest_eigenvector(given, form)
        assert vector.dtype == np.float64
        assert copy is not vector
        assert min(np.abs(vector - s * vectors[:, 0]).max() for s in (1, -1)) < 1e-8
    with pytest.raises(ValueError, match="row sums"):
        cutler.second_smallest_eigenvector(affinity, degree * 1.001)


def test_maskcut_forward_takes_one_of_the_two_sides_of_the_first_vector():
    tokens = features()
    seed, masks, vectors = cutler.maskcut_forward(
        torch.from_numpy(tokens.T).float(), (6, 8), (4, 4), (24, 32), tau=0.3, N=2
    )
    assert len(masks) == len(vectors) == 2
    assert masks[0].shape == vectors[0].shape == (24, 32)
    assert masks[0].dtype == np.float64
    assert isinstance(seed, int)
    grid = vectors[0][::4, ::4]
    sides = []
    for sign in (1, -1):
        x = sign * grid
        side = x > x.mean()
        if cutler.check_num_fg_corners(side, (6, 8)) >= 3:
            side, start = ~side, x.argmin()
        else:
            start = np.abs(x).argmax()
        labels, _ = scipy.ndimage.label(side)
        sides.append(labels == labels.flat[start])
    assert any((masks[0][::4, ::4] == side).all() for side in sides)


class TinyBackbone(torch.nn.Module):
    """Patches through one random layer: item 0 of the output is [C, N], without a class token."""

    def __init__(self, patch: int):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Conv2d(3, 12, patch, patch)
        self.seen: list[torch.Tensor] = []

    def forward(self, images):
        self.seen.append(images)
        return self.embed(images).flatten(2)


def test_maskcut_cuts_a_picture_with_a_backbone(tmp_path):
    pixels = np.full((60, 90, 3), (20, 60, 150), dtype=np.uint8)
    pixels[15:45, 20:60] = (220, 90, 30)
    pixels += np.random.default_rng(0).integers(0, 9, pixels.shape, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    backbone = TinyBackbone(8)
    masks, vectors, shown = cutler.maskcut(
        str(tmp_path / "a.png"), backbone, 8, 0.2, N=2, fixed_size=67
    )
    (images,) = backbone.seen
    assert images.shape == (1, 3, 64, 64)
    lanczos = Image.Resampling.LANCZOS
    resized = Image.fromarray(pixels).resize((67, 67), lanczos).resize((64, 64), lanczos)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(resized))
    scaled = (np.asarray(resized) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(images[0].permute(1, 2, 0), scaled, atol=1e-5)
    feats = backbone.embed(images).flatten(2)[0].detach()
    _, expected, upsampled = cutler.maskcut_forward(feats, (8, 8), (8, 8), (64, 64), 0.2, 2)
    assert len(masks) == len(vectors) == 2
    for found, wanted in zip([*masks, *vectors], [*expected, *upsampled], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert masks[0].any()
    assert masks[0].dtype == np.float64


def test_painting_zeroes_tokens():
    values = features(48, 3, 2)[:16].T
    painting, mask = np.zeros((4, 4)), np.eye(4)
    feats, united = cutler.get_masked_affinity_matrix(painting, values, torch.from_numpy(mask), 4)
    np.testing.assert_array_equal(united, mask)
    np.testing.assert_array_equal(feats, values * (1 - mask.reshape(1, -1)))


def test_annotations_threshold_at_half_the_maximum_and_drop_empty_masks():
    mask = np.zeros((5, 7))
    assert cutler.create_annotation_info(1, 2, {"id": 1, "is_crowd": 0}, mask) is None
    mask[1:3, 2:6] = 4.0
    mask[4, 6] = 2.0
    record = cutler.create_annotation_info(1, 2, {"id": 1, "is_crowd": 0}, mask)
    assert record["area"] == 8
    assert record["bbox"] == [2, 1, 4, 2]
    assert (record["width"], record["height"]) == (7, 5)
    assert cutler.create_image_info(3, "a", (7, 5))["width"] == 7
    assert cutler.resize_binary_mask(mask > 3, (14, 10)).shape == (10, 14)


@pytest.mark.parametrize("weighted", [False, True])
def test_tokencut_box_is_the_seed_components(weighted):
    tokens = np.concatenate([np.zeros((1, 6)), features()])[None]
    box, labels, mask, seed, nothing, vector = tokencut.ncut(
        tokens, (6, 8), (4, 4), (3, 23, 30), 0.3, no_binary_graph=weighted
    )
    assert nothing is None
    x = vector.reshape(-1)
    assert seed == np.flatnonzero(np.abs(x) >= np.abs(x).max() * (1 - 1e-9))[0]  # of ties the first
    expected, _ = scipy.ndimage.label((x > x.mean()).reshape(6, 8))
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(mask, expected == expected.flat[seed])
    rows, columns = np.nonzero(mask)
    assert list(box[:2]) == [4 * columns.min(), 4 * rows.min()]
    assert list(box[2:]) == [min(4 * columns.max() + 4, 30), min(4 * rows.max() + 4, 23)]
    again, big, upsampled = tokencut.ncut_saliency(
        tokens[0, 1:].T, (6, 8), (4, 4), (24, 32), 0.3, no_binary_graph=weighted
    )
    assert again == seed
    np.testing.assert_array_equal(big[::4, ::4], mask)
    np.testing.assert_array_equal(upsampled[3::4, 3::4], vector)


def test_degenerate_features_give_empty_masks():
    ones = np.ones((4, 36))
    _, masks, _ = cutler.maskcut_forward(ones, (6, 6), (1, 1), (6, 6), N=2)
    assert not np.any(masks)
    box, _, mask, seed, _, _ = tokencut.ncut(
        np.ones((1, 37, 4)), (6, 6), (1, 1), (3, 6, 6), tau=0.2
    )
    assert seed == -1
    assert not mask.any()
    assert not box.any()
    with pytest.raises(NotImplementedError):
        tokencut.detect_box(np.ones((2, 2)), 0, (2, 2), principle_object=False)


def test_cuvler_vectors_are_those_of_the_normalized_laplacian():
    tokens = features()
    y, values = cuvler.ncut(torch.from_numpy(tokens)[None], tau=0.3, eig_vecs=2)
    affinity = dense(tokens, 0.3)
    root = np.sqrt(affinity.sum(1))
    laplacian = np.eye(48) - affinity / np.outer(root, root)
    expected = scipy.linalg.eigvalsh(laplacian, subset_by_index=[1, 2])
    assert y.shape == (1, 48, 2)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(values[0], expected, atol=1e-10)
    np.testing.assert_allclose(laplacian @ y[0].numpy(), y[0].numpy() * expected, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(y[0], axis=0), 1)
