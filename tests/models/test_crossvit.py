import copy
import re

import pytest
import torch
import torch.nn.functional as F
from timm.models.crossvit import CrossAttention, CrossVit, MultiScaleBlock

from exact import moved, normal
from once import quick_run
from vitrail.checks import crossvit as check
from vitrail.errors import InputError
from vitrail.layers.positions import resampled
from vitrail.models import create_model
from vitrail.models.crossvit import CrossViT, checkpoint_filter_fn

TINY = {
    "patch_size": (4, 8),
    "embed_dim": (6, 8),
    "depth": ((1, 1, 0), (1, 2, 0)),
    "num_heads": (2, 2),
    "mlp_ratio": (2, 2, 1),
    "num_classes": 3,
}


def slow_attention(layer, tokens):
    """The class token's attention to all tokens, image by image and head by head."""
    deep, out = tokens.shape[2] // layer.num_heads, []
    for one in tokens:
        query, keys, values = layer.wq(one[0]), layer.wk(one), layer.wv(one)
        heads = []
        for head in range(layer.num_heads):
            part = slice(head * deep, (head + 1) * deep)
            scores = torch.stack([(query[part] * key[part]).sum() * deep**-0.5 for key in keys])
            weights = torch.exp(scores) / torch.exp(scores).sum()
            heads.append(sum(weight * value[part] for weight, value in zip(weights, values)))
        out.append(layer.proj(torch.cat(heads)))
    return torch.stack(out)[:, None]


def test_cross_attention_is_the_papers():
    layer = moved(CrossAttention(8, 2, qkv_bias=True))
    tokens = normal(2, 5, 8).requires_grad_()
    found, wanted = layer(tokens), slow_attention(layer, tokens)
    torch.testing.assert_close(found, wanted)
    weight = normal(2, 1, 8, seed=1)
    ours, slow = (torch.autograd.grad((y * weight).sum(), tokens) for y in (found, wanted))
    torch.testing.assert_close(ours, slow)


def test_branches_lend_each_other_their_class_tokens():
    block = moved(MultiScaleBlock((6, 8), (4, 1), (1, 2, 0), (2, 2), (2, 2, 1), qkv_bias=True, drop_path=[0.0, 0.0]))
    given = [normal(2, 5, 6), normal(2, 2, 8, seed=1)]
    inner = [own(tokens) for own, tokens in zip(block.blocks, given)]
    for number, found in enumerate(block(given)):
        other = inner[1 - number]
        guest = block.projs[number](inner[number][:, :1])
        seen = block.fusion[number].norm1(torch.cat((guest, other[:, 1:]), 1))
        guest = guest + slow_attention(block.fusion[number].attn, seen)
        wanted = torch.cat((block.revert_projs[number](guest), inner[number][:, 1:]), 1)
        torch.testing.assert_close(found, wanted)


def test_at_its_own_size_it_is_timms_net():
    torch.manual_seed(0)
    theirs = CrossVit(img_size=(32, 48), **TINY).eval()
    ours = CrossViT(img_size=(32, 48), **TINY).eval()
    authors = {
        key.replace("_0", ".0").replace("_1", ".1") if "_embed_" in key or "_token_" in key else key: value
        for key, value in theirs.state_dict().items()
    }
    assert "pos_embed.1" in authors
    for state in (theirs.state_dict(), authors, {"model": authors}):
        ours.load_state_dict(checkpoint_filter_fn(state, ours), strict=True)
    x = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    for options in ({}, {"indices": [0, 2], "norm": True}, {"output_fmt": "NLC", "indices": 1, "stop_early": True}):
        (final, taken), (wanted, maps) = (model.forward_intermediates(x, **options) for model in (ours, theirs))
        assert [tuple(each.shape) for each in final] == [(2, 97, 6), (2, 25, 8)]
        torch.testing.assert_close((final, taken), (wanted, maps))


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (45, 61), (225, 190), (1, 3)])
def test_images_are_filled_and_positions_interpolated(size):
    torch.manual_seed(0)
    model = CrossViT(img_size=28, **TINY).eval()
    rows, columns = (-(-side // 8) for side in size)
    x = torch.randn(2, 3, *size)
    filled = torch.zeros(2, 3, 8 * rows, 8 * columns)
    filled[..., : size[0], : size[1]] = x
    torch.testing.assert_close(model(x), model(filled))
    branches, grids = model._embedded(x)
    assert grids == [(2 * rows, 2 * columns), (rows, columns)]
    for number, (tokens, grid) in enumerate(zip(branches, grids)):
        positions, token = getattr(model, f"pos_embed_{number}"), getattr(model, f"cls_token_{number}")
        side = (8, 4)[number]
        there = resampled(positions[:, 1:].reshape(1, side, side, -1), grid).flatten(1, 2)
        torch.testing.assert_close(tokens[:, :1], (token + positions[:, :1]).expand(2, -1, -1))
        proj = model.patch_embed[number].proj
        patches = F.conv2d(filled, proj.weight, proj.bias, stride=proj.stride)
        torch.testing.assert_close(tokens[:, 1:], patches.permute(0, 2, 3, 1).flatten(1, 2) + there)


def test_it_answers_with_the_mean_of_both_branches():
    torch.manual_seed(0)
    model, x = CrossViT(img_size=32, **TINY).eval(), torch.randn(2, 3, 32, 32)
    fine, coarse = model.forward_features(x)
    answer = (model.head[0](fine[:, 0]) + model.head[1](coarse[:, 0])) / 2
    torch.testing.assert_close(model(x), answer)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), torch.cat((fine[:, 1:].mean(1), coarse[:, 1:].mean(1)), 1))
    model.reset_classifier(4)
    assert (model(x).shape, model.global_pool, model.num_classes) == ((2, 4), "avg", 4)


def test_its_features_are_those_of_both_branches():
    model = create_model("crossvit_nano", num_classes=0, features_only=True).eval()
    maps = model(torch.zeros(1, 3, 45, 61))
    assert [tuple(value.shape) for value in maps] == [(1, 32, 12, 16), (1, 64, 6, 8)]
    assert model.feature_info.reduction() == [4, 8]
    assert model.feature_info.module_name() == ["blocks.1", "blocks.1"]


def test_features_leave_out_what_no_patch_sees():
    x = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    whole = create_model("crossvit_nano", num_classes=0).eval()
    net = create_model("crossvit_nano", num_classes=0, features_only=True)
    net.model.load_state_dict(whole.state_dict(), strict=False)
    maps = net.eval()(x)
    for found, wanted in zip(maps, whole.forward_intermediates(x, [1, 3], intermediates_only=True), strict=True):
        torch.testing.assert_close(found, wanted)
    exchanging = {name.split(".")[2] for name, _ in net.named_parameters() if ".fusion." in name or "projs." in name}
    assert exchanging == {"0"}, "the last of the two blocks has no tokens to exchange"


def test_embedded_patches_and_class_tokens_are_dropped():
    torch.manual_seed(0)
    model, x = CrossViT(img_size=32, pos_drop_rate=1 - 1e-12, **TINY), torch.randn(1, 3, 32, 32)
    assert not any(tokens.any() for tokens in model._embedded(x)[0])
    assert all(tokens.any() for tokens in model.eval()._embedded(x)[0])


def test_what_is_left_with_its_classifiers_still_answers():
    torch.manual_seed(0)
    model, x = CrossViT(img_size=32, **TINY).eval(), torch.randn(2, 3, 32, 32)
    first = model.blocks[0](model._embedded(x)[0])
    wanted = model.forward_head([norm(tokens) for norm, tokens in zip(model.norm, first)])
    assert model.prune_intermediate_layers([0, 2], prune_head=False) == [0, 2]
    torch.testing.assert_close(model(x), wanted)


def test_parameters_are_told_apart_by_depth():
    groups = CrossViT(img_size=32, **TINY).group_matcher()
    assert re.match(groups["stem"], "pos_embed_1")
    assert re.match(groups["stem"], "patch_embed.0.proj.weight")
    assert not re.match(groups["stem"], "blocks.0.projs.0.0.weight")
    assert [re.match(groups["blocks"][0][0], f"blocks.{n}.fusion.0.norm1.bias")[1] for n in (0, 1)] == ["0", "1"]


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model, x = CrossViT(img_size=32, **TINY).train(), torch.randn(2, 3, 32, 32)
    frugal = copy.deepcopy(model)
    frugal.set_grad_checkpointing()
    for net in (model, frugal):
        net(x).pow(2).sum().backward()
    for own, other in zip(model.parameters(), frugal.parameters()):
        torch.testing.assert_close(own.grad, other.grad)


def test_it_begins_as_published():
    torch.manual_seed(0)
    model = create_model("crossvit_nano", num_classes=10)
    for name in ("pos_embed_0", "pos_embed_1", "cls_token_1"):
        assert float(getattr(model, name).detach().std()) == pytest.approx(0.02, rel=0.3)
    for layer in (model.blocks[0].projs[0][2], model.blocks[1].blocks[1][0].mlp.fc1, model.head[1]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    assert model.no_weight_decay() == {"cls_token_0", "cls_token_1", "pos_embed_0", "pos_embed_1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": (4, 6)}, r"patch_size = \(4, 6\) .*multiple"),
        ({"patch_size": 4}, "patch_size = 4 .*two numbers of 1 or more"),
        ({"embed_dim": (6, 8, 8)}, r"embed_dim = \(6, 8, 8\) .*two numbers of 1 or more"),
        ({"num_heads": (2, 3)}, "num_heads = 3 does not divide embed_dim = 8"),
        ({"depth": ((0, 1, 0),)}, r"depth = \(\(0, 1, 0\),\) .*three numbers: .*1 or more"),
        ({"depth": ((1, 1),)}, r"depth = \(\(1, 1\),\) .*three numbers"),
        ({"depth": ()}, r"depth = \(\) .*three numbers"),
        ({"mlp_ratio": (2, 0)}, r"mlp_ratio = \(2, 0\) .*hidden width"),
        ({"img_size": 0}, "img_size = 0 .*1 or more"),
        ({"img_scale": (1.0, 0.5)}, "img_scale is fixed here"),
        ({"global_pool": "max"}, "global_pool = 'max' .*token or avg"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        CrossViT(**{**TINY, **options})


def test_a_wrong_format_and_pooling_are_explained():
    model = CrossViT(img_size=32, **TINY)
    with pytest.raises(InputError, match=r"output_fmt = 'NHWC'.*NCHW, NLC"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")
    with pytest.raises(InputError, match=r"global_pool = '' .*token or avg"):
        model.reset_classifier(0, "")


def test_branches_apart_do_not_meet():
    torch.manual_seed(0)
    model, x = CrossViT(img_size=32, **TINY).eval(), torch.randn(1, 3, 32, 32)
    inner, _ = model._embedded(x)
    for block in model.blocks:
        inner = [own(tokens) for own, tokens in zip(block.blocks, inner)]
    wanted = [norm(tokens) for norm, tokens in zip(model.norm, inner)]
    check.without_cross_attention()(model)
    torch.testing.assert_close(model.forward_features(x), wanted)


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert [set(finding.arms) for finding in verdict.findings] == [
        {"crossvit", "coarse branch"},
        {"crossvit", "apart"},
    ]
    assert [row["arm"] for row in verdict.tables["costs"]] == ["crossvit", "coarse branch", "apart"]
