import math
import re

import pytest
import timm
import torch
from torch import nn

from once import quick_run
from vitrail.checks import ggem as check
from vitrail.edits.ggem import EPS, LEAST_P, GGeM, ggem
from vitrail.errors import InputError
from vitrail.models import create_model


def slow_ggem(values, p):
    """The paper's formula for tokens (B, N, C), a channel at a time; p has one exponent per group."""
    batch, count, channels = values.shape
    out = values.new_zeros(batch, channels)
    for b in range(batch):
        for c in range(channels):
            power = p[c * len(p) // channels]
            total = sum(values[b, n, c].clamp(min=EPS) ** power for n in range(count))
            out[b, c] = (total / count) ** (1 / power)
    return out


def exponents(module, *values):
    with torch.no_grad():
        module.p.copy_(torch.tensor(values))
    return module


@pytest.mark.parametrize(
    ("shape", "p"),
    [((2, 5, 6), (1.0, 3.0, 0.5)), ((1, 1, 4), (2.5,)), ((3, 7, 5), (1.5, 2.0, 3.0, 4.0, 9.0)), ((1, 16, 4), (3, 7.5))],
)
def test_it_is_the_papers_formula(shape, p):
    module = exponents(GGeM(len(p)).double(), *p)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(shape[0], shape[2], dtype=torch.float64)
    expected, got = slow_ggem(x, module.p), module(x)
    torch.testing.assert_close(got, expected)
    slopes = [torch.autograd.grad((y * pull).sum(), [x, module.p]) for y in (got, expected)]
    for slope, expected_slope in zip(*slopes, strict=True):
        torch.testing.assert_close(slope, expected_slope)


def test_its_gradients_are_those_of_its_values():
    module = exponents(GGeM(2).double(), 2.0, 3.5)
    x = (torch.rand(2, 3, 4, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, p: torch.func.functional_call(module, {"p": p}, x), (x, module.p.detach().requires_grad_())
    )


def test_it_lies_between_the_mean_and_the_maximum():
    x = torch.rand(2, 9, 4) + 0.1
    torch.testing.assert_close(GGeM(2, 1.0)(x), x.mean(1))
    torch.testing.assert_close(GGeM(2, 5000.0)(x), x.amax(1), rtol=1e-3, atol=0)


def test_it_begins_with_three_for_every_group():
    assert GGeM(4).p.tolist() == [3.0] * 4
    assert GGeM(2, 1.5).p.tolist() == [1.5] * 2
    assert GGeM(4).p.requires_grad


def test_an_exponent_does_not_fall_below_its_bound():
    x = torch.rand(1, 5, 2) + 0.1
    low = exponents(GGeM(2), -3.0, 0.0)(x)
    torch.testing.assert_close(low, GGeM(2, LEAST_P)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1000.0])
def test_half_precision_neither_overflows_nor_vanishes(dtype, scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(2, 6, 8)).to(dtype).requires_grad_()
    module = GGeM(4, 7.0)
    exact = GGeM(4, 7.0).double()(x.double())
    for half in (module, GGeM(4, 7.0).to(dtype)):
        x.grad = None
        got = half(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
        got.float().sum().backward()
        assert x.grad.isfinite().all()
        assert half.p.grad.isfinite().all()
        assert half.p.grad.any()


def test_autocast_keeps_the_powers_in_float32():
    x = torch.rand(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = GGeM(4, 7.0)(x)
    torch.testing.assert_close(got, GGeM(4, 7.0)(x), rtol=1e-5, atol=0)


def test_extreme_values_have_finite_gradients():
    for value in (0.0, -5.0, 1e30):
        x = torch.full((1, 3, 2), value, requires_grad=True)
        module = GGeM(1, 20.0)
        module(x).sum().backward()
        assert x.grad.isfinite().all()
        assert module.p.grad.isfinite().all()


@pytest.mark.parametrize("dim", [(2, 3), (1, 2)])
@pytest.mark.parametrize("flatten", [True, False])
def test_feature_maps_are_pooled_over_their_places(dim, flatten):
    tokens = torch.rand(2, 12, 6)
    maps = tokens.unflatten(1, (3, 4))
    x = maps.permute(0, 3, 1, 2) if dim == (2, 3) else maps
    module = exponents(GGeM(3, dim=dim, flatten=flatten), 1.0, 2.0, 5.0)
    expected = slow_ggem(tokens, module.p)
    shape = (2, 6) if flatten else (2, 6, 1, 1) if dim == (2, 3) else (2, 1, 1, 6)
    torch.testing.assert_close(module(x), expected.view(shape))


def small_vit(**options):
    slim = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", num_classes=5, **{**slim, **options}).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"reg_tokens": 2, "class_token": False, "global_pool": "max"},
        {"reg_tokens": 2, "global_pool": "map", "pool_include_prefix": True},
    ],
)
def test_it_pools_the_patch_tokens_of_a_vit_and_leaves_its_normalisation(options):
    model = small_vit(**options)
    for norm in (model.norm, model.fc_norm):
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight)
    norm = model.fc_norm
    assert ggem()(model) is model
    pool = exponents(model.fc_norm[0], 1.0, 2.0, 4.0)
    tokens = model.forward_features(torch.randn(2, 3, 8, 8))
    expected = norm(slow_ggem(tokens[:, -4:], pool.p))
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)
    torch.testing.assert_close(model.forward_head(tokens), model.head(expected))


@pytest.mark.parametrize(("groups", "found"), [(None, 3), (1, 1), (6, 6)])
def test_there_are_as_many_groups_as_heads_or_as_told(groups, found):
    model = ggem(groups=groups, p=2.0)(small_vit(global_pool="map"))
    assert model.fc_norm[0].p.tolist() == [2.0] * found
    assert model.attn_pool is None


def test_the_heads_of_an_attention_pooling_do_not_count():
    model = small_vit(global_pool="map")
    model.attn_pool.num_heads = 12
    assert len(ggem()(model).fc_norm[0].p) == 3


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("beit_base_patch16_224", 12),
        ("cait_xxs24_224", 4),
        ("eva02_tiny_patch14_224", 3),
        ("vit_base_patch16_siglip_224", 12),
        ("vit_relpos_small_patch16_224", 6),
        ("xcit_nano_12_p16_224", 4),
        ("swin_tiny_patch4_window7_224", 24),
        ("rmt_nano", 8),
    ],
)
def test_other_models(name, groups):
    with torch.device("meta"):
        model = ggem()(create_model(name, num_classes=7)).eval()
        found = [module for module in model.modules() if isinstance(module, GGeM)]
        calls = []
        found[0].register_forward_hook(lambda *_: calls.append(1))
        side = 32 if name == "rmt_nano" else model.pretrained_cfg["input_size"][-1]
        features = model.forward_features(torch.zeros(2, 3, side, side))
        assert model.forward_head(features).shape == (2, 7)
        width = getattr(model, "head_hidden_size", model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (2, width)
    assert [len(module.p) for module in found] == [groups]
    assert len(calls) == 2


def test_a_convolutional_net_takes_the_groups_it_is_told():
    model = ggem(groups=8, p=1.0)(create_model("small_resnet_nano", num_classes=3)).eval()
    plain = create_model("small_resnet_nano", num_classes=3).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.endswith(".p")})
    x = torch.randn(2, 3, 16, 16)  # behind a ReLU the mean is what GGeM begins with at p = 1
    torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 0}, "groups = 0"),
        ({"groups": 2.0}, "groups = 2.0"),
        ({"p": 0.0}, "p = 0.0"),
        ({"p": math.inf}, "p = inf"),
        ({"p": "3"}, "p = '3'"),
    ],
)
def test_a_wrong_option_is_refused(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        ggem(**options)


@pytest.mark.parametrize(
    ("name", "groups", "words"),
    [
        ("deit_tiny_distilled_patch16_224", None, "found no pooling .* in VisionTransformerDistilled; its modules are"),
        ("mvitv2_tiny", None, "found no pooling .* in MultiScaleVit"),
        ("vit_tiny_patch16_224", 7, "192 channels cannot be divided into 7"),
        ("resnet18", None, r"ResNet has no attention heads.*groups=8"),
    ],
)
def test_a_model_that_it_cannot_pool_says_why(name, groups, words):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = str(model)
    with pytest.raises(InputError, match=words):
        ggem(groups=groups)(model)
    assert str(model) == before


@pytest.mark.parametrize("make", [lambda: small_vit(), lambda: create_model("rmt_nano", num_classes=3)])
def test_it_is_not_added_twice(make):
    model = ggem()(make())
    with pytest.raises(InputError, match="found no pooling"):
        ggem()(model)


def test_a_wrong_input_is_refused():
    with pytest.raises(InputError, match=r"met the shape \(2, 3, 4, 5\)"):
        GGeM(1)(torch.rand(2, 3, 4, 5))
    with pytest.raises(InputError, match="5 channels cannot be divided into 2"):
        GGeM(2)(torch.rand(1, 3, 5))


def test_average_precision_is_that_of_the_ranking():
    # Seen from the first, the others rank 1 (same), 2 (other), 3 (same).
    angles = torch.tensor([0.0, 0.1, 0.3, 0.6])
    points = 3 * torch.stack([angles.cos(), angles.sin()], 1)
    targets = torch.tensor([0, 0, 1, 0])
    each = [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2]  # the third has no match
    assert check.mean_average_precision(points, targets) == pytest.approx(sum(each) / 3)
    hot = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert check.mean_average_precision(points, hot) == pytest.approx(sum(each) / 3)


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert set(verdict.findings[0].arms) == {"ggem", "class token"}
    assert len(verdict.findings) == 16
    rows = {(row["backbone"], row["arm"]): row for row in verdict.tables["arms"]}
    assert len(rows) == 10
    assert len(rows["frozen", "ggem"]["p"].split(", ")) == 4
    assert rows["frozen", "mean"]["map"] != rows["finetuned", "mean"]["map"]
