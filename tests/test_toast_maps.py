"""What the two passes look at: maps, overlays, the figure."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
from toast_models import images, make  # noqa: E402

from foveate.methods.toast import overlay, plot_maps  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}])
def test_maps_are_the_softmax_rows_of_the_last_block(options):
    model, x = make(**options), images(h=16)
    maps = model.maps(x)
    kept = {}
    block = model.blocks[-1]
    handle = block.norm1.register_forward_hook(
        lambda _m, _i, out: kept.setdefault("runs", []).append(out)
    )
    with torch.no_grad():
        tokens = model.forward_features(x)
    handle.remove()
    p = model.num_prefix_tokens
    for got, y in zip((maps.attention_first, maps.attention), kept["runs"], strict=True):
        q, k, _ = block.attn.qkv(y).view(2, -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
        rows = (q @ k.mT * 12**-0.5).softmax(-1)
        want = rows[:, :, 0, p:] if p else rows.mean(2)
        torch.testing.assert_close(got.flatten(2), want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(maps.feature_norm.flatten(1), tokens[:, p:].norm(dim=-1))
    mask = model.select(model.first_pass(x))[1]
    torch.testing.assert_close(maps.selection.flatten(1), mask[:, p:, 0])
    assert not any(m.requires_grad for m in maps)
    for again, got in zip(model.fold().maps(x), maps, strict=True):
        torch.testing.assert_close(again, got, rtol=1e-9, atol=1e-10)


def test_overlay_follows_its_formula():
    image = np.full((4, 6, 3), 0.5)
    heat = np.array([[0.0, 1.0], [1.0, 1.0]])
    got = overlay(image, heat, alpha=0.5)
    assert got.dtype == np.uint8
    assert got[0, 0].tolist() == [128, 128, 128]
    assert got[0, 3].tolist() == [191, 64, 64]
    flat = np.full((2, 2, 3), 7, np.uint8)
    assert np.array_equal(overlay(flat, torch.ones(1, 2)), flat)


def test_images_that_cannot_be_drawn_are_named():
    with pytest.raises(TypeError, match=r"image must be uint8 or floating, got int64"):
        overlay(np.zeros((2, 2, 3), np.int64), np.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"image must be \[H, W, 3\], got \(2, 2\)"):
        overlay(np.zeros((2, 2)), np.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"heat must be \[gh, gw\], got \(4,\)"):
        overlay(np.zeros((2, 2, 3)), np.zeros(4))
    maps = make().maps(images())
    with pytest.raises(ValueError, match=r"maps must be of 3 images, got 2"):
        plot_maps(images(3), maps)
    with pytest.raises(ValueError, match=r"images must be \[b, 3, H, W\]"):
        plot_maps(images()[:, :2], maps)


def test_the_figure_names_matplotlib_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_maps needs matplotlib"):
        plot_maps(images(), make().maps(images()))


def test_the_figure_undoes_the_normalisation():
    x = torch.rand(1, 3, 16, 16)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    shown = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    figure = plot_maps(shown, make().maps(shown.double()), mean=mean, std=std.tolist())
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn, x[0].permute(1, 2, 0).numpy(), atol=1e-6)


def test_the_figure_has_content(tmp_path):
    model = make()
    figure = plot_maps(images(), model.maps(images()), path=tmp_path / "maps.png")
    assert len(figure.axes) == 10
    assert all(np.ptp(np.asarray(axis.images[0].get_array())) > 0 for axis in figure.axes)
    assert (tmp_path / "maps.png").stat().st_size > 5000
