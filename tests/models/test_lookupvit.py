import math

import pytest
import torch
import torch.nn.functional as F

from exact import layer_norm, linear, moved, normal
from vitrail.app.build import count_flops
from vitrail.checks.lookupvit import BODY, COARSE, FINE, GRIDS
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.lookupvit import Block, LookupViT, resized

TINY = {"img_size": 12, "patch_size": 3, "embed_dim": 8, "depth": 2, "num_heads": 2, "compressed": (2, 3)}


def tiny(**options):
    torch.manual_seed(0)
    return LookupViT(num_classes=3, **{**TINY, **options})


# ---- slow loops, from the paper


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def slow_weights(query, key):
    """Return (M, N): each compressed token's attention to the lookup tokens, of one head."""
    rows = []
    for one in query:
        scores = torch.stack([one @ other / len(one) ** 0.5 for other in key])
        rows.append(torch.exp(scores) / torch.exp(scores).sum())
    return torch.stack(rows)


def slow_block(block, lookup, compressed):
    """Gather, refine and infuse, for the tokens of one image."""
    cross, width = block.cross, lookup.shape[1] // 2
    heads = [slice(0, width), slice(width, 2 * width)]
    asking, asked = layer_norm(block.norm_compressed, compressed), layer_norm(block.norm_lookup, lookup)
    query, (key, value) = linear(cross.query, asking), linear(cross.key_value, asked).chunk(2, 1)
    weights = [slow_weights(query[:, part], key[:, part]) for part in heads]
    gathered = torch.cat([w @ value[:, part] for w, part in zip(weights, heads)], 1)
    compressed = compressed + linear(cross.gather_proj, gathered)
    refine = block.refine
    query, key, value = linear(refine.attn.qkv, layer_norm(refine.norm1, compressed)).chunk(3, 1)
    attended = [slow_weights(query[:, part], key[:, part]) @ value[:, part] for part in heads]
    compressed = compressed + linear(refine.attn.proj, torch.cat(attended, 1))
    inside = gelu(linear(refine.mlp.fc1, layer_norm(refine.norm2, compressed)))
    compressed = compressed + linear(refine.mlp.fc2, inside)
    value = linear(cross.value, layer_norm(block.norm_infuse, compressed))
    rows = []
    for place in range(len(lookup)):
        got = [sum(w[m, place] * value[m, part] for m in range(len(value))) for w, part in zip(weights, heads)]
        rows.append(torch.cat(got))
    lookup = lookup + linear(cross.infuse_proj, torch.stack(rows))
    return lookup + linear(block.mlp.fc2, gelu(linear(block.mlp.fc1, layer_norm(block.norm_mlp, lookup)))), compressed


@pytest.mark.parametrize(("many", "few"), [(9, 4), (5, 1), (6, 7)])
def test_a_block_is_the_slow_loop(many, few):
    torch.manual_seed(0)
    block = moved(Block(8, 2, 3.0, 0.5, drop_path=0.0))
    assert block.refine.mlp.fc1.out_features == 24
    assert block.mlp.fc1.out_features == 4
    lookup, compressed = normal(2, many, 8).requires_grad_(), normal(2, few, 8, seed=1).requires_grad_()
    ours = block(lookup, compressed)
    theirs = [torch.stack(x) for x in zip(*(slow_block(block, *pair) for pair in zip(lookup, compressed)))]
    given = [lookup, compressed, *block.parameters()]
    loss = sum((x * normal(*x.shape, seed=9)).sum() for x in ours)
    other = sum((x * normal(*x.shape, seed=9)).sum() for x in theirs)
    for found, expected in zip(ours, theirs):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for found, expected in zip(torch.autograd.grad(loss, given), torch.autograd.grad(other, given)):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("before", "after"), [((14, 14), (7, 7)), ((9, 6), (4, 5)), ((3, 4), (6, 4)), ((5, 5), (1, 1))]
)
def test_tokens_are_resized_as_images_are(before, after):
    x = normal(2, math.prod(before), 3)
    plane = x.transpose(1, 2).unflatten(2, before)
    wanted = F.interpolate(plane, after, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resized(x, before, after), wanted, rtol=1e-6, atol=1e-6)


def test_tokens_of_clips_are_resized_along_each_axis():
    x = normal(1, 4 * 6 * 3, 2)
    volume = x.transpose(1, 2).unflatten(2, (4, 6, 3))
    for axis, size in ((2, 2), (3, 3)):  # halves of an even grid: each place is 1/8, 3/8, 3/8, 1/8 of four, cut at ends
        rows = []
        for place in range(size):
            seen = {2 * place + k: w for k, w in zip(range(-1, 3), (1, 3, 3, 1))}
            seen = {k: w for k, w in seen.items() if 0 <= k < volume.shape[axis]}
            rows.append(sum(volume.select(axis, k) * w for k, w in seen.items()) / sum(seen.values()))
        volume = torch.stack(rows, axis)
    torch.testing.assert_close(resized(x, (4, 6, 3), (2, 3, 3)), volume.flatten(2).transpose(1, 2))
    assert resized(x, (4, 6, 3), (4, 6, 3)) is x


# ---- the net


def test_the_net_is_tokens_blocks_norms_and_two_classifiers():
    model = moved(tiny()).eval()
    x = normal(2, 3, 12, 12)
    vectors = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    features = vectors @ model.patch_embed.weight.flatten(1).T + model.patch_embed.bias
    lookup = features + model.lookup_pos
    compressed = resized(features, (4, 4), (2, 3)) + model.compressed_pos
    for block in model.blocks:
        lookup, compressed = block(lookup, compressed)
    pooled = [layer_norm(model.norm_compressed, compressed).mean(1), layer_norm(model.norm_lookup, lookup).mean(1)]
    first, second = linear(model.head, pooled[0]), linear(model.head_lookup, pooled[1])
    torch.testing.assert_close(model(x), (first + second) / 2)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), torch.cat(pooled, 1))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), torch.cat(pooled, 1))


@pytest.mark.parametrize("size", [(28, 28), (45, 61), (5, 7)])
def test_other_sizes_get_zeros_and_interpolated_positions(size):
    model = tiny().eval()
    x = torch.randn(1, 3, *size)
    rows, columns = (-(-side // 3) for side in size)
    whole = torch.zeros(1, 3, 3 * rows, 3 * columns)
    whole[:, :, : size[0], : size[1]] = x
    state, grid = model.begin(x)
    assert grid == (rows, columns)
    features = model.patch_embed(whole).flatten(2).transpose(1, 2)
    torch.testing.assert_close(state[0] - features, resized(model.lookup_pos, (4, 4), grid), rtol=0, atol=1e-5)
    torch.testing.assert_close(state[1] - resized(features, grid, (2, 3)), model.compressed_pos.expand(1, -1, -1))
    assert model(x).shape == (1, 3)


def test_any_number_of_compressed_tokens_at_inference():
    model = tiny().eval()
    x = torch.randn(2, 3, 12, 12)
    before = model(x)
    for grid in ((1, 1), (4, 4), (2, 1)):
        model.set_compressed(grid)
        state, _ = model.begin(x)
        assert state[1].shape[1] == math.prod(grid)
        features = model.patch_embed(x).flatten(2).transpose(1, 2)
        positions = resized(model.compressed_pos, (2, 3), grid)
        torch.testing.assert_close(state[1], resized(features, (4, 4), grid) + positions)
        assert not torch.equal(model(x), before)
    model.set_compressed((2, 3))
    assert torch.equal(model(x), before)


def test_training_draws_a_grid_for_each_batch():
    model = tiny(train_compressed=((1, 1), (2, 2), (3, 3)))
    torch.manual_seed(0)
    drawn = [model.begin(torch.zeros(1, 3, 12, 12))[0][1].shape[1] for _ in range(200)]
    assert all(50 <= drawn.count(count) <= 85 for count in (1, 4, 9))
    assert model.eval().begin(torch.zeros(1, 3, 12, 12))[0][1].shape[1] == 6
    assert tiny().begin(torch.zeros(1, 3, 12, 12))[0][1].shape[1] == 6


def test_clips_have_patches_in_time():
    model = tiny(frames=4, tubelet=2, compressed=(1, 2, 2)).eval()
    clip = torch.randn(2, 3, 5, 13, 12)
    state, grid = model.begin(clip)
    assert grid == (3, 5, 4)
    assert state[1].shape == (2, 4, 8)
    assert model(clip).shape == (2, 3)
    maps = model.forward_intermediates(clip, 1, intermediates_only=True)
    assert maps[0].shape == (2, 8, 3, 5, 4)
    video = create_model("lookupvit_base_video", num_classes=2, embed_dim=8, num_heads=2, depth=1)
    assert (video.grid, video.compressed) == ((16, 14, 14), (8, 7, 7))


def test_maps_are_those_of_lookup_tokens():
    model = tiny().eval()
    x = torch.randn(2, 3, 14, 10)
    features, maps = model.forward_intermediates(x, norm=True)
    assert [tuple(found.shape) for found in maps] == [(2, 8, 5, 4)] * 2
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), features[1])
    early = model.forward_intermediates(x, [0], stop_early=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(model.norm_lookup(early[0]), maps[0].flatten(2).transpose(1, 2))
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    torch.testing.assert_close(model.forward_intermediates(x, [0], norm=True)[1][0].flatten(2).mT, early[0])
    with pytest.raises(InputError, match=r"output_fmt = 'NHWC' .*NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_it_costs_what_the_paper_counts():
    wide, many = 768, 196
    for side in (3, 10):
        with torch.device("meta"):
            model = create_model("lookupvit_base", num_classes=1000, compressed=(side, side))
        few = side * side
        blocks = 12 * ((3 * many * few + 2 * few * few) * wide + (4 * many + 15 * few) * wide**2)
        ends = many * 16 * 16 * 3 * wide + 2 * wide * 1000
        assert count_flops(model, (224, 224)) == blocks + ends + few * many * wide  # the last for resizing
    assert (len(model.blocks), model.blocks[0].cross.num_heads) == (12, 12)
    with torch.device("meta"):
        large = create_model("lookupvit_large", num_classes=1000)
        base = create_model("lookupvit_base", num_classes=1000)
    assert (len(large.blocks), large.blocks[0].cross.num_heads, large.num_features) == (24, 16, 1024)
    assert (base.compressed, large.compressed) == ((7, 7), (7, 7))
    assert [large.blocks[0].refine.mlp.fc1.out_features, large.blocks[0].mlp.fc1.out_features] == [4096, 512]


def test_stochastic_depth_rises_and_positions_do_not_decay():
    model = tiny(depth=3, drop_path_rate=0.4)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    assert model.blocks[2].refine.drop_path1.drop_prob == pytest.approx(0.4)
    assert model.no_weight_decay() == {"lookup_pos", "compressed_pos"}
    assert float(model.lookup_pos.detach().std()) == pytest.approx(0.02, rel=0.3)
    wide = create_model("lookupvit_nano", num_classes=10)
    assert float(wide.patch_embed.weight.detach().abs().max()) == pytest.approx((6 / (48 + 64)) ** 0.5, rel=0.05)
    assert float(wide.blocks[0].mlp.fc1.weight.detach().abs().max()) == pytest.approx((6 / (64 + 32)) ** 0.5, rel=0.05)
    assert not wide.blocks[0].cross.query.bias.any()
    wide.reset_classifier(90)
    for head in (wide.head, wide.head_lookup):
        assert float(head.weight.detach().abs().max()) == pytest.approx((6 / (64 + 90)) ** 0.5, rel=0.05)
        assert not head.bias.any()
    video = tiny(frames=4, embed_dim=64, compressed=(1, 2, 2))
    assert float(video.patch_embed.weight.detach().abs().max()) == pytest.approx((6 / (54 + 64)) ** 0.5, rel=0.05)
    assert not video.patch_embed.bias.any()


def test_all_that_a_block_adds_and_what_classifiers_take_is_dropped():
    nearly = 1 - 1e-12
    block, lookup, compressed = Block(8, 2, 3.0, 0.5, drop_path=nearly), torch.randn(2, 9, 8), torch.randn(2, 4, 8)
    found = block.train()(lookup, compressed)
    assert torch.equal(found[0], lookup)
    assert torch.equal(found[1], compressed)
    model = moved(tiny(drop_rate=nearly)).train()
    for logits, head in zip(model.both(model.forward_features(normal(2, 3, 12, 12))), model.get_classifier()):
        torch.testing.assert_close(logits, head.bias.expand(2, -1))


def test_arms_of_the_check_cost_what_it_says():
    lookup = create_model("lookupvit_nano", num_classes=10, img_size=28, patch_size=FINE, **BODY, compressed=GRIDS[1])
    vit = {"num_classes": 10, **BODY}
    fine = create_model("vit_tiny_patch16_224", img_size=28, patch_size=FINE, **vit)
    coarse = create_model("vit_tiny_patch16_224", img_size=30, patch_size=COARSE, **vit)
    costs = [count_flops(net.to("meta"), (side, side)) for net, side in ((lookup, 28), (fine, 28), (coarse, 30))]
    assert costs[0] < 0.55 * costs[1]
    assert costs[0] == pytest.approx(costs[2], rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size = 0 .*1 or more"),
        ({"frames": 0}, "frames = 0 .*1 or more"),
        ({"depth": 0}, "depth = 0 .*1 or more"),
        ({"num_heads": 3}, "num_heads = 3 does not divide a width of 8"),
        ({"lookup_ratio": 0.1}, r"lookup_ratio = 0\.1 are not allowed"),
        ({"embed_dim": 0}, "embed_dim = 0 .*1 or more"),
        ({"compressed": 4}, r"compressed = 4 .*\(rows, columns\)"),
        ({"compressed": (2.5, 2)}, r"compressed = \(2\.5, 2\) .*\(rows, columns\)"),
        ({"train_compressed": (2, 2)}, r"compressed = 2 .*\(rows, columns\)"),
        ({"compressed": (2, 2, 2)}, r"compressed = \(2, 2, 2\) .*\(rows, columns\), each 1 or more"),
        ({"compressed": (0, 2)}, r"compressed = \(0, 2\)"),
        ({"train_compressed": ((2, 2), (3,))}, r"compressed = \(3,\)"),
        ({"frames": 4}, r"compressed = \(2, 3\) .*\(times, rows, columns\)"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_what_does_not_fit_later_is_explained():
    model = tiny()
    with pytest.raises(InputError, match=r"compressed = \(3, 0\)"):
        model.set_compressed((3, 0))
    with pytest.raises(InputError, match=r"shape \(1, 3, 4, 12, 12\) .*batch, channels, height, width"):
        model(torch.zeros(1, 3, 4, 12, 12))
    with pytest.raises(InputError, match="batch, channels, frames, height, width"):
        tiny(frames=4, compressed=(1, 1, 1))(torch.zeros(1, 3, 12, 12))
