"""Checkpoints of TOAST models: every layout, merged factors, files that do not fit."""

from __future__ import annotations

import copy

import pytest
import torch

timm = pytest.importorskip("timm")
from toast_models import make, vit  # noqa: E402

from foveate.methods.toast import load_toast_checkpoint  # noqa: E402
from foveate.methods.toast.decoders import matrix  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layout", ["flat", "released", "trained"])
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_every_layout_loads(tmp_path, layout, wrapped):
    model, source = make(), make(embed_dim=24)
    state = {k: v + 0.5 for k, v in source.state_dict().items() if k != "top_down_transform"}
    if layout == "trained":
        state = {
            (k.replace("head.", "head.last_layer.") if k.startswith("head.") else f"enc.{k}"): v
            for k, v in state.items()
        }
    state = {wrapped + k: v for k, v in state.items()}
    key = {"flat": None, "released": "model", "trained": "model_state_dict"}[layout]
    torch.save(state if key is None else {key: state}, tmp_path / "toast.pth")
    report = load_toast_checkpoint(model.fold(), tmp_path / "toast.pth")
    assert report == (layout, ("top_down_transform",), (), False)
    assert not model.folded
    torch.testing.assert_close(model.prompt, source.prompt + 0.5)
    torch.testing.assert_close(model.head.weight, source.head.weight + 0.5)
    assert torch.equal(model.top_down_transform, torch.eye(24).double())


@pytest.mark.parametrize("merged", [None, True, False])
def test_a_merged_base_matrix_is_unmerged_once(merged):
    source = make("toast-lite")
    state = dict(source.state_dict())
    for name, layer in source.named_modules():
        if hasattr(layer, "lora_A") and merged is not False:
            state[f"{name}.weight"] = matrix(layer, torch.float64)
    for mode in (True, False):
        model = make("toast-lite").train(mode)
        file = {"model_state_dict": {f"enc.{k}": v for k, v in state.items() if "head" not in k}}
        report = load_toast_checkpoint(model, file, lora_merged=merged)
        assert report.lora_unmerged == (merged is not False)
        model.eval().train().eval()
        for got, want in zip(model.decoders, source.decoders, strict=True):
            for layer, original in ((got.linear, want.linear), (got.linear2, want.linear2)):
                torch.testing.assert_close(layer.weight, original.weight)
                torch.testing.assert_close(
                    matrix(layer, torch.float64), matrix(original, torch.float64)
                )


def test_a_file_that_does_not_fit_changes_nothing():
    model = make()
    before = copy.deepcopy(model.state_dict())
    good = {k: v + 1 for k, v in model.state_dict().items()}
    plain = {k: v for k, v in good.items() if not k.startswith("decoders.")}
    deep = {k: v + 1 for k, v in make(depth=4).state_dict().items()}
    wide = {k: v + 1 for k, v in make(embed_dim=48).state_dict().items()}
    conv = {k: v[..., None, None] if "decoders" in k else v for k, v in good.items()}
    less = {k: v for k, v in good.items() if k != "prompt"}
    for state, match in (
        (plain, "bottom-up"),
        (deep, "4 decoders, the model 3"),
        (wide, "size"),
        (conv, "ConvNeXt"),
        (dict(make("toast-lite").state_dict()), 'method="toast-lite"'),
        (less, "missing keys.*prompt"),
        ({**good, "more": torch.ones(1)}, "unknown keys.*more"),
        ({"model_state_dict": {"head.projection.0.weight": torch.ones(1)}}, "MLP heads"),
    ):
        with pytest.raises(RuntimeError, match=match):
            load_toast_checkpoint(model, state)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
    report = load_toast_checkpoint(model, {**less, "more": torch.ones(1)}, strict=False)
    assert report == ("flat", ("prompt",), ("more",), False)


def test_a_file_with_objects_is_read_only_on_trust(tmp_path):
    state = make().state_dict()
    torch.save({"model": state, "trainer": vit()}, tmp_path / "objects.pth")
    model = make()
    with pytest.raises(RuntimeError, match="weights_only=False, only for files you trust"):
        load_toast_checkpoint(model, tmp_path / "objects.pth")
    report = load_toast_checkpoint(model, tmp_path / "objects.pth", weights_only=False)
    assert report.layout == "released"


def test_a_float32_base_is_unmerged_in_float64():
    source = make("toast-lite").float()
    state = {k: v.clone() for k, v in source.state_dict().items()}
    layer = source.decoders[1].linear2
    merged = matrix(layer, torch.float64).float()
    state["decoders.1.linear2.weight"] = merged
    model = make("toast-lite").float()
    load_toast_checkpoint(model, state, lora_merged=True)
    product = layer.lora_scale * (layer.lora_B.double() @ layer.lora_A.double())
    want = (merged.double() - product).float()
    assert torch.equal(model.decoders[1].linear2.weight, want)
    assert torch.equal(source.state_dict()["decoders.1.linear2.weight"], layer.weight)


def test_factors_a_plain_file_lacks_and_a_head_the_model_lacks_are_reported():
    lite = make("toast-lite")
    plain = dict(make().state_dict().items())
    report = load_toast_checkpoint(lite, plain)
    assert len(report.missing) == 12
    assert all(".lora_" in key for key in report.missing)
    assert not report.lora_unmerged
    part = {k: v for k, v in lite.state_dict().items() if k != "decoders.1.linear.lora_A"}
    with pytest.raises(RuntimeError, match=r"missing keys.*decoders\.1\.linear\.lora_A"):
        load_toast_checkpoint(lite, part)
    report = load_toast_checkpoint(make(num_classes=0), plain)
    assert report.ignored == ("head.weight", "head.bias")
    headless = {k: v for k, v in plain.items() if "head" not in k}
    assert load_toast_checkpoint(make(), headless).missing == ("head.weight", "head.bias")


def test_a_refused_load_keeps_a_fold_and_a_load_drops_it():
    model = make().fold()
    with pytest.raises(RuntimeError, match="bottom-up"):
        load_toast_checkpoint(model, {"head.weight": torch.ones(1)})
    assert model.folded
    load_toast_checkpoint(model, model.state_dict())
    assert not model.folded


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(TypeError, match="model must be a ToastViT, got VisionTransformer"):
        load_toast_checkpoint(vit(), {})
    with pytest.raises(RuntimeError, match="must map names to tensors, got int at 'epoch'"):
        load_toast_checkpoint(make(), {"epoch": 3})
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(RuntimeError, match="must hold a dict, got list"):
        load_toast_checkpoint(make(), tmp_path / "list.pth")
