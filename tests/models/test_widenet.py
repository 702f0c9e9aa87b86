import re

import pytest
import torch
import torch.nn.functional as F

from exact import layer_norm, linear, moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks.widenet import BODY, DEPTH, HIDDEN
from vitrail.errors import InputError
from vitrail.layers.experts import MixtureOfExperts
from vitrail.layers.positions import resampled
from vitrail.models import create_model
from vitrail.models.widenet import Attention, Block, WideNet

TINY = {"img_size": 12, "patch_size": 3, "embed_dim": 8, "depth": 3, "num_heads": 2, "hidden": 6}


def tiny(**options):
    torch.manual_seed(0)
    return WideNet(num_classes=3, **{**TINY, **options})


# ---- slow loops, from the paper and the published code


def slow_attention(layer, x):
    """Attend among the places (N, C) of one image."""
    query, key, value = linear(layer.qkv, x).chunk(3, 1)
    width = x.shape[1] // layer.num_heads
    heads = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        rows = []
        for place in range(len(x)):
            scores = torch.stack([query[place, part] @ key[other, part] / width**0.5 for other in range(len(x))])
            weights = torch.exp(scores) / torch.exp(scores).sum()
            rows.append(sum(weight * value[other, part] for other, weight in enumerate(weights)))
        heads.append(torch.stack(rows))
    return linear(layer.proj, torch.cat(heads, 1))


@pytest.mark.parametrize("places", [1, 5])
def test_a_block_is_the_slow_loop(places):
    torch.manual_seed(0)
    block, attention = moved(Block(8, drop_path=0.0)), moved(Attention(8, 2))
    experts = moved(MixtureOfExperts(8, 6, noise=0.0)).eval()
    x, before = normal(2, places, 8).requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    ours, balance = block(x, before, attention, experts)
    y = x + torch.stack([slow_attention(attention, layer_norm(block.norm1, image)) for image in x])
    said, own = experts(layer_norm(block.norm2, y))
    given, weight = [x, *block.parameters(), *attention.parameters()], normal(2, places, 8, seed=9)
    torch.testing.assert_close(ours, y + said, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(balance, 0.7 + own)
    for found, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given), torch.autograd.grad(((y + said) * weight).sum(), given)
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


# ---- the net


def test_depths_share_all_but_their_norms():
    model = moved(tiny()).eval()
    x = normal(2, 3, 12, 12)
    patches = F.conv2d(x, model.patch_embed.weight, model.patch_embed.bias, stride=3).flatten(2).transpose(1, 2)
    patches = patches + model.pos_embed.flatten(1, 2)
    places, total = torch.cat((model.class_pos.expand(2, -1, -1), patches), 1), 0.0
    for block in model.blocks:
        places = places + model.attention(layer_norm(block.norm1, places))
        said, balance = model.experts(layer_norm(block.norm2, places))
        places, total = places + said, total + balance
    pooled = torch.tanh(linear(model.representation[0], layer_norm(model.norm, places).mean(1)))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    logits, found = model.forward_balanced(x)
    torch.testing.assert_close(logits, linear(model.head, pooled))
    torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(found, total)
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    assert tiny(representation=False).representation(pooled) is pooled


def test_norms_can_be_shared_too():
    apart, shared = tiny(), tiny(shared_norms=True)
    assert count_parameters(apart) - count_parameters(shared) == 2 * 2 * 2 * 8
    assert shared.blocks[2].norm2 is shared.blocks[0].norm2
    assert shared.blocks[1].norm1 is shared.blocks[0].norm1
    assert shared(torch.zeros(1, 3, 12, 12)).shape == (1, 3)


@pytest.mark.parametrize("size", [(28, 28), (45, 61), (5, 7)])
def test_other_sizes_get_zeros_and_interpolated_positions(size):
    model = tiny().eval()
    x = torch.randn(1, 3, *size)
    grid = tuple(-(-side // 3) for side in size)
    whole = torch.zeros(1, 3, 3 * grid[0], 3 * grid[1])
    whole[:, :, : size[0], : size[1]] = x
    (places, balance), found = model.begin(x)
    assert found == grid
    assert float(balance) == 0
    assert torch.equal(places[:, 0], model.class_pos[:, 0])
    patches = model.patch_embed(whole).flatten(2).transpose(1, 2)
    torch.testing.assert_close(places[:, 1:], patches + resampled(model.pos_embed, grid).flatten(1, 2))


def test_maps_are_those_of_patches():
    model = tiny().eval()
    x = torch.randn(2, 3, 14, 10)
    features, maps = model.forward_intermediates(x, norm=True)
    assert [tuple(found.shape) for found in maps] == [(2, 8, 5, 4)] * 3
    torch.testing.assert_close(maps[2].flatten(2).transpose(1, 2), features[:, 1:])
    first = create_model("widenet_nano", num_classes=3, features_only=True, out_indices=(0, 3))(
        torch.randn(1, 3, 33, 28)
    )
    assert [tuple(found.shape) for found in first] == [(1, 64, 9, 7)] * 2


def test_variants_are_as_published():
    shapes = {"base": (768, 12, 12, 4096), "large": (1024, 24, 16, 4096), "huge": (1280, 32, 16, 5120)}
    counts = {"base": 29_690_600, "large": 40_941_544, "huge": 63_341_800}
    for name, (width, depth, heads, hidden) in shapes.items():
        with torch.device("meta"):
            model = create_model(f"widenet_{name}", num_classes=1000)
        experts = model.experts
        assert count_parameters(model) == counts[name]
        assert (model.num_features, len(model.blocks), model.attention.num_heads) == (width, depth, heads)
        assert tuple(experts.experts.fc1_weight.shape) == (4, hidden, width)
        assert (experts.top_k, experts.capacity, experts.noise) == (2, 1.2, 0.25)
        assert model.patch_embed.kernel_size == (16, 16)


def test_weights_begin_as_published():
    torch.manual_seed(0)
    model = WideNet(num_classes=9, img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4, hidden=48)

    def largest(weight):
        return float(weight.detach().abs().max())

    assert largest(model.attention.qkv.weight) == pytest.approx((6 / (32 * 12)) ** 0.5, rel=0.01)
    assert largest(model.attention.proj.weight) == pytest.approx((6 / (32 * 5)) ** 0.5, rel=0.01)
    assert largest(model.patch_embed.weight) == pytest.approx((6 / (16 * 35)) ** 0.5, rel=0.01)
    assert largest(model.representation[0].weight) == pytest.approx((6 / 64) ** 0.5, rel=0.01)
    assert largest(model.head.weight) == pytest.approx((6 / 41) ** 0.5, rel=0.03)
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert float(model.class_pos.detach().std()) == pytest.approx(0.02, rel=0.4)
    for bias in (model.attention.qkv.bias, model.attention.proj.bias, model.patch_embed.bias, model.head.bias):
        assert not bias.any()


def test_dropout_stochastic_depth_and_what_does_not_decay():
    model = tiny(proj_drop_rate=0.1, drop_path_rate=0.4)
    assert [model.embed_drop.p, model.attention.drop.p, model.experts.experts.drop.p] == [0.1] * 3
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    groups = model.group_matcher()
    assert "experts" in groups["stem"]
    assert {key for key, _ in model.named_parameters() if re.match(groups["stem"], key)} == {
        key for key, _ in model.named_parameters() if not re.match(r"blocks|norm|representation|head", key)
    }
    assert model.no_weight_decay() == {"pos_embed", "class_pos", "experts.experts.fc?_bias"}


def test_what_is_embedded_what_depths_add_and_what_is_pooled_is_dropped():
    nearly, x = 1 - 1e-12, torch.randn(2, 3, 12, 12)
    model = tiny(proj_drop_rate=nearly)
    (places, _), _ = model.begin(x)
    assert not places.any()
    assert not model.attention(torch.randn(2, 5, 8)).any()
    model = tiny(drop_path_rate=nearly, depth=2)
    (places, _), _ = model.begin(x)
    (found, _), (found_first, _) = (model.pass_through(block, places, torch.zeros(())) for block in model.blocks[::-1])
    assert torch.equal(found, places)
    assert not torch.equal(found_first, places)
    model = tiny(drop_rate=nearly)
    with torch.no_grad():
        model.head.bias.fill_(1)
    torch.testing.assert_close(model(x), torch.ones(2, 3))


def test_arms_of_the_check_have_the_parameters_it_says():
    wide = create_model("widenet_nano", num_classes=10, img_size=28, **BODY, depth=DEPTH, hidden=HIDDEN)
    vit = create_model("vit_tiny_patch16_224", num_classes=10, img_size=28, **BODY, depth=DEPTH, mlp_ratio=HIDDEN / 64)
    assert count_parameters(wide) < 0.72 * count_parameters(vit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 0}, "img_size = 0 .*1 or more"),
        ({"hidden": 0}, "hidden = 0 .*1 or more"),
        ({"embed_dim": 0}, "embed_dim = 0 .*1 or more"),
        ({"proj_drop_rate": 1.5}, r"proj_drop_rate = 1\.5 .*in \[0, 1\)"),
        ({"num_heads": 3}, "num_heads = 3 does not divide a width of 8"),
        ({"top_k": 5}, "experts = 4 with top_k = 5"),
        ({"global_pool": "max"}, "global_pool = 'max' .*give avg"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
