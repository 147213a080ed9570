"""Descriptors, checkpoints, pictures and `annotate`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import skimage.color
import skimage.data
import timm
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import save_file

import foveate
from foveate.methods.images import read_image, write_png
from foveate.methods.maskcut import annotate, color_features, load_vit, overlay, vit_features
from foveate.methods.tokencut import tokencut_image

TINY = "test_vit"


def test_color_features_are_their_formula():
    image = skimage.data.astronaut()[:48, :60]
    lab = skimage.color.rgb2lab(image)
    h, w = 6, 5
    down, across = np.zeros((48, 60)), np.zeros((48, 60))
    down[:-1] = abs(lab[1:, :, 0] - lab[:-1, :, 0])
    across[:, :-1] = abs(lab[:, 1:, 0] - lab[:, :-1, 0])
    expected = np.empty((h, w, 10))
    for i in range(h):
        for j in range(w):
            place = np.s_[8 * i : 8 * i + 8, 12 * j : 12 * j + 12]
            tile = lab[place].reshape(-1, 3)
            expected[i, j, :3] = tile.mean(0) / 50
            expected[i, j, 3:6] = tile.std(0) / 50
            expected[i, j, 6:8] = down[place].mean() / 20, across[place].mean() / 20
            expected[i, j, 8:] = 0.5 * (i + 0.5) / h, 0.5 * (j + 0.5) / w
    expected = expected.reshape(-1, 10)
    found = color_features(image, (h, w))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected - expected.mean(0), atol=1e-4)
    assert torch.equal(found, color_features(torch.from_numpy(image.copy()), (h, w)))
    with pytest.raises(ValueError, match="grid"):
        color_features(image, (7, 5))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=0, dynamic_img_size=True).eval()


@pytest.mark.parametrize("kind", ["plain.pth", "nested.pt", "plain.safetensors"])
def test_load_vit_reads_local_weights(network, tmp_path, kind):
    state = {name: value.clone() for name, value in network.state_dict().items()}
    path = tmp_path / kind
    if kind == "nested.pt":
        wrapped = {f"module.backbone.{name}": value for name, value in state.items()}
        torch.save({"teacher": {**wrapped, "head.weight": torch.zeros(2)}, "epoch": 3}, path)
    elif kind == "plain.pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = load_vit(TINY, path)
    assert not loaded.training
    assert all(torch.equal(v, state[name]) for name, v in loaded.state_dict().items())


def test_load_vit_lists_five_missing_keys_and_refuses_other_trunks(network, tmp_path):
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("blocks.1.")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="missing") as caught:
        load_vit(TINY, tmp_path / "a.pt")
    assert str(caught.value).count("blocks.1.") == 5
    torch.save({**state, "blocks.99.norm1.weight": torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"blocks\.99"):
        load_vit(TINY, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="weights_only"):
        load_vit(TINY, tmp_path / "c.pt")


def test_vit_features_are_the_last_blocks_projections(network):
    images = torch.randn(2, 3, 48, 64)
    side = network.patch_embed.patch_size[0]
    n, c = (48 // side) * (64 // side), network.embed_dim
    seen = []
    attention = network.blocks[-1].attn
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    facets = {f: vit_features(network, images, facet=f) for f in ("query", "key", "value", "kqv")}
    handle.remove()
    assert not attention.qkv._forward_hooks
    prefix = network.num_prefix_tokens
    parts = dict(zip(("query", "key", "value"), attention.qkv(seen[0]).chunk(3, -1), strict=True))
    for name, value in parts.items():
        assert facets[name].shape == (2, n, c)
        torch.testing.assert_close(facets[name], value[:, prefix:].detach())
    expected = torch.cat([facets["key"], facets["query"], facets["value"]], -1)
    assert torch.equal(facets["kqv"], expected)
    with pytest.raises(NotImplementedError, match="qkv"):
        vit_features(torch.nn.Linear(2, 2), images)
    with pytest.raises(ValueError, match="facet"):
        vit_features(network, images, facet="token")


def test_grey16_is_divided_by_257_and_alpha_dropped(tmp_path):
    levels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10000
    Image.fromarray(levels).save(tmp_path / "g.png")
    expected = np.repeat((levels // 257)[..., None], 3, 2)
    np.testing.assert_array_equal(read_image(tmp_path / "g.png"), expected)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels[..., :3])


def test_overlay_tints_masks_alone_and_stays_in_its_folder(tmp_path):
    image = np.full((20, 30, 3), 7, dtype=np.uint8)
    masks = np.zeros((2, 20, 30), dtype=bool)
    masks[0, 2:9, 3:12] = masks[1, 10:18, 15:28] = True
    tinted = overlay(image, masks)
    np.testing.assert_array_equal((tinted != 7).any(-1), masks.any(0))
    assert (tinted[5, 6] != tinted[14, 20]).any()
    with pytest.raises(ValueError, match="inside"):
        write_png(tmp_path / "in", "../out", image)
    assert not (tmp_path / "out.png").exists()


def scene() -> np.ndarray:
    image = np.random.default_rng(0).integers(90, 110, (48, 48, 3), dtype=np.uint8)
    image[12:32, 16:40] = (200, 40, 30)
    return image


@pytest.mark.parametrize("kind", ["grid.npy", "square.npy", "half.safetensors"])
def test_saved_features_are_cut_on_their_grid(tmp_path, kind):
    (tmp_path / "p").mkdir()
    (tmp_path / "f").mkdir()
    Image.fromarray(scene()).save(tmp_path / "p" / "x.y.png")
    Image.fromarray(scene()).save(tmp_path / "p" / "none.png")
    values = color_features(scene(), (12, 12))
    if kind == "grid.npy":
        np.save(tmp_path / "f" / "x.y.npy", values.reshape(12, 12, 10).numpy())
    elif kind == "square.npy":
        np.save(tmp_path / "f" / "x.y.npy", values.numpy())
    else:
        values = values.half()
        save_file({"features": values}, tmp_path / "f" / "x.y.safetensors")
    done = annotate(
        tmp_path / "p", tmp_path / "o.json", features=tmp_path / "f", n_masks=1, progress=False
    )
    assert (done.images, done.failed, done.merged) == (2, 1, True)
    (annotation,) = json.loads((tmp_path / "o.json").read_text())["annotations"]
    expected = foveate.maskcut(values, (12, 12), n_masks=1, size=(48, 48)).masks[0]
    np.testing.assert_array_equal(rle.decode(annotation["segmentation"]), expected)
    assert "none.npy" in (tmp_path / "o.json.failed.tsv").read_text()


def test_a_model_brings_its_patch_size(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.pth")
    Image.fromarray(scene()).save(tmp_path / "a.png")
    done = annotate(
        [tmp_path / "a.png"],
        tmp_path / "o.json",
        model=TINY,
        weights=tmp_path / "w.pth",
        size=96,
        keep_aspect=True,
        progress=False,
    )
    assert done.failed == 0
    settings = json.loads((tmp_path / "o.json").read_text())["info"]["settings"]
    assert settings["patch"] == network.patch_embed.patch_size[0]


def test_refine_fills_holes_and_drops_masks_that_shrank(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    given = []

    def punch(image, mask):
        given.append(mask.copy())
        assert image.shape == (48, 48, 3)
        rows, columns = np.nonzero(mask)
        mask[round(rows.mean()), round(columns.mean())] = False
        return mask

    def shrink(image, mask):
        mask[:, :] = False
        mask[0, 0] = True
        return mask

    common = {"size": 48, "patch": 4, "n_masks": 1, "progress": False, "overwrite": True}
    out = tmp_path / "o.json"
    assert annotate(tmp_path / "a.png", out, refine=punch, **common).masks == 1
    (annotation,) = json.loads(out.read_text())["annotations"]
    np.testing.assert_array_equal(rle.decode(annotation["segmentation"]), given[0])
    assert annotate(tmp_path / "a.png", out, refine=shrink, **common).masks == 0


def test_tokencut_image_pads_and_clips(network):
    image = scene()[:37, :45]
    result = tokencut_image(image, network)
    assert result.mask.shape == (37, 45)
    x0, y0, x1, y1 = result.box.tolist()
    assert 0 <= x0 < x1 <= 45
    assert 0 <= y0 < y1 <= 37
