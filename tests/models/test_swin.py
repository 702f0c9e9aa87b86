import pytest
import timm
import torch
import torch.nn.functional as F

from exact import moved, normal
from vitrail.checks.swin import ARMS, NET
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.dense import detector, segmentation_loss, segmenter
from vitrail.models.swin import Block, MixerBlock, Swin, _strangers, checkpoint_filter_fn

TINY = {"patch_size": 2, "embed_dim": 4, "depths": (2, 2), "num_heads": (1, 2), "window_size": 3}


def tiny(**options):
    torch.manual_seed(0)
    return Swin(num_classes=3, **{**TINY, **options})


# ---- slow loops, from the paper and the published code


def rows_of_windows(side, window, shift):
    """Return, for each row of a map, the window that it is in, of windows shifted by so many rows."""
    shift = 0 if side <= window else shift
    return [(row + window - shift) // window if shift else row // window for row in range(side)], shift


def slow_attention(block, x):
    """Attend in one map (H, W, C): a place sees those whose window, in the shifted grid of the plane, is its own."""
    attention, (tall, wide) = block.attn, block.window_size
    (height, width, channels), heads = x.shape, block.attn.num_heads
    down, _ = rows_of_windows(height, tall, block.shift_size[0])
    across, _ = rows_of_windows(width, wide, block.shift_size[1])
    qkv = (x @ attention.qkv.weight.T + attention.qkv.bias).unflatten(2, (3, heads, -1))
    out = torch.zeros_like(x)
    places = [(row, column) for row in range(height) for column in range(width)]
    for row, column in places:
        seen = [(r, c) for r, c in places if down[r] == down[row] and across[c] == across[column]]
        parts = []
        for head in range(heads):
            scores = []
            for r, c in seen:
                offset = (row - r + tall - 1) * (2 * wide - 1) + column - c + wide - 1
                score = qkv[row, column, 0, head] @ qkv[r, c, 1, head] / (channels // heads) ** 0.5
                scores.append(score + attention.relative_position_bias_table[offset, head])
            weights = torch.stack(scores).softmax(0)
            parts.append(sum(weight * qkv[r, c, 2, head] for weight, (r, c) in zip(weights, seen)))
        out[row, column] = attention.proj(torch.cat(parts))
    return out


def slow_mixer(block, x):
    """Mix one map (H, W, C): each window sums its places, zeros where it is outside the map."""
    (tall, wide), heads = block.window_size, block.num_heads
    height, width, channels = x.shape
    down, step_down = rows_of_windows(height, tall, block.shift_size[0])
    across, step_across = rows_of_windows(width, wide, block.shift_size[1])
    places, depth = tall * wide, channels // heads
    weight = block.spatial_mlp.weight.view(heads, places, places)
    bias = block.spatial_mlp.bias.view(heads, places)

    def number(row, column):
        above = tall - step_down if step_down else 0
        left = wide - step_across if step_across else 0
        return (row + above) % tall * wide + (column + left) % wide

    out = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for head in range(heads):
                part = slice(head * depth, (head + 1) * depth)
                total = bias[head, number(row, column)].expand(depth).clone()
                for r in range(height):
                    for c in range(width):
                        if down[r] == down[row] and across[c] == across[column]:
                            total = total + weight[head, number(row, column), number(r, c)] * x[r, c, part]
                out[row, column, part] = total
    return out


def block_of(kind, window, shift, dim=4, heads=2):
    torch.manual_seed(0)
    if kind is MixerBlock:
        return moved(MixerBlock(dim, heads, window, shift))
    options = {"always_partition": True, "dynamic_mask": True}
    return moved(Block(dim, window, heads, window_size=window, shift_size=shift, **options))


@pytest.mark.parametrize("kind", [Block, MixerBlock])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((4, 6), (2, 2), (0, 0)),
        ((4, 6), (2, 2), (1, 1)),
        ((5, 7), (3, 3), (0, 0)),
        ((5, 7), (3, 3), (1, 1)),
        ((4, 5), (3, 2), (1, 1)),
        ((3, 5), (4, 4), (2, 2)),
        ((2, 3), (4, 4), (2, 2)),
    ],
)
def test_a_block_mixes_as_the_slow_loop(kind, size, window, shift):
    block = block_of(kind, window, shift)
    x = normal(2, *size, 4).requires_grad_()
    mix, slow = (block._mix, slow_mixer) if kind is MixerBlock else (block._attn, slow_attention)
    ours, theirs = mix(x), torch.stack([slow(block, one) for one in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    given = [x, *(block.spatial_mlp if kind is MixerBlock else block.attn).parameters()]
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given), torch.autograd.grad((theirs * weight).sum(), given)
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [Block, MixerBlock])
def test_a_block_is_two_branches(kind):
    block = block_of(kind, (2, 2), (1, 1))
    x = normal(1, 4, 4, 4)
    mix = block._mix if kind is MixerBlock else block._attn
    inside = x + mix(F.layer_norm(x, (4,), block.norm1.weight, block.norm1.bias))
    hidden = F.gelu(F.linear(block.norm2(inside), block.mlp.fc1.weight, block.mlp.fc1.bias))
    torch.testing.assert_close(block(x), inside + block.mlp.fc2(hidden))


def test_stochastic_depth_is_of_both_branches():
    x = torch.randn(2, 5, 4, 4)
    torch.manual_seed(0)
    for kind, options in ((MixerBlock, {}), (Block, {"input_resolution": (3, 3), "dynamic_mask": True})):
        block = kind(dim=4, num_heads=2, window_size=(3, 3), shift_size=(1, 1), drop_path=0.999, **options).train()
        assert torch.equal(block(x), x)


def test_masks_are_timms_where_windows_divide_the_map():
    timms = timm.models.swin_transformer.SwinTransformerBlock(4, (8, 12), 1, window_size=4, shift_size=2)
    ours = _strangers((8, 12), (8, 12), (4, 4), (2, 2), torch.device("cpu"))
    assert torch.equal(ours, timms.attn_mask != 0)
    assert _strangers((8, 12), (8, 12), (4, 4), (0, 0), torch.device("cpu")) is None


# ---- the net


def test_it_is_timms_where_timm_can_run():
    options = {"patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
    torch.manual_seed(0)
    theirs = timm.models.swin_transformer.SwinTransformer(
        img_size=24, window_size=3, num_classes=3, **options, drop_path_rate=0.0
    ).eval()
    ours = Swin(num_classes=3, window_size=3, **options).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value += 0.2 * torch.randn_like(value)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["attention", "mlp"])
@pytest.mark.parametrize("size", [(28, 28), (45, 61), (224, 224), (225, 190), (5, 3)])
def test_images_of_any_size(mixer, size):
    net = tiny(mixer=mixer).eval()
    features = net.forward_features(torch.randn(1, 3, *size))
    assert features.shape == (1, -(-size[0] // 4), -(-size[1] // 4), 8)
    assert net(torch.randn(1, 3, *size)).shape == (1, 3)


def test_what_fills_up_a_map_is_not_seen():
    net = tiny(depths=(2,), num_heads=(1,), window_size=3).double().eval()
    x = normal(1, 4, 5, 4)
    block = net.layers[0].blocks[1]
    torch.nn.init.normal_(block.attn.qkv.bias)
    other = block_of(Block, (9, 9), (0, 0), heads=1)
    other.attn.load_state_dict(
        {k: v for k, v in block.attn.state_dict().items() if k != "relative_position_bias_table"}, strict=False
    )
    torch.nn.init.zeros_(other.attn.relative_position_bias_table)
    full = F.scaled_dot_product_attention(*(other.attn.qkv(x.flatten(1, 2))[:, None].chunk(3, -1)))[:, 0]
    torch.testing.assert_close(other._attn(x).flatten(1, 2), other.attn.proj(full))


def test_every_second_block_is_shifted():
    net = tiny(depths=(3, 2), window_size=(4, 3))
    assert [b.shift_size for stage in net.layers for b in stage.blocks] == [(0, 0), (2, 2), (0, 0), (0, 0), (1, 1)]
    assert [b.window_size for stage in net.layers for b in stage.blocks] == [(4, 4)] * 3 + [(3, 3)] * 2
    still = tiny(shift=False)
    assert not any(any(b.shift_size) for stage in still.layers for b in stage.blocks)
    rates = [
        0,
        *(
            b.drop_path1.drop_prob
            for s in tiny(drop_path_rate=0.3).layers
            for b in s.blocks
            if hasattr(b.drop_path1, "drop_prob")
        ),
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("kind", [Block, MixerBlock])
def test_a_side_of_one_window_is_not_shifted(kind):
    x = normal(1, 6, 3, 4)
    found = []
    for shift in ((1, 0), (1, 1)):
        block = block_of(kind, (3, 3), shift)
        found.append(block._mix(x) if kind is MixerBlock else block._attn(x))
    assert torch.equal(*found)


def test_weights_begin_as_published():
    torch.manual_seed(0)
    net = create_model("swin_mixer_nano", num_classes=10)
    block = net.layers[1].blocks[0]
    for layer in (block.spatial_mlp, block.mlp.fc1, net.layers[2].downsample.reduction, net.head.fc):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert layer.bias is None or not layer.bias.any()
    attention = create_model("swin_nano", num_classes=10).layers[1].blocks[0].attn
    assert float(attention.relative_position_bias_table.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not attention.qkv.bias.any()


@pytest.mark.parametrize(
    ("name", "heads", "windows"),
    [
        ("swin_tiny", (3, 6, 12, 24), 7),
        ("swin_tiny_c24", (4, 8, 16, 32), 8),
        ("swin_large", (6, 12, 24, 48), 7),
        ("swin_mixer_tiny_c12", (8, 16, 32, 64), 8),
        ("swin_mixer_base", (4, 8, 16, 32), 7),
    ],
)
def test_variants_are_as_published(name, heads, windows):
    with torch.device("meta"):
        net = create_model(name, num_classes=1000)
    for stage, wanted in zip(net.layers, heads):
        block = stage.blocks[0]
        assert (block.num_heads if "mixer" in name else block.attn.num_heads) == wanted
        assert block.window_size == (windows, windows)
    assert isinstance(net.layers[0].blocks[0], MixerBlock if "mixer" in name else Block)
    assert net.pretrained_cfg["crop_pct"] == 0.9


@pytest.mark.parametrize("mixer", ["attention", "mlp"])
def test_the_authors_keys_become_ours(mixer):
    net = tiny(mixer=mixer)
    theirs = {}
    for key, value in net.state_dict().items():
        key = key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head.")
        theirs[key] = value
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    theirs["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(1)
    for given in ({"model": theirs}, {"state_dict": {f"module.{key}": value for key, value in theirs.items()}}):
        found = checkpoint_filter_fn(given, net)
        assert found.keys() == net.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in net.state_dict().items())
    assert checkpoint_filter_fn(net.state_dict(), net).keys() == net.state_dict().keys()


def test_another_window_takes_its_table_by_interpolation():
    wide = tiny(window_size=5)
    found = checkpoint_filter_fn(tiny().state_dict(), wide)
    wide.load_state_dict(found)
    assert found["layers.0.blocks.0.attn.relative_position_bias_table"].shape == (81, 1)


@pytest.mark.parametrize("name", ["swin_nano", "swin_mixer_nano"])
def test_features_feed_the_heads(name):
    x = torch.randn(2, 3, 33, 41)
    features = create_model(name, num_classes=0, features_only=True)
    assert [tuple(one.shape) for one in features(x)] == [
        (2, 16, 17, 21),
        (2, 32, 9, 11),
        (2, 64, 5, 6),
        (2, 128, 3, 3),
    ]
    model = segmenter(name, 3, width=8)
    segmentation_loss(model(x), torch.zeros(2, 33, 41, dtype=torch.int64)).backward()
    assert all(p.grad is not None for p in model.parameters())
    found = detector(name, 3, width=8).eval()(list(x))
    assert len(found) == 2


def test_timms_own_features_feed_them_too():
    net = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=64, embed_dim=12, depths=(1,) * 4
    )
    assert segmenter(net, 3, width=8)(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "mpl"}, "'mlp'"),
        ({"num_heads": (3, 2)}, "does not divide a width of 4"),
        ({"num_heads": (0, 2)}, "num_heads = 0"),
        ({"num_heads": (1, 2, 4)}, "several lengths"),
        ({"window_size": (3,)}, "several lengths"),
        ({"window_size": 0}, "1 place or more"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_arms_of_the_check_differ_in_the_shift_alone():
    count, shifts = {}, {}
    for name, (kind, own) in ARMS.items():
        with torch.device("meta"):
            net = create_model(kind, num_classes=10, **{**NET, **own})
        count[name] = sum(p.numel() for p in net.parameters())
        shifts[name] = [block.shift_size for stage in net.layers for block in stage.blocks]
        assert shifts[name] == [(0, 0), (0, 0) if "unshifted" in name else (2, 2)] * 4
    assert count["shifted"] == count["unshifted"]
    assert count["mixer, shifted"] == count["mixer, unshifted"]
    assert count["wide, unshifted"] == pytest.approx(count["shifted"], rel=0.01)
