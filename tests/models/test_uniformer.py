import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from exact import moved, normal, same
from vitrail.app.build import count_parameters
from vitrail.checks.uniformer import ARMS, FRAMES, SIDE, digits_in_motion, net_of
from vitrail.errors import InputError
from vitrail.models import create_model, uniformer
from vitrail.models.uniformer import (
    Block,
    ConvEmbed,
    Global,
    Local,
    PatchEmbed,
    UniFormer,
    checkpoint_filter_fn,
    inflate,
    uniformer_video_base,
    uniformer_video_nano,
    uniformer_video_small,
)

TINY = {"dims": (4, 4, 8, 8), "depths": (1, 1, 2, 2), "head_dim": 4}


def tiny(**options):
    torch.manual_seed(0)
    return UniFormer(**{"num_classes": 3, **TINY, **options})


# ---- slow loops, from the paper and the published code


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def slow_conv(layer, x):
    """Let every channel of a grid (..., C) see its neighbours."""
    weight, grid = layer.weight[:, 0], x.shape[:-1]
    reach = weight.shape[-1] // 2
    rows = []
    for place in itertools.product(*map(range, grid)):
        total = layer.bias
        for offset in itertools.product(range(2 * reach + 1), repeat=len(grid)):
            other = tuple(p + o - reach for p, o in zip(place, offset, strict=True))
            if all(0 <= p < side for p, side in zip(other, grid, strict=True)):
                total = total + weight[(slice(None), *offset)] * x[other]
        rows.append(total)
    return torch.stack(rows).reshape(x.shape)


def slow_local(layer, x):
    return linear(layer.proj, slow_conv(layer.affinity, linear(layer.value, x)))


def slow_global(layer, x):
    channels = x.shape[-1]
    query, key, value = linear(layer.qkv, x.reshape(-1, channels)).split(channels, 1)
    width = channels // layer.num_heads
    out = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.exp(query[:, part] @ key[:, part].T / width**0.5)
        out.append(scores @ value[:, part] / scores.sum(1, keepdim=True))
    return linear(layer.proj, torch.cat(out, 1).reshape(x.shape))


def slow_norm(layer, x):
    if isinstance(layer, torch.nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias
    return (x - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias


def slow_block(block, x):
    x = x + slow_conv(block.pos_embed, x)
    mix = slow_local if isinstance(block.mixer, Local) else slow_global
    x = x + block.ls1.gamma * mix(block.mixer, slow_norm(block.norm1, x))
    hidden = linear(block.mlp.fc1, slow_norm(block.norm2, x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return x + block.ls2.gamma * linear(block.mlp.fc2, hidden)


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (2, 1, 3), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("num_heads", [None, 2], ids=["local", "global"])
def test_a_block_is_the_slow_loop(grid, num_heads):
    torch.manual_seed(0)
    block = moved(Block(6, len(grid), num_heads, 1.5, drop_path=0, layer_scale=0.5)).eval()
    x = normal(2, *grid, 6).requires_grad_()
    ours, theirs = block(x), torch.stack([slow_block(block, one) for one in x])
    same(ours, theirs, [x, *block.parameters()])
    assert block.mlp.fc1.out_features == 9
    if num_heads:
        assert isinstance(block.mixer, Global)
        assert block.norm1.eps == block.norm2.eps == 1e-6


@pytest.mark.parametrize("num_heads", [None, 2], ids=["local", "global"])
def test_stochastic_depth_is_of_all_but_the_position_embedding(num_heads):
    x = torch.randn(2, 3, 4, 6)
    torch.manual_seed(0)
    block = Block(6, 2, num_heads, 2.0, drop_path=0.999, layer_scale=0).train()
    torch.testing.assert_close(block(x), x + block.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2)])
def test_patches_meet_zeros_at_the_edge(size):
    embed = moved(PatchEmbed(3, 5, 2, None))
    x = normal(2, 3, *size)
    full = torch.zeros(2, 3, *(side + side % 2 for side in size), dtype=x.dtype)
    full[:, :, : size[0], : size[1]] = x
    rows = [
        [
            torch.einsum("oiyx,biyx->bo", embed.proj.weight, full[:, :, r : r + 2, c : c + 2]) + embed.proj.bias
            for c in range(0, full.shape[3], 2)
        ]
        for r in range(0, full.shape[2], 2)
    ]
    places = torch.stack([torch.stack(row, 1) for row in rows], 1)
    torch.testing.assert_close(embed(x), slow_norm(embed.norm, places))
    assert embed.norm.eps == 1e-5


@pytest.mark.parametrize(("time", "frames", "seen"), [(2, 5, [(-1, 2), (1, 4), (3, 6)]), (1, 2, [(0, 1), (1, 2)])])
def test_patches_of_clips_see_the_frames_beside_them(time, frames, seen):
    embed = moved(PatchEmbed(3, 5, 2, time))
    x = normal(1, 3, frames, 2, 3)
    found = embed(x)
    assert found.shape == (1, len(seen), 1, 2, 5)
    for place, (start, end) in enumerate(seen):
        total = embed.proj.bias
        for tap, frame in enumerate(range(start, end)):
            if 0 <= frame < frames:
                total = total + torch.einsum("oiyx,iyx->o", embed.proj.weight[:, :, tap], x[0, :, frame, :, :2])
        torch.testing.assert_close(found[0, place, 0, 0], slow_norm(embed.norm, total))


def test_overlapping_patches_are_convolutions():
    torch.manual_seed(0)
    embed = moved(ConvEmbed(3, (4, 6), (2, 1))).eval()
    x = normal(2, 3, 5, 8)
    inside = F.conv2d(x, embed[0].weight, embed[0].bias, stride=2, padding=1).permute(0, 2, 3, 1)
    inside = F.gelu(slow_norm(embed[1], inside)).permute(0, 3, 1, 2)
    inside = F.conv2d(inside, embed[3].weight, embed[3].bias, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(embed(x), slow_norm(embed[4], inside))


# ---- the net


@pytest.mark.parametrize("axes", [2, 3])
def test_the_net_is_stages_norm_mean_and_head(axes):
    model = moved(tiny(axes=axes)).eval()
    x = normal(2, 3, *(3,) * (axes - 2), 40, 70)
    inside = x
    for stage in model.stages:
        inside = stage.embed(inside)
        for block in stage.blocks:
            inside = block(inside)
        inside = inside.movedim(-1, 1)
    assert inside.shape == (2, 8, *(2,) * (axes - 2), 2, 3)
    inside = slow_norm(model.norm, inside.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(model.forward_features(x), inside)
    pooled = inside.flatten(2).mean(2)
    torch.testing.assert_close(model.forward_head(inside, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), linear(model.head, pooled))


def test_depth_rises_and_layer_decay_follows_it():
    model = tiny(drop_path_rate=0.5)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    number = group_parameters(model, model.group_matcher(), reverse=True)
    assert number["stages.0.embed.proj.weight"] == number["stages.0.embed.norm.bias"] == 0
    assert number["stages.1.embed.proj.weight"] == number["stages.1.blocks.0.pos_embed.weight"]
    order = ["stages.0.embed.proj.weight"]
    order += [f"stages.{i}.blocks.{j}.mlp.fc1.bias" for i, d in enumerate(TINY["depths"]) for j in range(d)]
    depths = [number[name] for name in order]
    assert depths == sorted(set(depths))
    assert depths[-1] == number["norm.weight"] < number["head.weight"]


def test_weights_begin_as_published():
    model = create_model("uniformer_nano", num_classes=100, dims=(32, 32, 64, 128), layer_scale=(0, 0, 1e-6, 1e-6))
    for i, stage in enumerate(model.stages):
        for layer in (module for module in stage.blocks.modules() if isinstance(module, torch.nn.Linear)):
            std = 0.02 if i > 1 else (3 * layer.in_features) ** -0.5
            assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.15)
            assert bool(layer.bias.any()) == (i < 2)
        assert hasattr(stage.blocks[0].ls1, "gamma") == (i > 1)
    assert torch.equal(model.stages[3].blocks[0].ls2.gamma.detach(), torch.full((128,), 1e-6))


def test_variants_are_as_published(monkeypatch):
    names = ("small", "small_dim32", "small_plus", "small_plus_dim64", "base", "base_dim32", "base_ls", "large_ls")
    for name in names:
        with torch.device("meta"):
            model = create_model(f"uniformer_{name}", num_classes=10, depths=(1, 1, 1, 1))  # depths: see the card
        assert [type(stage.blocks[0].mixer) for stage in model.stages] == [Local, Local, Global, Global]
        width = 32 if name in ("small_plus", "small_dim32", "base_dim32") else 64
        for stage in model.stages[2:]:
            assert stage.blocks[0].mixer.qkv.in_features == width * stage.blocks[0].mixer.num_heads
        scaled = [hasattr(stage.blocks[0].ls1, "gamma") for stage in model.stages]
        assert scaled == [name == "large_ls"] * 2 + [name.endswith("ls")] * 2
        assert isinstance(model.stages[0].embed, ConvEmbed) == ("plus" in name)
        assert model.pretrained_cfg["crop_pct"] == 0.875
    with torch.device("meta"):
        assert count_parameters(uniformer_video_small()) == 21_400_400
        assert count_parameters(uniformer_video_base()) == 49_813_200
    made = {}
    monkeypatch.setattr(uniformer, "create", lambda kind, name, pretrained, weights, **own: made.update({name: own}))
    uniformer.uniformer_base_ls()
    uniformer.uniformer_large_ls()
    assert made["uniformer_base_ls"]["layer_scale"] == (0, 0, 1e-6, 1e-6)
    assert made["uniformer_large_ls"]["layer_scale"] == (1e-6,) * 4


@pytest.mark.parametrize("options", [{}, {"axes": 3}, {"overlap": True}], ids=["images", "clips", "overlap"])
def test_the_authors_keys_become_ours(options):
    ours, twin = (tiny(**options, layer_scale=(scale,) * 4) for scale in (0.1, 0.2))
    theirs = {"aux_head.weight": torch.zeros(3, 8), "aux_head.bias": torch.zeros(3)}
    for key, value in ours.state_dict().items():
        name, value = _authors_name(key, value + 1, ours.axes)
        theirs[name] = value
    names = {"patch_embed2.proj.0.weight" if "overlap" in options else "patch_embed2.norm.bias", "norm.running_var"}
    names |= {"blocks1.0.pos_embed.weight", "blocks2.0.conv1.weight", "blocks2.0.attn.bias", "blocks1.0.gamma_1"}
    names |= {"blocks3.1.attn.qkv.weight", "blocks4.1.attn.proj.bias", "blocks4.0.mlp.fc1.weight", "head.bias"}
    assert names <= set(theirs)
    assert theirs["blocks2.0.conv1.weight"].ndim == ours.axes + 2
    for given in (theirs, {"model": theirs, "epoch": 3}, {"model_state": theirs}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def _authors_name(key, value, axes):
    if not key.startswith("stages"):
        return key, value
    _, stage, kind, *rest = key.split(".")
    number = int(stage) + 1
    if kind == "embed":
        return ".".join([f"patch_embed{number}", *([] if rest[0] in ("proj", "norm") else ["proj"]), *rest]), value
    block, part, *rest = rest
    local, ones = number < 3, (None,) * axes
    if part == "mixer":
        inner, last = rest
        if local:
            part, rest = {"value": "conv1", "affinity": "attn", "proj": "conv2"}[inner], [last]
        else:
            part = "attn"
    if part in ("ls1", "ls2"):
        part, rest = f"gamma_{part[-1]}", []
        value = value[(None, slice(None), *ones)] if local else value
    if local and part in ("conv1", "conv2", "mlp") and rest[-1] == "weight":
        value = value[(..., *ones)]
    return ".".join([f"blocks{number}.{block}", part, *rest]), value


def test_an_images_net_becomes_the_beginning_of_a_clips_net():
    torch.manual_seed(0)
    image, clip = tiny().eval(), tiny(axes=3, num_classes=5).eval()
    before = clip.head.weight.clone()
    clip.load_state_dict(inflate(image.state_dict(), clip), strict=True)
    assert torch.equal(clip.head.weight, before)
    still = torch.randn(2, 3, 1, 32, 32)
    many = still.expand(-1, -1, 31, -1, -1)  # long enough that places in the middle see no end
    inside = clip.stages[0](many)[:, :, 8]
    torch.testing.assert_close(inside, image.stages[0](still[:, :, 0]), rtol=1e-4, atol=1e-5)
    other = tiny(axes=3)
    assert torch.equal(inflate(image.state_dict(), other)["head.weight"], image.head.weight)
    for key, value in inflate(image.state_dict(), other).items():
        if value.ndim == 5:
            mean = image.state_dict()[key] / value.shape[2]
            assert all(torch.equal(part, mean) for part in value.unbind(2)), key


def test_any_size_dense_features_and_pooling():
    features = create_model("uniformer_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (64, 5, 7), (128, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    assert tiny(overlap=True).eval()(torch.randn(1, 3, 225, 190)).shape == (1, 3)
    model = tiny(num_classes=0, global_pool="")
    assert model(torch.zeros(2, 3, 33, 65)).shape == (2, 8, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(2, 3, 33, 65)).shape == (2, 4)


def test_clips_of_any_length_and_size():
    model = uniformer_video_nano().eval()
    for size in ((1, 16, 16), (8, 28, 17), (5, 32, 32)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 10)
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 7, 20, 33)).shape == (1, 128, 4, 2, 3)


def test_a_clips_net_sees_the_order_of_frames():
    model = moved(tiny(axes=3)).eval()
    clip = normal(1, 3, 8, 32, 32)
    assert float((model(clip) - model(clip.flip(2))).detach().abs().max()) > 1e-3
    frames = moved(net_of("frames")).eval()
    clip = normal(1, 1, 8, 16, 16)
    torch.testing.assert_close(frames(clip), frames(clip.flip(2)))


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = [count_parameters(create_model("uniformer_nano", num_classes=10, **options)) for options in ARMS.values()]
    for count in counts:
        assert count == pytest.approx(counts[0], rel=0.01)
    assert count_parameters(net_of("frames")) == pytest.approx(count_parameters(net_of("clips")), rel=0.01)


def test_digits_move_a_pixel_a_frame():
    digits = torch.rand(5, 8, 8) + 0.1
    clips, labels = digits_in_motion(digits, 64, torch.Generator().manual_seed(0))
    assert clips.shape == (64, 1, FRAMES, SIDE, SIDE)
    assert set(labels.tolist()) == {0, 1, 2, 3}
    drawn = set()
    for clip, label in zip(clips[:, 0], labels.tolist(), strict=True):
        down, right = ((-1, 0), (1, 0), (0, -1), (0, 1))[label]
        for number, frame in enumerate(clip):
            assert torch.equal(frame, clip[0].roll((down * number, right * number), (0, 1)))
        matches = [n for n, d in enumerate(digits) if torch.isclose(d.sum(), clip[0].sum())]
        drawn.update(matches)
    assert drawn == set(range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*each of four stages"),
        ({"dims": (4, 4, 8)}, "dims = .* has 3 entries"),
        ({"layer_scale": (1e-6,)}, "layer_scale = .* has 1 entries"),
        ({"aggregators": "LLG"}, "aggregators = 'LLG' .*L or G for each stage"),
        ({"aggregators": "LLGX"}, "aggregators = 'LLGX'"),
        ({"head_dim": 3}, "head_dim = 3 does not divide a width of 8"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"axes": 4}, "axes = 4 .*2 for images, 3 for clips"),
        ({"axes": 3, "overlap": True}, "overlap = True is for images"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny()(torch.zeros(1, 3, 2, 8, 12)), "does not suit a net of 2 axes: give .*height, width"),
        (lambda: tiny(axes=3)(torch.zeros(1, 3, 8, 12)), "does not suit a net of 3 axes: give .*frames"),
        (lambda: inflate(tiny(depths=(1, 1, 1, 2)).state_dict(), tiny(axes=3)), "is absent, .*the same stages"),
        (lambda: inflate(tiny(dims=(4, 4, 8, 4)).state_dict(), tiny(axes=3)), "becomes .*the same stages"),
    ],
)
def test_calls_that_do_not_fit_are_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
