"""The drop-in losses against the installed open_clip, on equal inputs."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch

import foveate.compat.open_clip as ours
from foveate.nn import ClipLoss, SigLipLoss

loss = pytest.importorskip("open_clip.loss")


def _inputs(dtype=torch.float32, n=37, d=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(n, d, generator=generator)).to(dtype)
    y = torch.nn.functional.normalize(torch.randn(n, d, generator=generator)).to(dtype)
    scalars = torch.tensor(8.0), torch.tensor(-3.0)
    return [t.requires_grad_() for t in (x, y, *scalars)]


def _value_and_gradients(module, inputs):
    value = module(*inputs)
    return value, torch.autograd.grad(value, inputs, allow_unused=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_sigmoid_module_has_open_clips_value_and_gradients(backend):
    inputs = _inputs()
    value, gradients = _value_and_gradients(SigLipLoss(backend=backend), inputs)
    expected, wanted = _value_and_gradients(loss.SigLipLoss(), inputs)
    torch.testing.assert_close(value, expected)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_softmax_module_has_open_clips_value_and_gradients(backend):
    inputs = _inputs()
    value, gradients = _value_and_gradients(ClipLoss(backend=backend), inputs)
    expected, wanted = _value_and_gradients(loss.ClipLoss(), inputs)
    torch.testing.assert_close(value, expected)
    for gradient, want in zip(gradients[:3], wanted[:3], strict=True):
        torch.testing.assert_close(gradient, want)
    assert gradients[3] is not None, "a parameter without a gradient fails DDP"
    assert gradients[3].item() == 0


@pytest.mark.parametrize(
    ("mine", "theirs"), [(SigLipLoss, loss.SigLipLoss), (ClipLoss, loss.ClipLoss)]
)
def test_the_installed_signatures_are_a_prefix_of_ours(mine, theirs):
    for function in ("__init__", "forward", "get_logits", "get_ground_truth"):
        want = list(inspect.signature(getattr(theirs, function)).parameters.values())
        have = list(inspect.signature(getattr(mine, function)).parameters.values())
        assert [p.name for p in have[: len(want)]] == [p.name for p in want]
        for left, right in zip(have, want, strict=False):
            if right.default is not inspect.Parameter.empty:
                assert left.default == right.default


@pytest.mark.parametrize(
    ("mine", "theirs"), [(SigLipLoss, loss.SigLipLoss), (ClipLoss, loss.ClipLoss)]
)
def test_the_modules_carry_open_clips_attributes_and_can_be_pickled(mine, theirs):
    module = pickle.loads(pickle.dumps(mine()))
    public = {k: v for k, v in vars(theirs()).items() if not k.startswith("_")}
    assert {k: getattr(module, k) for k in public} == public
    assert not list(module.parameters())
    assert not list(module.buffers())


def test_what_subclasses_call_agrees_with_open_clip():
    x, y, scale, bias = (t.detach() for t in _inputs(n=5))
    device = x.device
    torch.testing.assert_close(
        SigLipLoss().get_logits(x, y, scale, bias), loss.SigLipLoss().get_logits(x, y, scale, bias)
    )
    for negative_only in (False, True):
        arguments = device, x.dtype, 5, negative_only
        have = SigLipLoss().get_ground_truth(*arguments)
        assert torch.equal(have, loss.SigLipLoss().get_ground_truth(*arguments))
    for have, want in zip(
        ClipLoss().get_logits(x, y, scale), loss.ClipLoss().get_logits(x, y, scale), strict=True
    ):
        torch.testing.assert_close(have, want)
    options = {"local_loss": True, "rank": 2, "world_size": 4}
    have = ClipLoss(**options).get_ground_truth(device, 5)
    assert torch.equal(have, loss.ClipLoss(**options).get_ground_truth(device, 5))


@pytest.mark.parametrize("module", [SigLipLoss, ClipLoss])
def test_output_dict_holds_the_loss_alone(module):
    inputs = _inputs(n=4)
    assert module()(*inputs, output_dict=True) == {"contrastive_loss": module()(*inputs)}


def test_chunk_size_and_dist_impl_change_no_bit():
    inputs = _inputs()
    value = SigLipLoss()(*inputs)
    for options in ({"chunk_size": 7}, {"dist_impl": "gather"}, {"cache_labels": True}):
        assert torch.equal(SigLipLoss(**options)(*inputs), value)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SigLipLoss(dist_impl="tree"), ValueError, "dist_impl must be one of .*'shift'"),
        (lambda: SigLipLoss(chunk_size=-1), ValueError, "chunk_size must be at least 0, got -1"),
        (lambda: SigLipLoss(chunk_size=1.5), TypeError, "chunk_size must be an int"),
        (lambda: ClipLoss(use_horovod=True), ValueError, "use_horovod must be False"),
        (lambda: SigLipLoss(world_size=2)(*_inputs()), RuntimeError, "init_process_group"),
        (lambda: ClipLoss(world_size=2)(*_inputs()), RuntimeError, "not initialised"),
    ],
)
def test_bad_arguments_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_patched_replaces_both_classes_everywhere_and_gives_them_back():
    import open_clip
    import open_clip.factory

    originals = loss.SigLipLoss, loss.ClipLoss

    def fail_inside():
        with ours.patched():
            assert loss.SigLipLoss is SigLipLoss
            assert open_clip.factory.SigLipLoss is SigLipLoss
            assert open_clip.ClipLoss is ClipLoss
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert (loss.SigLipLoss, loss.ClipLoss) == originals
    assert open_clip.factory.SigLipLoss is originals[0]
    assert open_clip.ClipLoss is originals[1]


def test_open_clips_own_factory_builds_and_trains_with_the_drop_ins():
    import argparse

    import open_clip

    args = argparse.Namespace(
        distill=False,
        model="ViT-B-32",
        siglip=False,
        local_loss=False,
        gather_with_grad=False,
        rank=0,
        world_size=1,
        horovod=False,
        loss_dist_impl=None,
    )
    torch.manual_seed(0)
    image, text = torch.randn(32, 6), torch.randn(32, 6)
    for siglip in (False, True):
        args.siglip = siglip
        with ours.patched():
            criterion = open_clip.factory.create_loss(args)
        assert isinstance(criterion, SigLipLoss if siglip else ClipLoss)
        tower = torch.nn.Linear(6, 8)
        optimizer = torch.optim.SGD(tower.parameters(), 0.5)
        curve = []
        for _ in range(20):
            x, y = (torch.nn.functional.normalize(tower(t)) for t in (image, text))
            value = criterion(x, y, torch.tensor(5.0), torch.tensor(-3.0), output_dict=True)
            optimizer.zero_grad()
            value["contrastive_loss"].backward()
            optimizer.step()
            curve.append(value["contrastive_loss"].item())
        assert curve[-1] < curve[0]


def test_patched_names_open_clip_where_it_cannot_be_imported(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip.loss", None)
    with pytest.raises(ImportError, match="open_clip"), ours.patched():
        raise AssertionError("patched() went on without open_clip")
