"""TOAST on timm's ViTs: the published formulation, what trains, checkpoints, folds, maps."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from foveate.methods.toast import (  # noqa: E402
    load_toast_checkpoint,
    overlay,
    plot_maps,
    pretraining_loss,
    toast,
)


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    model = VisionTransformer(**{**settings, "num_classes": 5, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(method="toast", **options):
    names = ("td_bias", "num_classes", "lora_r")
    given = {name: options.pop(name) for name in names if name in options}
    model = toast(vit(**options), method, generator=torch.Generator().manual_seed(1), **given)
    with torch.no_grad():
        for parameter in model.decoders.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.top_down_transform.add_(0.1 * torch.randn_like(model.top_down_transform))
    return model


def images(b=2, h=16, w=16):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(3)).double()


def oracle(model, x, td_bias="twice"):
    """The published formulation: the whole qkv(td), explicit softmax, all tokens, no reuse."""

    def run(signals):
        y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for i, block in enumerate(model.blocks):
            attn, t = block.attn, block.norm1(y)
            b, n, _ = t.shape

            def split(u, attn=attn, b=b, n=n):
                return u.view(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)

            q, k, v = split(attn.qkv(t))
            if signals is not None:
                bias = attn.qkv.bias if td_bias == "twice" else None
                v = v + split(F.linear(signals[i], attn.qkv.weight, bias))[2]
            q, k = attn.q_norm(q), attn.k_norm(k)
            p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            o = attn.proj(attn.norm((p @ v).transpose(1, 2).reshape(b, n, -1)))
            y = y + block.ls1(o)
            y = y + block.ls2(block.mlp(block.norm2(y)))
        return model.norm(y)

    first = run(None)
    cosine = F.normalize(first, dim=-1) @ F.normalize(model.prompt, dim=0)
    z = (first * cosine.clamp(0, 1).unsqueeze(-1)) @ model.top_down_transform
    signals = [None] * len(model.blocks)
    for i in reversed(range(len(model.blocks))):
        left, right = model.decoders[i].matrices()
        z = z @ left.T
        signals[i] = z @ right.T
    return model.forward_head(run(signals))


BACKBONES = {
    "token": {},
    "average": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers and LayerScale": {"reg_tokens": 2, "init_values": 0.5},
    "qk_norm": {"qk_norm": True, "scale_attn_norm": True},
    "depth 1": {"depth": 1},
    "grid 4 x 6": {"img_size": (16, 24)},
    "pre_norm, no bias": {"pre_norm": True, "qkv_bias": False},
}


@pytest.mark.parametrize("method", ["toast", "toast-lite", "end2end"])
@pytest.mark.parametrize("name", list(BACKBONES))
def test_logits_and_gradients_are_those_of_the_published_formulation(name, method):
    model = make(method, **BACKBONES[name])
    x = images(w=24) if name == "grid 4 x 6" else images()
    trained = [p for p in model.parameters() if p.requires_grad]
    got, want = model(x), oracle(model, x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), trained, allow_unused=True),
        torch.autograd.grad(want.square().sum(), trained, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_bias_counts_once_or_twice():
    x = images()
    once = make(td_bias="once")
    torch.testing.assert_close(once(x), oracle(once, x, "once"), rtol=1e-10, atol=1e-10)
    assert (once(x) - oracle(once, x, "twice")).abs().max() > 1e-4


@pytest.mark.parametrize("name", list(BACKBONES))
def test_folded_inference_equals_the_chain_of_decoders(name):
    model, x = make("toast-lite", **BACKBONES[name]), images(w=24 if "6" in name else 16)
    with torch.no_grad():
        want = model(x)
        assert model.fold().folded
        torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-11)
        assert model(x, return_aux=True).td is None
    torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-11)  # with a graph: the chain
    assert not any("fold" in key for key in model.state_dict())
    assert not model.train().folded


def test_a_stale_fold_is_refused():
    model = make().fold()
    with torch.no_grad():
        model.decoders[0].linear.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"fold\(\)"):
            model(images())
        model.fold()(images())
    assert not model.float().folded


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("toast", {"decoders", "prompt", "head"}),
        ("toast-lite", {"decoders", "prompt", "top_down_transform", "head"}),
        ("frozen", {"head"}),
    ],
)
def test_what_trains_is_the_methods_rule_and_pass_1_has_no_graph(method, trained):
    model = make(method)
    names = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert names == trained
    if method == "toast-lite":
        assert not any(
            p.requires_grad for n, p in model.decoders.named_parameters() if n.endswith("weight")
        )
    assert not model.first_pass(images()).requires_grad
    assert make("end2end").first_pass(images()).requires_grad


def test_the_vit_stays_plain_and_shares_its_tensors():
    base = vit()
    want, keys = base(images()), set(base.state_dict())
    model = toast(base, num_classes=7)
    assert type(base) is VisionTransformer
    assert isinstance(model, VisionTransformer)
    assert set(base.state_dict()) == keys
    torch.testing.assert_close(base(images()), want, rtol=0, atol=0)
    assert model.blocks[0].attn.qkv.weight is base.blocks[0].attn.qkv.weight
    assert model(images()).shape == (2, 7)
    assert "decoders.2.linear2.weight" in model.state_dict()


def test_copies_and_pickles_give_the_same_logits():
    model = make().fold()
    want = model.unfold()(images())
    for other in (copy.deepcopy(model.fold()), pickle.loads(pickle.dumps(model))):
        assert not other.folded
        torch.testing.assert_close(other(images()), want, rtol=0, atol=0)


def test_checkpointing_and_seeded_drop_path_do_not_change_the_result():
    model = make(drop_path_rate=0.4).train()
    torch.manual_seed(5)
    want = model(images(8))
    torch.manual_seed(6)
    assert not torch.equal(model(images(8)), want)
    model.set_grad_checkpointing()
    torch.manual_seed(5)
    got = model(images(8))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert model.prompt.grad is not None


def test_intermediates_are_the_blocks_of_pass_2():
    model, x = make(reg_tokens=1), images()
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 4)] * 3
    torch.testing.assert_close(maps[-1].flatten(2).mT, final[:, 2:])
    assert len(model.get_intermediate_layers(x, 2)) == 2


def test_var_loss_teaches_only_linear():
    model = make("end2end")
    with pytest.raises(ValueError, match="return_aux"):
        model(images(), var_loss=True)
    out = model(images(), return_aux=True, var_loss=True)
    out.var_loss.backward(retain_graph=True)
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert names == {f"decoders.{i}.linear.weight" for i in range(3)}
    target = torch.tensor([0, 3])
    both = F.cross_entropy(out.logits, target) + F.cross_entropy(out.first_logits, target)
    torch.testing.assert_close(pretraining_loss(out, target), both / 2 + 0.1 * out.var_loss)


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
            state[f"{name}.weight"] = layer.matrix()
    for mode in (True, False):
        model = make("toast-lite").train(mode)
        file = {"model_state_dict": {f"enc.{k}": v for k, v in state.items() if "head" not in k}}
        report = load_toast_checkpoint(model, file, lora_merged=merged)
        assert report.lora_unmerged == (merged is not False)
        model.eval().train().eval()
        for got, want in zip(model.decoders, source.decoders, strict=True):
            torch.testing.assert_close(got.matrices(), want.matrices())
            torch.testing.assert_close(got.linear.weight, want.linear.weight)


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


def test_a_file_with_objects_is_refused(tmp_path):
    torch.save({"model": vit()}, tmp_path / "objects.pth")
    with pytest.raises(RuntimeError, match="weights_only=False"):
        load_toast_checkpoint(make(), tmp_path / "objects.pth")


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
        torch.testing.assert_close(got.double().flatten(2), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps.feature_norm.flatten(1), tokens[:, p:].norm(dim=-1))
    assert maps.selection.shape == (2, 4, 4)


def test_overlay_follows_its_formula():
    image = np.full((4, 6, 3), 0.5)
    heat = np.array([[0.0, 1.0], [1.0, 1.0]])
    got = overlay(image, heat, alpha=0.5)
    assert got.dtype == np.uint8
    assert got[0, 0].tolist() == [128, 128, 128]
    assert got[0, 3].tolist() == [191, 64, 64]
    flat = np.full((2, 2, 3), 7, np.uint8)
    assert np.array_equal(overlay(flat, torch.ones(1, 2)), flat)


def test_the_figure_has_content(tmp_path):
    model = make()
    figure = plot_maps(images(), model.maps(images()), path=tmp_path / "maps.png")
    assert len(figure.axes) == 10
    assert all(np.ptp(np.asarray(axis.images[0].get_array())) > 0 for axis in figure.axes)
    assert (tmp_path / "maps.png").stat().st_size > 5000


class _Subclass(VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: toast(torch.nn.Linear(2, 2)), TypeError, "VisionTransformer, got Linear"),
        (lambda: toast(_Subclass(img_size=16, depth=1)), TypeError, "got _Subclass"),
        (lambda: toast(make()), TypeError, "already"),
        (lambda: toast(torch.nn.DataParallel(vit())), TypeError, "pass .module"),
        (lambda: toast(vit(patch_drop_rate=0.1)), ValueError, "patch_drop_rate"),
        (lambda: toast(vit(attn_drop_rate=0.1)), ValueError, "attn_drop_rate"),
        (lambda: toast(vit(), "fast"), ValueError, "method must be one of 'toast'"),
        (lambda: toast(vit(), td_bias="no"), ValueError, "td_bias"),
        (lambda: toast(vit(), lora_r=0), ValueError, "lora_r"),
        (lambda: toast(vit(attn_layer="diff", embed_dim=32)), TypeError, "DiffAttention"),
    ],
)
def test_models_that_cannot_be_steered_are_named(build, error, match):
    with pytest.raises(error, match=match):
        build()
