"""TOAST on timm's ViTs: the published formulation, what trains, folds, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import ResPostBlock, VisionTransformer  # noqa: E402
from toast_models import BACKBONES, images, make, oracle, vit  # noqa: E402

from foveate.methods.toast import pretraining_loss, toast  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.decoders[0].linear.lora_B,
        lambda m: m.decoders[2].linear2.weight,
        lambda m: m.top_down_transform,
        lambda m: m.blocks[1].attn.qkv.weight,
    ],
)
def test_a_stale_fold_is_refused(change):
    model, x = make("toast-lite").fold(), images()
    with torch.no_grad():
        change(model).mul_(2)
    with pytest.raises(RuntimeError, match=r"fold\(\)"):
        model(x)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"fold\(\)"):
            model(x)
        got = model.fold()(x)
        torch.testing.assert_close(got, model.unfold()(x), rtol=1e-11, atol=1e-11)


def test_a_move_a_load_and_training_drop_a_fold():
    model = make().fold()
    assert not model.float().folded
    model.fold().load_state_dict(model.state_dict())
    assert not model.folded
    assert model.fold().eval().folded
    assert not model.train().folded
    model.fold()
    model.decoders[0].linear.weight.data = model.decoders[0].linear.weight.data.clone()
    model(images().float())
    assert not model.folded


def test_half_weights_are_folded_in_float32():
    model = make("toast-lite").to(torch.bfloat16).fold()
    with torch.no_grad():
        want = model._fold
        model.float().fold()
    assert want.dtype == torch.bfloat16
    assert torch.equal(want, model._fold.to(torch.bfloat16))


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
    assert base.head.out_features == 5
    assert model.train().blocks[0] is not base.blocks[0]
    assert not any(module.training for module in base.modules())


def test_a_seeded_generator_fixes_the_start():
    one, two = (
        toast(vit(), "toast-lite", generator=torch.Generator().manual_seed(7)) for _ in "ab"
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.decoders[0].linear.lora_A.abs().max() <= 24**-0.5
    assert one.decoders[0].linear.lora_A.any()
    assert not one.decoders[0].linear.lora_B.any()
    assert torch.equal(one.top_down_transform, torch.eye(24).double())
    assert 0.01 < one.decoders[1].linear2.weight.std() < 0.03
    assert 0.5 < one.prompt.std() < 1.5


def test_copies_and_pickles_give_the_same_logits():
    model = make().fold()
    want = model.unfold()(images())
    for other in (copy.deepcopy(model.fold()), pickle.loads(pickle.dumps(model))):
        assert not other.folded
        torch.testing.assert_close(other(images()), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"drop_path_rate": 0.5}, {"proj_drop_rate": 0.3}, {"pos_drop_rate": 0.3}, {}]
)
def test_reuse_leaves_the_draws_of_the_published_order(options):
    model, x = make(**options).train(), images(4)
    torch.manual_seed(5)
    want = oracle(model, x)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["toast", "end2end"])
@pytest.mark.parametrize("name", ["token", "qk_norm", "depth 1"])
def test_block_0_projects_once_and_the_last_block_asks_once(name, method, monkeypatch):
    model, x = make(method, **BACKBONES[name]), images()
    calls, rows = [], []
    model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    model.blocks[-1].mlp.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    trained = [p for p in model.parameters() if p.requires_grad]

    def outcome():
        calls.clear(), rows.clear()
        logits = model(x)
        return [logits, *torch.autograd.grad(logits.square().sum(), trained, allow_unused=True)]

    got = outcome()
    assert (len(calls), rows) == (1, [17, 1])
    monkeypatch.setattr(type(model), "_shares_block_0", lambda _: False)
    monkeypatch.setattr(type(model), "_queries", lambda *_: None)
    want = outcome()
    assert (len(calls), rows) == (2, [17, 17])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_every_token_of_the_last_block_is_made_where_it_is_asked_for():
    model, x = make(), images()
    everything = torch.ones(17, 17, dtype=torch.bool)
    want = model.forward_head(model.forward_features(x))
    for got in (
        model(x),
        model(x, attn_mask=everything),
        model(x, return_aux=True, var_loss=True).logits,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(x, is_causal=True), want)


def test_a_mask_reaches_both_passes():
    model, x = make(), images()
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) < 0.7
    mask.fill_diagonal_(True)
    first = model.first_pass(x, attn_mask=mask)
    out = model(x, attn_mask=mask, return_aux=True)
    torch.testing.assert_close(out.first_pass, first, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(first, model.first_pass(x))
    bias = torch.zeros(17, 17).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(model(x, attn_mask=bias), out.logits, rtol=1e-10, atol=1e-10)


def test_one_process_of_ddp_gives_the_same_gradients():
    model, x = make(), images()
    model(x).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        ddp(x).sum().backward()
        with pytest.raises(TypeError, match=r"pass \.module"):
            toast(ddp)
    finally:
        torch.distributed.destroy_process_group()
    assert set(want) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in want.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("name", ["token", "qk_norm", "average"])
def test_float32_models_run_on_the_named_kernels(name):
    pytest.importorskip("foveate._cpu")
    exact, x = make(**BACKBONES[name]), images()
    model = copy.deepcopy(exact).float()
    model.toast_backend = "cpu"
    trained = [p for p in exact.parameters() if p.requires_grad]
    want = oracle(exact, x)
    slopes = torch.autograd.grad(want.square().sum(), trained)
    got = model(x.float())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    found = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(got.square().sum(), found), slopes, strict=True):
        assert (a.double() - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(x.float()), got, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.fold()(x.float()), got, rtol=1e-4, atol=1e-4)


def test_the_product_by_a_frozen_identity_is_skipped_until_it_changes():
    model = toast(vit())
    tokens = model.first_pass(images())
    assert model._transform() is None
    z, mask = model.select(tokens)
    assert torch.equal(z, mask * tokens)
    with torch.no_grad():
        model.top_down_transform[0, 1] = 0.5
    assert model._transform() is model.top_down_transform
    torch.testing.assert_close(model.select(tokens)[0], (mask * tokens) @ model.top_down_transform)
    assert toast(vit(), train_transform=True)._transform() is not None


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
    ran = []
    model.blocks[2].register_forward_pre_hook(lambda *_: ran.append(2))
    model.blocks[2].mlp.register_forward_hook(lambda *_: ran.append(2))
    last, (first,) = model.forward_intermediates(
        x, [0], stop_early=True, output_fmt="NLC", return_prefix_tokens=True
    )
    assert ran == [2]  # in pass 1 alone
    torch.testing.assert_close(last[:, 2:], model.norm(torch.cat(first[::-1], 1))[:, 2:])
    named = model.forward_intermediates(x, [1], output_dict=True, return_prefix_tokens=True)
    assert set(named) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    torch.testing.assert_close(named["image_features"], final)
    with pytest.raises(ValueError, match="output_fmt must be one of 'NCHW', 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


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


class _Subclass(VisionTransformer):
    pass


def _gated():
    model = vit()
    model.blocks[1].attn.gate = torch.nn.Linear(24, 24)
    return model


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
        (lambda: toast(vit(), lora_r=1.5), TypeError, "lora_r"),
        (lambda: toast(vit(), lora_alpha="1"), TypeError, "lora_alpha"),
        (lambda: toast(vit(), num_classes=-1), ValueError, "num_classes"),
        (lambda: toast(vit(), train_transform=1), ValueError, "train_transform"),
        (lambda: toast(vit(), backend="gpu"), ValueError, "backend"),
        (lambda: toast(vit(block_fn=ResPostBlock)), TypeError, "got ResPostBlock"),
        (lambda: toast(_gated()), TypeError, "gate"),
        (lambda: toast(vit(attn_layer="diff", embed_dim=32)), TypeError, "DiffAttention"),
    ],
)
def test_models_that_cannot_be_steered_are_named(build, error, match):
    with pytest.raises(error, match=match):
        build()
