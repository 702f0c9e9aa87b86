import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.layer_scale import LayerScale, LayerScale2d
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf
from timm.models.gcvit import GlobalContextVit, WindowAttentionGlobal
from timm.models.tiny_vit import Attention as TinyVitAttention
from torch import nn

from vitrail.deploy import inference, optimise
from vitrail.deploy.inference import (
    FixedBias,
    FusedGlobalAttention,
    FusedTinyVitAttention,
    Prepared,
    _attention,
    _folds,
    _packings,
    _Work,
)
from vitrail.errors import InputError


def moved(model, seed=1):
    """Move all that begins at zero or one, statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for value in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        value.data += 0.4 * torch.rand(value.shape, generator=generator)
    model.eval()  # TinyViT's attention returns nothing here
    return model


@pytest.fixture
def faster(monkeypatch):
    """Let every measured step be found faster: times are of the machine."""
    monkeypatch.setattr(_Work, "race", lambda self, *nets: [float(len(nets) - place) for place in range(len(nets))])
    monkeypatch.setattr(inference, "_gains", lambda *args: True)


class Net(nn.Module):
    """All that can be folded, once."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.bn2 = BatchNormAct2d(8, act_layer=nn.GELU)
        self.before = nn.BatchNorm2d(8, affine=False)
        self.point = nn.Conv2d(8, 12, 1, groups=2)
        self.scale2d = LayerScale2d(12)
        self.fc = nn.Linear(12, 6)
        self.drop = nn.Dropout(0.5)
        self.scale = LayerScale(6)
        self.rows = nn.Linear(6, 5, bias=False)
        self.last = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.bn2(self.conv2(self.act(self.bn(self.conv(x)))))
        x = self.scale2d(self.point(self.before(x)))
        x = self.scale(self.drop(self.fc(x.mean((2, 3)))))
        return self.last(self.rows(x))


class Traps(nn.Module):
    """Nothing here may be folded."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(3, 4, 1)
        self.bn_twice = nn.BatchNorm2d(4)
        self.before = nn.BatchNorm2d(4)
        self.padded = nn.Conv2d(4, 4, 3, padding=1)
        self.between = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.bn_shared = nn.BatchNorm2d(4)
        self.active = BatchNormAct2d(4, act_layer=nn.ReLU)
        self.point = nn.Conv2d(4, 4, 1)
        self.given = nn.Conv2d(4, 4, 1)
        self.bn_given = nn.BatchNorm2d(4)
        self.own = nn.Conv2d(4, 4, 3, padding=1)
        self.bn_own = nn.BatchNorm2d(4, track_running_stats=False)
        self.tokens = nn.Linear(4, 4)
        self.bn_tokens = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.twice(x)
        x = self.bn_twice(x) + x
        x = self.padded(self.before(x))
        x = self.between(F.relu(x))
        x = self.bn_shared(self.shared(x)) + self.shared(x)
        x = self.point(self.active(x))
        given = self.given(x)
        x = self.bn_own(self.own(self.bn_given(given)))
        tokens = self.bn_tokens(self.tokens(x.flatten(2)[..., :4]))
        return [given, x, tokens]


def work_on(model, side=9, batch=2):
    return _Work(model, torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)))


# ---- folding


def test_all_that_follows_one_another_is_folded():
    torch.manual_seed(0)
    model = moved(Net())
    work = work_on(model)
    work.attempt("fold", _folds(work.net, work.images))
    step = work.report["fold"]
    assert (step.status, step.layers, step.reason) == ("applied", 6, "")
    assert step.difference < 1e-6
    left = [type(module) for module in work.net.modules()]
    for kind in (nn.BatchNorm2d, nn.BatchNorm1d, BatchNormAct2d, LayerScale, LayerScale2d):
        assert kind not in left
    assert isinstance(work.net.bn2, nn.GELU)
    images = torch.randn(3, 3, 12, 7)
    torch.testing.assert_close(work.net(images), model(images), rtol=1e-4, atol=1e-5)


def test_what_is_read_elsewhere_stays():
    torch.manual_seed(0)
    work = work_on(moved(Traps()))
    assert work.net.bn_twice is not None
    assert [change.keywords["link"].taker for change in _folds(work.net, work.images)] == []


def test_following_a_batch_leaves_the_model_as_it_was():
    model = Net().eval()
    inference._follow(model, torch.randn(2, 3, 8, 8))
    assert model.act.inplace
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_change_that_breaks_is_taken_back_and_the_others_stay():
    work = work_on(moved(Net()))

    def good(net):
        net.drop.p = 0.25
        return 2

    def bad(net):
        net.fc.weight.data *= 1.001
        return 1

    def fails(net):
        raise RuntimeError("no way")

    before = copy.deepcopy(work.net.state_dict())
    work.attempt("some", [good, bad, fails])
    step = work.report["some"]
    assert (step.status, step.layers) == ("applied", 2)
    assert step.reason == "2 of 3 left out: together, it failed: no way"
    assert work.net.drop.p == 0.25
    assert all(torch.equal(value, before[key]) for key, value in work.net.state_dict().items())
    work.attempt("none", [bad])
    assert work.report["none"].status == "refused"
    assert "1e-04 is allowed" in work.report["none"].reason
    work.attempt("empty", [])
    assert work.report["empty"].status == "not needed"


def test_what_is_no_faster_is_taken_back(monkeypatch):
    work = work_on(moved(Net()))
    monkeypatch.setattr(_Work, "race", lambda self, *nets: [1.0, 0.99])

    def change(net):
        net.drop.p = 0.25
        return 1

    work.attempt("slow", [change], measured=True)
    assert work.report["slow"].reason == "no faster here: 1.01x"
    assert work.net.drop.p == 0.5


@pytest.mark.parametrize(
    ("after", "precision", "kept"), [(1.0, "fp32", False), (0.9, "fp32", True), (2.0, "bf16", True)]
)
def test_what_is_slower_in_the_end_is_not_kept_unless_it_was_asked_for(monkeypatch, after, precision, kept):
    model = moved(Net())
    monkeypatch.setattr(_Work, "race", lambda self, *nets: [0.95, after])
    done = optimise(model, images=torch.randn(2, 3, 8, 8), precision=precision)
    assert done.report.precision == (precision if kept else "fp32")
    assert isinstance(done.model.net.bn, nn.Identity) == kept
    if kept:
        assert done.report.ratio == 0.95 / after
    else:
        assert done.report["all"].reason == "no faster here: 0.95x; none is kept"
        assert done.report.ratio == 1.0
        assert done.report.difference == 0.0


@pytest.mark.parametrize("wrong", ["shape", "count", "nan"])
def test_outputs_that_do_not_compare_are_no_small_difference(wrong):
    model = moved(Net())
    work = work_on(model)
    twin = {
        "shape": lambda x: model(x)[:1],
        "count": lambda x: [model(x), model(x)],
        "nan": lambda x: model(x) * float("nan"),
    }[wrong]
    assert work.difference(twin) == float("inf")


# ---- attention


def test_a_fixed_bias_is_timms():
    torch.manual_seed(0)
    for layer in (RelPosBias((3, 2), 4), RelPosBiasTf((3, 2), 4)):
        fixed, scores = FixedBias(layer.get_bias()), torch.randn(2, 4, 6, 6)
        assert fixed.get_bias().shape == (1, 4, 6, 6)
        torch.testing.assert_close(fixed(scores), layer(scores))


@pytest.mark.parametrize("use_global", [False, True])
def test_gcvits_attention_is_the_same(use_global):
    torch.manual_seed(0)
    layer = moved(WindowAttentionGlobal(12, 3, (2, 3), use_global=use_global))
    fused, x = FusedGlobalAttention(layer), torch.randn(8, 6, 12)
    for query in (None, torch.randn(2, 6, 12)) if not use_global else (torch.randn(2, 6, 12),):
        torch.testing.assert_close(fused(x, query), layer(x, query), rtol=1e-4, atol=1e-5)


def test_tinyvits_attention_is_the_same():
    torch.manual_seed(0)
    layer = moved(TinyVitAttention(12, 4, num_heads=3, attn_ratio=2, resolution=(2, 3)))
    fused, x = FusedTinyVitAttention(layer), torch.randn(4, 6, 12)
    assert fused.rel_pos.get_bias().shape == (1, 3, 6, 6)
    torch.testing.assert_close(fused(x), layer(x), rtol=1e-4, atol=1e-5)


def test_attention_is_fused_by_its_kind():
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 1, 1, 1), embed_dim=24)
    gcvit = GlobalContextVit(img_size=64, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4), embed_dim=16)
    for model, side, layers in ((swin, 56, 5), (gcvit, 64, 8)):
        work = work_on(moved(model), side)
        work.attempt("fused attention", _attention(work.net))
        step = work.report["fused attention"]
        assert (step.status, step.layers, step.reason) == ("applied", layers, "")
    assert _attention(Net()) == []


# ---- packing


def test_layers_are_packed_with_what_follows_them(faster):
    torch.manual_seed(0)
    work = work_on(moved(Net()))
    work.attempt("fold", _folds(work.net, work.images))
    work.attempt("pack", _packings(work.net, work.images))
    assert work.report["pack"].layers == 5
    assert work.report["pack"].difference < 1e-5
    assert isinstance(work.net.act, nn.Identity)
    assert isinstance(work.net.conv.activation, nn.ReLU)
    assert isinstance(work.net.conv2.activation, nn.GELU)


# ---- the whole


def test_a_model_is_prepared_and_left_alone(faster):
    torch.manual_seed(0)
    model = moved(timm.create_model("resnet18", num_classes=7, layers=(1, 1, 1, 1), channels=(8, 12, 16, 24))).train()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 40, 40, requires_grad=True)
    done = optimise(model, images=images.detach())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = done.report
    found = {step.name: step.status for step in report.steps}
    assert found == {
        "re-parameterise": "not needed",
        "fold": "applied",
        "fused attention": "not needed",
        "channels last": "applied",
        "bf16": "refused",
        "pack": "applied",
        "compile": "not needed",
    }
    assert done.model.channels_last
    assert report.precision == "fp32"
    assert report.difference < report.tolerance == 1e-4
    assert report.batch == (2, 3, 40, 40)
    assert report.ratio == 2.0
    assert report["fold"].layers == 13
    other = torch.randn(3, 3, 33, 50)
    model.eval()
    torch.testing.assert_close(done.model(other), model(other).detach(), rtol=1e-3, atol=1e-4)
    assert not done.model(images).requires_grad
    text = str(report)
    assert "2.00x" in text
    assert "fold: applied, 13 layers" in text
    assert json.loads(json.dumps(report.to_dict()))["steps"][1]["name"] == "fold"


class Doubles(nn.Module):
    """Two branches that become one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.one(x) if self.two is None else self.one(x) + self.two(x)

    def reparameterize(self):
        self.one.weight = nn.Parameter(self.one.weight + self.two.weight)
        self.one.bias = nn.Parameter(self.one.bias + self.two.bias)
        self.two = None


def test_models_that_fold_themselves_are_asked_to(faster):
    torch.manual_seed(0)
    model, images = nn.Sequential(Doubles(), nn.ReLU(), nn.Conv2d(4, 3, 1), Doubles()), torch.randn(1, 3, 8, 8)
    done = optimise(model, images=images, precision="fp32")
    assert done.report["re-parameterise"].layers == 2
    assert done.model.net[0].two is None is not model[0].two
    assert not any(parameter.requires_grad for parameter in done.model.parameters())
    torch.testing.assert_close(done.model(images), model(images).detach(), rtol=1e-4, atol=1e-5)


def test_features_are_prepared_too(faster):
    torch.manual_seed(0)
    model = moved(timm.create_model("resnet10t", features_only=True))
    done = optimise(model, images=torch.randn(1, 3, 32, 32))
    found, expected = done.model(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-3, atol=1e-3)


def test_bf16_is_for_processors_that_have_it(faster, monkeypatch):
    torch.manual_seed(0)
    model, images = moved(Net()), torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(inference, "preferred_precision", lambda: "bf16")
    done = optimise(model, images=images)
    assert done.report.precision == "bf16"
    assert done.report.tolerance == 5e-2
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    assert done.model(images).dtype == torch.float32
    monkeypatch.setattr(inference, "preferred_precision", lambda: "fp32")
    assert "no faster in bf16" in optimise(model, images=images).report["bf16"].reason
    assert optimise(model, images=images, precision="bf16").report.precision == "bf16"
    monkeypatch.setitem(inference.TOLERANCE, "bf16", 1e-9)
    refused = optimise(model, images=images, precision="bf16")
    assert refused.report.precision == "fp32"
    assert "is allowed" in refused.report["bf16"].reason


def test_compiling_wants_a_compiler(faster, monkeypatch):
    model, images = moved(Net()), torch.randn(2, 3, 8, 8)
    asked = []
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: asked.append(dynamic) or net)
    monkeypatch.setattr(inference.shutil, "which", lambda name: "/bin/true")
    done = optimise(model, images=images, compile=True)
    assert done.model.compiled
    assert asked == [False] * len(asked) != []
    assert done.report["compile"].status == "applied"
    assert not any(hasattr(module, "_made_of") for module in done.model.modules()), "the compiler packs by itself"
    torch.testing.assert_close(copy.deepcopy(done.model)(images), model(images).detach(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(inference.shutil, "which", lambda name: None)
    assert "install g++" in optimise(model, images=images, compile=True).report["compile"].reason


def test_it_measures_by_itself():
    torch.manual_seed(0)
    model = moved(timm.create_model("resnet10t", num_classes=3))
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    report = optimise(model).report
    assert report.batch == (2, 3, 32, 32)
    assert report.before_ms > 0 < report.after_ms
    assert report.difference < 1e-4


def test_wrong_arguments_are_refused():
    model = Net().eval()
    for options, message in (
        ({"precision": "int8"}, "precision = 'int8' is not allowed"),
        ({}, "give images"),
        ({"images": torch.ones(2, 5, 8, 8)}, r"does not take images of \(2, 5, 8, 8\)"),
    ):
        with pytest.raises(InputError, match=message):
            optimise(model, **options)
    with pytest.raises(InputError, match=r"torch.float64 on cpu.*model.float"):
        optimise(copy.deepcopy(model).double(), images=torch.ones(1, 3, 8, 8))


def test_a_prepared_model_keeps_the_layout_and_type_it_wants():
    seen = {}

    class Spy(nn.Module):
        def forward(self, x):
            seen["type"], seen["last"] = x.dtype, x.is_contiguous(memory_format=torch.channels_last)
            return {"logits": x.mean((2, 3)), "count": torch.ones(1, dtype=torch.long)}

    images = torch.randn(2, 3, 8, 8)
    out = Prepared(Spy(), "bf16", channels_last=True)(images)
    assert seen == {"type": torch.bfloat16, "last": True}
    assert (out["logits"].dtype, out["count"].dtype) == (torch.float32, torch.long)
    Prepared(Spy())(images.contiguous(memory_format=torch.channels_last))
    assert seen == {"type": torch.float32, "last": False}
