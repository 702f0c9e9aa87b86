import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock

from exact import moved, normal
from nets import pyramid
from vitrail.app.build import count_parameters
from vitrail.checks.iwin import NET, Neighbours, reach_of_blocks, shifted_windows, windows_of_neighbours
from vitrail.errors import InputError
from vitrail.layers.interleaved import InterleavedAttention
from vitrail.models import create_model, iwin
from vitrail.models.iwin import Block, Downsample, Iwin, PatchEmbed, checkpoint_filter_fn, default_cfgs

TINY = {
    "num_classes": 3,
    "dim": 4,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "window": 2,
    "stem_stride": 2,
}


def tiny(**options):
    torch.manual_seed(0)
    return Iwin(**{**TINY, **options})


def norm_of(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


# ---- the net


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 5)])
def test_a_block_adds_its_attention_and_its_feed_forward(grid):
    block = moved(Block(8, InterleavedAttention(8, 2, 2), 3.0, drop_path=0))
    x = 0.01 * normal(2, *grid, 8)
    y = x + block.attn(norm_of(block.norm1, x))
    hidden = block.mlp.fc1(norm_of(block.norm2, y))
    assert hidden.shape[-1] == 24
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(block(x), y + block.mlp.fc2(hidden), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 4)])
def test_a_downsampling_sees_zeros_behind_the_map_alone(height, width):
    layer = moved(Downsample(3, 5))
    x = normal(2, height, width, 3)
    normed = norm_of(layer.norm, x)
    down, across = math.ceil(height / 2), math.ceil(width / 2)
    out = torch.zeros(2, down, across, 5, dtype=x.dtype)
    for i in range(down):
        for j in range(across):
            out[:, i, j] = layer.conv.bias
            for u in range(3):
                for v in range(3):
                    if 2 * i + u < height and 2 * j + v < width:
                        out[:, i, j] += normed[:, 2 * i + u, 2 * j + v] @ layer.conv.weight[:, :, u, v].T
    torch.testing.assert_close(layer(x), out)
    clip = torch.stack((x, 2 * x), 1)
    torch.testing.assert_close(layer(clip)[:, 1], layer(2 * x))


def test_patches_are_filled_up_behind():
    image = moved(PatchEmbed(2, 3, 2, None))
    x = normal(1, 2, 3, 5)
    full = F.conv2d(F.pad(x, (0, 1, 0, 1)), image.proj.weight, image.proj.bias, 2).movedim(1, -1)
    torch.testing.assert_close(image(x), norm_of(image.norm, full).movedim(-1, 1))
    clip = moved(PatchEmbed(2, 3, 2, 2))
    x = normal(1, 2, 3, 3, 5)
    full = F.conv3d(F.pad(x, (0, 1, 0, 1, 0, 1)), clip.proj.weight, clip.proj.bias, 2).movedim(1, -1)
    torch.testing.assert_close(clip(x), norm_of(clip.norm, full).movedim(-1, 1))


def test_the_net_is_stem_stages_norm_mean_and_head():
    model = moved(tiny()).eval()
    x = normal(2, 3, 45, 61)
    inside = model.stem(x)
    for i, stage in enumerate(model.stages):
        inside = inside.permute(0, 2, 3, 1)
        if i:
            inside = stage.downsample(inside)
        for block in stage.blocks:
            inside = block(inside)
        inside = inside.permute(0, 3, 1, 2)
    assert inside.shape == (2, 32, 3, 4)
    pooled = norm_of(model.norm, inside.permute(0, 2, 3, 1)).mean((1, 2))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)
    assert [block.attn.conv is not None for stage in model.stages for block in stage.blocks] == [True] * 4 + [False]


def test_drop_path_rises_and_weights_begin_as_published():
    model = tiny(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    for model in (create_model("iwin_nano", num_classes=100), iwin.iwin_video_nano(num_classes=100)):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
                assert not module.bias.any()
            if isinstance(module, torch.nn.Conv2d):  # torch's own beginning
                bound = 1 / math.sqrt(module.weight[0].numel())
                assert 0.8 * bound < module.weight.detach().abs().max() <= bound, name
    fan_out = 16 * model.stem.proj.weight[0, 0].numel()
    assert float(model.stem.proj.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
    assert not model.stem.proj.bias.any()
    assert not model.time_embed.any()


def test_variants_are_as_published(monkeypatch):
    with torch.device("meta"):
        model = create_model("iwin_tiny", num_classes=1000)
        assert model(torch.zeros(1, 3, 225, 190)).shape == (1, 1000)
    assert count_parameters(model) == 30_226_504
    made = {}
    monkeypatch.setattr(iwin, "create", lambda kind, name, pretrained, weights, **own: made.update({name: own}))
    for name in ("tiny", "small", "small_384", "small_512", "small_1024"):
        getattr(iwin, f"iwin_{name}")()
    for name in ("base", "base_384", "base_512", "base_1024", "large", "large_384"):
        getattr(iwin, f"iwin_{name}")()
    published = {
        "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
        "small": (96, (2, 2, 18, 2), (3, 4, 8, 16)),
        "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
        "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
    }
    for name, own in made.items():
        options = {key: value.default for key, value in inspect.signature(Iwin).parameters.items()} | own
        _, kind, *side = name.split("_")
        assert (options["dim"], options["depths"], options["num_heads"]) == published[kind]
        assert options["window"] == {"384": 12, "512": 16, "1024": 16}.get(*side or ["224"], 7)
        assert options["conv"] == (True, True, True, side == ["1024"])
        assert (options["mlp_ratio"], options["stem_stride"], options["frames"]) == (4, 4, None)
        found = default_cfgs[name].default
        assert found.input_size == (3, *[int(side[0] if side else 224)] * 2)
        assert found.crop_pct == (1.0 if side else 0.875)
    assert len(made) == 11
    defaults = {key: value.default for key, value in inspect.signature(Iwin).parameters.items()}
    monkeypatch.setattr(iwin, "Iwin", lambda **own: {**defaults, **own})
    for kind, (dim, depths, heads) in published.items():
        clips = getattr(iwin, f"iwin_video_{kind}")()
        assert (clips["dim"], clips["depths"], clips["window"], clips["conv"][3]) == (dim, depths, 7, False)
        assert clips["num_heads"] == (published["tiny"][2] if kind == "small" else heads)
        assert (clips["frames"], clips["num_classes"]) == (32, 400)


# ---- clips


def test_a_net_for_clips_adds_times_and_interpolates_them():
    model = moved(tiny(frames=8)).eval()
    x = normal(2, 3, 8, 17, 12)
    torch.testing.assert_close(
        model.forward_features(x),
        model.norm(model.stages(model.stem(x) + model.time_embed).movedim(1, -1)).movedim(-1, 1),
    )
    assert model(x).shape == (2, 3)
    for frames, places in ((8, 4), (5, 3), (16, 8)):
        times = F.interpolate(model.time_embed[..., 0, 0], places, mode="linear")[..., None, None]
        x = normal(1, 3, frames, 16, 16)
        stem = model.stem(x) + times
        torch.testing.assert_close(
            model.forward_features(x).movedim(1, -1), model.norm(model.stages(stem).movedim(1, -1))
        )
    assert model.no_weight_decay() == {"time_embed"}
    assert tiny(frames=5).time_embed.shape == (1, 4, 3, 1, 1)
    assert "time_embed" in dict(model.named_parameters())
    pooled = model.forward_features(x).mean((2, 3, 4))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    assert tiny(frames=8, num_classes=0, global_pool="")(x.float()).ndim == 5


def test_windows_of_clips_have_all_times():
    model = tiny(frames=6).eval()
    x = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    y = model.stages[0].blocks[0](x.movedim(1, -1).repeat(1, 1, 1, 1, 2)[..., :4])
    (slope,) = torch.autograd.grad(y[0, 0, 0, 0].sum(), x)
    seen = slope[0].abs().sum(0).gt(0)
    assert seen[1:].flatten(1).sum(1).tolist() == [4, 4, 4]
    assert int(seen[0].sum()) == 7


# ---- the authors' weights


def authors_name(key):
    head, _, rest = key.partition(".")
    if head == "stem":
        return f"patch_embed.{rest}"
    if head != "stages":
        return key
    stage, _, rest = rest.partition(".")
    if rest.startswith("downsample"):
        return f"layers.{int(stage) - 1}.{rest}"
    return f"layers.{stage}.{rest.replace('attn.conv', 'dwconv.depthwise')}"


def test_the_authors_keys_become_ours():
    ours, twin = tiny(), tiny()
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    theirs = {authors_name(key): value for key, value in state.items()}
    names = ["patch_embed.proj.weight", "patch_embed.norm.bias", "layers.0.blocks.0.dwconv.depthwise.weight"]
    names += ["layers.2.blocks.1.attn.qkv.bias", "layers.0.downsample.norm.weight", "layers.2.downsample.conv.bias"]
    names += ["layers.3.blocks.0.mlp.fc2.weight", "norm.weight", "head.bias", "layers.1.blocks.0.norm2.weight"]
    assert set(names) <= set(theirs)
    dense = {f"backbone.{key}": value for key, value in theirs.items()}
    dense |= {f"backbone.norm{i}.weight": torch.zeros(2) for i in range(4)}
    dense |= {"decode_head.conv_seg.weight": torch.zeros(2), "auxiliary_head.x": torch.zeros(2)}
    for given in (theirs, {"model": theirs, "epoch": 3}, {"state_dict": dense}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), key
        twin.load_state_dict(ours.state_dict())
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def test_weights_of_clips_and_of_images_begin_a_net_for_clips():
    images, clips = tiny(), tiny(frames=8, num_classes=5)
    theirs = {f"backbone.{authors_name(k)}": v + 1 for k, v in clips.state_dict().items() if not k.startswith("head")}
    theirs |= {f"cls_head.fc_cls.{k}": clips.head.state_dict()[k] + 1 for k in ("weight", "bias")}
    twin = tiny(frames=8, num_classes=5)
    twin.load_state_dict(checkpoint_filter_fn({"state_dict": theirs}, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, clips.state_dict()[key] + 1), key
    with torch.no_grad():
        clips.time_embed += 3
    found = checkpoint_filter_fn(images.state_dict(), clips)
    assert torch.equal(found["time_embed"], clips.time_embed)
    assert torch.equal(found["head.weight"], clips.head.weight)
    patches = images.stem.proj.weight
    assert torch.equal(found["stem.proj.weight"], torch.stack((patches, patches), 2) / 2)
    clips.load_state_dict(found)
    assert torch.equal(checkpoint_filter_fn(images.state_dict(), tiny(frames=8))["head.weight"], images.head.weight)
    bare = tiny(frames=8, num_classes=0)
    without = {key: value for key, value in images.state_dict().items() if not key.startswith("head")}
    bare.load_state_dict(checkpoint_filter_fn(without, bare))


# ---- the surface


def test_any_size_dense_features_and_pooling():
    assert pyramid("iwin_nano", 0, 2, 3) == ([(16, 23, 31), (64, 6, 8), (128, 3, 4)], [2, 8, 16])
    model = tiny(num_classes=0, global_pool="")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 32, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


def test_the_same_weights_take_larger_windows_at_a_larger_size():
    small, large = tiny(), tiny(window=4)
    large.load_state_dict(small.state_dict(), strict=True)
    assert large(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    # A window that is larger than the map changes nothing.
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(large(x), small(x))


# ---- the check


def test_windows_of_neighbours_are_those():
    torch.manual_seed(0)
    attention = moved(InterleavedAttention(4, 2, 2))
    x = normal(1, 4, 5, 4)
    conv = attention.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    module = Neighbours(attention)
    y = module(x) - conv
    for row in range(0, 4, 2):
        for column in range(0, 5, 2):
            window = F.pad(x[:, row : row + 2, column : column + 2], (0, 0, 0, int(column == 4)))
            wanted = attention(window)[:, :, : 5 - column]
            torch.testing.assert_close(y[:, row : row + 2, column : column + 2], wanted)


def test_arms_of_the_check_are_of_one_size():
    counts = []
    for edit in (None, windows_of_neighbours(), shifted_windows(side=28)):
        model = create_model("iwin_nano", num_classes=10, **NET)
        if edit:
            edit(model)
            with pytest.raises(InputError, match="for an Iwin net, and this is a Linear"):
                edit(torch.nn.Linear(2, 2))
        assert model.eval()(torch.zeros(1, 3, 28, 28)).shape == (1, 10)
        counts.append(count_parameters(model))
    assert counts == pytest.approx([counts[0]] * 3, rel=0.01)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert all(isinstance(block, SwinTransformerBlock) for block in blocks)
    assert [block.shift_size[0] for block in blocks] == [0, 2, 0, 2, 0, 0, 0]
    assert [block.window_size[0] for block in blocks] == [4, 4, 4, 4, 4, 4, 2]
    assert float(blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_blocks_reach_windows_and_neighbours():
    reach = {(row["windows"], row["map"], row["blocks"]): row["reach"] for row in reach_of_blocks((14, 7))}
    assert reach["interleaved", 14, 1] == pytest.approx((49 + 4 - 1) / 196)
    assert reach["interleaved", 14, 2] == 1
    assert reach["interleaved", 7, 1] == reach["shifted", 7, 1] == 1
    assert reach["shifted", 14, 1] == pytest.approx(49 / 196)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\) has 3 entries.*each of four stages"),
        ({"num_heads": (2,)}, r"num_heads = \(2,\) has 1 entries"),
        ({"conv": (True,)}, r"conv = \(True,\) has 1 entries"),
        ({"num_heads": (1, 3, 4, 4)}, "num_heads = 3 does not divide a width of 8"),
        ({"window": 0}, "window of 0 "),
        ({"frames": 0}, "frames = 0 .*None for images"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_inputs_that_do_not_fit_are_explained():
    with pytest.raises(InputError, match=r"a net for images: give \(batch, channels, height, width\)"):
        tiny()(torch.zeros(1, 3, 2, 8, 8))
    with pytest.raises(InputError, match=r"a net for clips: give \(batch, channels, frames, height, width\)"):
        tiny(frames=4)(torch.zeros(1, 3, 8, 8))
