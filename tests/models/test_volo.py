import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.volo import VOLO, OutlookAttention

from exact import moved, normal
from once import quick_run
from vitrail.checks import volo as check
from vitrail.errors import InputError
from vitrail.layers.positions import resampled
from vitrail.methods.supervised.token_labelling import TokenLabelling, place_scores, token_labels
from vitrail.models import create_model
from vitrail.models.volo import Volo, checkpoint_filter_fn

TINY = {"layers": (1, 1, 1), "embed_dims": (8, 16, 16), "num_heads": (2, 4, 4), "stem_hidden_dim": 4, "num_classes": 3}
FIXED = {"downsamples": (True, False, False), "outlook_attention": (True, False, False)}


@pytest.mark.parametrize(("heads", "stride", "size"), [(1, 2, (4, 4)), (2, 2, (3, 5)), (2, 1, (3, 2))])
def test_outlook_attention_is_the_papers(heads, stride, size):
    wide, k = 4, 3
    layer = moved(OutlookAttention(wide, heads, stride=stride, qkv_bias=True))
    x = normal(2, *size, wide).requires_grad_()
    rows, columns = (math.ceil(side / stride) for side in size)
    value, out, deep = layer.v(x), torch.zeros(2, *size, wide, dtype=torch.float64), wide // heads
    for b, i, j in np.ndindex(2, rows, columns):
        # The centre: the mean of the places that this window stands for.
        places = x[b, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].flatten(0, 1)
        weights = layer.attn(places.mean(0)).view(heads, k * k, k * k) * deep**-0.5
        window = [(i * stride + p - 1, j * stride + q - 1) for p, q in np.ndindex(k, k)]
        there = [0 <= row < size[0] and 0 <= column < size[1] for row, column in window]
        for head in range(heads):
            part = slice(head * deep, (head + 1) * deep)
            zero = torch.zeros(deep, dtype=torch.float64)
            seen = torch.stack([value[b, r, c, part] if ok else zero for (r, c), ok in zip(window, there)])
            mixed = weights[head].softmax(1) @ seen
            for n, ((row, column), ok) in enumerate(zip(window, there)):
                if ok:
                    out[b, row, column, part] = out[b, row, column, part] + mixed[n]
    wanted = layer.proj(out)
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    weight = normal(*found.shape, seed=5)
    ours, slow = (torch.autograd.grad((y * weight).sum(), (x, layer.attn.weight)) for y in (found, wanted))
    torch.testing.assert_close(ours, slow)


def test_at_its_own_size_it_is_timms_net():
    torch.manual_seed(0)
    theirs = VOLO(img_size=(32, 48), patch_size=4, **TINY, **FIXED).eval()
    ours = Volo(img_size=(32, 48), patch_size=4, **TINY).eval()
    state = theirs.state_dict()
    for given in (state, {"state_dict": {f"module.{key}": value for key, value in state.items()}}):
        ours.load_state_dict(checkpoint_filter_fn(given, ours), strict=True)
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(
        ours.forward_intermediates(x, intermediates_only=True), theirs.forward_intermediates(x, intermediates_only=True)
    )


def test_published_weights_fit_another_size():
    torch.manual_seed(0)
    small, large = (VOLO(img_size=side, patch_size=8, **TINY, **FIXED).eval() for side in (32, 64))
    state = small.state_dict()
    assert set(checkpoint_filter_fn(state, small)) == set(state)
    large.load_state_dict(checkpoint_filter_fn(state, large), strict=True)
    grid = F.interpolate(state["pos_embed"].permute(0, 3, 1, 2), (4, 4), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(large.pos_embed.detach(), grid)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (45, 61), (225, 190), (1, 3)])
def test_images_are_filled_and_positions_interpolated(size):
    torch.manual_seed(0)
    model = Volo(img_size=28, patch_size=4, **TINY).eval()
    assert model.network[1].pos_embed.shape == (1, 4, 4, 16)
    rows, columns = (-(-side // 8) for side in size)
    x = torch.randn(1, 3, *size)
    filled = torch.zeros(1, 3, 8 * rows, 8 * columns)
    filled[..., : size[0], : size[1]] = x
    features = model.forward_features(x)
    assert features.shape == (1, 1 + rows * columns, 16)
    torch.testing.assert_close(features, model.forward_features(filled))
    down = model.network[1]
    inside = torch.randn(1, 2 * rows, 2 * columns, 8)
    bare = F.conv2d(inside.permute(0, 3, 1, 2), down.proj.weight, down.proj.bias, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(down(inside), bare + resampled(down.pos_embed, (rows, columns)))
    assert resampled(down.pos_embed, (4, 4)) is down.pos_embed


def test_positions_are_dropped_behind_the_outlookers_as_in_timm():
    torch.manual_seed(0)
    model = Volo(img_size=32, patch_size=4, pos_drop_rate=0.5, **TINY)
    out = model.network[1].train()(torch.randn(4, 8, 8, 8))
    assert 0.3 < float((out == 0).float().mean()) < 0.7


def test_it_begins_as_published():
    torch.manual_seed(0)
    model = create_model("volo_nano", num_classes=10)
    for weight in (model.network[1].pos_embed, model.cls_token, model.network[0][0].attn.attn.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.25)
    assert model.no_weight_decay() == {"network.1.pos_embed", "cls_token"}
    assert model.pos_embed is None
    assert [module.stride for module in model.modules() if isinstance(module, OutlookAttention)] == [2, 2]


def test_its_pyramid_has_two_scales():
    model = create_model("volo_nano", num_classes=0, features_only=True).eval()
    maps = model(torch.zeros(1, 3, 45, 61))
    assert [tuple(value.shape) for value in maps] == [(1, 48, 12, 16), (1, 96, 6, 8)]
    assert model.feature_info.reduction() == [4, 8]
    assert model.feature_info.module_name() == ["network.0", "network.4"]


def test_token_labelling_trains_both_of_its_heads():
    torch.manual_seed(0)
    model, teacher = Volo(img_size=32, patch_size=4, **TINY), Volo(img_size=32, patch_size=4, **TINY)
    method = TokenLabelling(model, teacher, mix_token=0, smoothing=0).train()
    images, target = torch.randn(3, 3, 32, 32), torch.arange(3)
    model.eval()  # the batch's statistics aside, the two passes are alike
    terms = method.loss({"image": images, "target": target})
    features = model.forward_features(images)
    torch.testing.assert_close(terms["supervised"], F.cross_entropy(model.head(features[:, 0]), target))
    scores = place_scores(teacher, images)
    inner = teacher.aux_head(teacher.forward_features(images)[:, 1:])
    torch.testing.assert_close(scores.flatten(2).mT, inner)
    log_p = model.aux_head(features[:, 1:]).log_softmax(2)
    places = -(token_labels(scores, (4, 4)).flatten(1, 2) * log_p).sum(2).mean()
    torch.testing.assert_close(terms["tokens"], places)
    answer = model.head(features[:, 0]) + 0.5 * model.aux_head(features[:, 1:]).amax(1)
    torch.testing.assert_close(model(images), answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 2}, r"patch_size = 2 .*4, 8 or 16"),
        ({"use_mix_token": True}, "use_mix_token is fixed here.*volo:TokenLabelling"),
        ({"global_pool": "max"}, "global_pool = 'max' .*token, avg"),
        ({"img_size": 0}, "img_size = 0 .*1 pixel"),
        ({"layers": (1,)}, r"layers = \(1,\), .*one of each for every stage"),
        ({"embed_dims": (8, 16)}, r"embed_dims = \(8, 16\) .*one of each"),
        ({"num_heads": (3, 4, 4)}, "num_heads = 3 does not divide a width of 8"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        Volo(**{**TINY, **options})


def test_the_convolution_of_the_check_has_outlooks_window():
    model = create_model("volo_nano", num_classes=3, **check.NET)
    check.windowed_convolution()(model)
    found = [module for module in model.modules() if isinstance(module, check.WindowedConvolution)]
    assert len(found) == 2
    x = torch.randn(2, 5, 7, 32)
    wanted = F.conv2d(x.permute(0, 3, 1, 2), found[0].weight, found[0].bias, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(found[0](x), wanted)


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert [set(finding.arms) for finding in verdict.findings] == [
        {"outlook", "convolution"},
        {"token labels", "outlook"},
        {"token labels", "image labels"},
    ]
    costs = {row["arm"]: row for row in verdict.tables["costs"]}
    assert 1 < costs["convolution"]["parameters"] / costs["outlook"]["parameters"] < 1.05
