"""The constructors of TOAST's code: sizes, what a call gives, what they load."""

from __future__ import annotations

import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("timm")
import foveate.compat
from foveate.compat import toast as compat

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_the_sizes_are_those_of_the_names(name):
    build = getattr(foveate.compat.toast, f"vit_topdown_{name}_patch16_224")
    assert str(inspect.signature(build)).partition(" ->")[0] == (
        "(pretrained: 'bool' = False, cfg: 'Any' = None, prompt_cfg: 'Any' = None, *, "
        "img_size: 'int' = 224, drop_path_rate: 'float' = 0.0, "
        "init_values: 'float | None' = None)"
    )
    width, depth, heads = SIZES[name]
    with torch.device("meta"):
        model, c = build(drop_path_rate=0.1, init_values=1e-4)
    assert c == width
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (depth, heads)
    assert model.blocks[0].attn.qkv.bias is not None
    assert model.pos_embed.shape == (1, 197, width)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert model.blocks[0].ls1.gamma.shape == (width,)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("head" in key for key in model.state_dict())


def test_a_call_gives_features_and_maps_if_they_are_wanted():
    torch.manual_seed(0)
    model, c = compat.vit_topdown_tiny_patch16_224(img_size=32)
    x = torch.randn(2, 3, 32, 32)
    features, nothing = model.eval()(x)
    assert nothing is None
    assert features.shape == (2, c)
    torch.testing.assert_close(features, model.forward_features(x)[:, 0], rtol=1e-4, atol=1e-4)
    features.sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x)[0], features)

    cfg = SimpleNamespace(RETURN_VISUALIZATION=True)
    shown, _ = compat.vit_topdown_tiny_patch16_224(False, cfg, None, img_size=32)
    shown.load_state_dict(model.state_dict())
    got, maps = shown.eval()(x)
    torch.testing.assert_close(got, features)
    torch.testing.assert_close(maps.attention, model.maps(x).attention)
    assert maps.selection.shape == (2, 2, 2)


def test_pretrained_loads_the_file_that_cfg_names(tmp_path):
    source, _ = compat.vit_topdown_tiny_patch16_224(img_size=32)
    state = {k: v for k, v in source.state_dict().items() if k != "top_down_transform"}
    state["head.weight"] = torch.zeros(10, 192)
    torch.save({"model": state}, tmp_path / "toast.pth")
    cfg = SimpleNamespace(MODEL=SimpleNamespace(MODEL_ROOT=str(tmp_path / "toast.pth")))
    model, _ = compat.vit_topdown_tiny_patch16_224(True, cfg, img_size=32)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    with pytest.raises(RuntimeError, match="pos_embed must have size"):
        compat.vit_topdown_tiny_patch16_224(True, cfg, img_size=48)
    for empty in (None, SimpleNamespace(MODEL=SimpleNamespace(MODEL_ROOT=""))):
        with pytest.raises(ValueError, match=r"cfg\.MODEL\.MODEL_ROOT, got"):
            compat.vit_topdown_tiny_patch16_224(True, empty)
