from dataclasses import replace

import pytest
import timm
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitTransformerCfg, PartitionAttentionCl, model_cfgs

from exact import moved, normal
from vitrail.checks.maxvit import COLOURS, SIDE, SQUARES, Reader, boards
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.maxvit import MaxViT, Partition, any_size, checkpoint_filter_fn, from_grids, to_grids

TINY = {"stem_width": 4, "embed_dim": (4, 8), "depths": (1, 2), "dim_head": 4, "window_size": 2, "num_classes": 3}


def tiny(**options):
    torch.manual_seed(0)
    return MaxViT(**{**TINY, **options})


def partition(kind, window, dim=4, **options):
    torch.manual_seed(0)
    cfg = {"dim_head": 2, "window_size": window, "grid_size": window, "rel_pos_type": "bias_tf", "head_first": False}
    return PartitionAttentionCl(dim, kind, MaxxVitTransformerCfg(**{**cfg, **options}))


# ---- attention -------------------------------------------------------------------------------------------------------


def slow(layer, x):
    """Attend in one map (H, W, C): a place sees those of its block, or those at its offset in their cells."""
    attention, (tall, wide) = layer.attn, layer.partition_size
    (height, width, channels), size = x.shape, layer.attn.dim_head
    if not layer.partition_block:
        cell = (-(-height // tall), -(-width // wide))
    places = [(row, column) for row in range(height) for column in range(width)]

    def set_and_position(row, column):
        if layer.partition_block:
            return (row // tall, column // wide), (row % tall, column % wide)
        return (row % cell[0], column % cell[1]), (row // cell[0], column // cell[1])

    query, key, value = (x @ attention.qkv.weight.T + attention.qkv.bias).split(channels, dim=2)
    out = torch.zeros_like(x)
    for place in places:
        own, (down, across) = set_and_position(*place)
        seen = [other for other in places if set_and_position(*other)[0] == own]
        parts = []
        for head in range(channels // size):
            part = slice(head * size, (head + 1) * size)
            scores = []
            for other in seen:
                _, (i, j) = set_and_position(*other)
                bias = attention.rel_pos.relative_position_bias_table[head, i - down + tall - 1, j - across + wide - 1]
                scores.append(query[place][part] @ key[other][part] / size**0.5 + bias)
            weights = torch.stack(scores).softmax(0)
            parts.append(sum(weight * value[other][part] for weight, other in zip(weights, seen)))
        out[place] = attention.proj.weight @ torch.cat(parts) + attention.proj.bias
    return out


@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize(("size", "window"), [((4, 3), (2, 3)), ((3, 5), (2, 2)), ((5, 2), (3, 3))])
def test_attention_is_the_slow_loop(kind, size, window):
    layer = moved(Partition(partition(kind, window)))
    x = normal(2, *size, 4).requires_grad_()
    given = [x, *layer.attn.parameters()]
    ours, theirs = layer._partition_attn(x), torch.stack([slow(layer, one) for one in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = normal(*ours.shape, seed=2)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"head_first": True, "rel_pos_type": "bias"}, {"init_values": 0.1}])
@pytest.mark.parametrize("kind", ["block", "grid"])
def test_where_windows_divide_a_map_it_is_timms(kind, options):
    theirs = partition(kind, (2, 3), **options)
    ours = moved(Partition(theirs))  # of the same parts, which are moved with it
    x = normal(2, 4, 6, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_partition_is_as_what_it_is_made_of():
    given = partition("grid", (2, 2)).eval()
    assert not Partition(given).training


def test_dropout_of_attention_acts_in_training_alone():
    layer, x = Partition(partition("grid", (2, 2), attn_drop=0.5)), torch.randn(1, 4, 4, 4)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(("size", "grid"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((2, 3), (4, 4))])
def test_grids_are_put_together_again(size, grid):
    x = normal(2, *size, 3)
    sets = to_grids(x, grid)
    assert sets.shape == (2 * -(-size[0] // grid[0]) * -(-size[1] // grid[1]), *grid, 3)
    assert torch.equal(from_grids(sets, *size), x)


# ---- the net ---------------------------------------------------------------------------------------------------------


def test_one_of_timm_learns_to_take_any_size():
    published = model_cfgs["maxvit_tiny_tf"]
    shape = {"embed_dim": (32, 32), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 4, "head_hidden_size": 8}
    windows = replace(published.transformer_cfg, window_size=(2, 2), grid_size=(2, 2))
    torch.manual_seed(0)
    model = moved(MaxxVit(replace(published, **shape, transformer_cfg=windows), num_classes=3)).eval()
    x = normal(1, 3, 32, 48)
    before = model(x)
    assert any_size(model) is model
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert model(normal(2, 3, 45, 61)).shape == (2, 3)


def test_features_of_timm_can_be_taken_at_any_size():
    features = any_size(timm.create_model("test_maxvit", img_size=64, features_only=True))
    assert [tuple(found.shape[2:]) for found in features(torch.zeros(1, 3, 96, 32))] == [
        (48, 16),
        (24, 8),
        (12, 4),
        (6, 2),
        (3, 1),
    ]


def test_another_net_is_refused():
    with pytest.raises(InputError, match=r"a ResNet has no blocks of MaxViT: give a maxvit_\*_tf_\* of timm"):
        any_size(timm.create_model("resnet10t"))


@pytest.mark.parametrize("size", [(45, 61), (225, 190)])
def test_the_nano_takes_images_of_any_size(size):
    features = create_model("maxvit_nano", num_classes=0, features_only=True).eval()
    with torch.no_grad():
        maps = features(torch.zeros(1, 3, *size))
    assert features.feature_info.reduction() == [1, 2, 4, 8]
    assert [found.shape[2:] for found in maps] == [
        tuple(-(-side // stride) for side in size) for stride in (1, 2, 4, 8)
    ]


def test_blocks_and_grids_are_of_the_window_that_was_asked_for():
    parts = [part for part in tiny(window_size=3).modules() if isinstance(part, Partition)]
    assert [(part.partition_block, part.partition_size) for part in parts] == [(True, (3, 3)), (False, (3, 3))] * 3


def test_a_published_net_is_ours_at_its_own_size():
    with torch.device("meta"):
        theirs, ours = timm.create_model("maxvit_tiny_tf_224", num_classes=5), MaxViT(num_classes=5)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert [info["reduction"] for info in ours.feature_info] == [info["reduction"] for info in theirs.feature_info]


def test_it_begins_as_the_authors_code():
    model = tiny(stem_width=64, embed_dim=(64, 64), dim_head=32, drop_path_rate=0.4)
    block = model.stages[1].blocks[1]
    for layer in (model.stem.conv2, block.conv.conv3_1x1, block.attn_grid.attn.qkv, block.attn_block.mlp.fc1):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    for layer in (model.head.pre_logits.fc, model.head.fc):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()
    assert model.head.pre_logits.act.__class__.__name__ == "Tanh"
    assert (block.conv.norm1.eps, block.attn_grid.norm1.eps) == (1e-3, 1e-5)
    assert block.conv.norm1.act.__class__.__name__ == "GELUTanh"
    assert block.attn_block.partition_block
    assert not block.attn_grid.partition_block
    assert block.attn_grid.drop_path1.drop_prob == pytest.approx(0.4)


def test_blocks_are_groups_of_their_own():
    from timm.models import group_parameters

    model = tiny()
    fine, coarse = (group_parameters(model, model.group_matcher(kind)) for kind in (False, True))
    assert (len(fine), len(coarse)) == (5, 4)  # stem, 3 blocks or 2 stages, head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_stride": 4}, "stem_stride = 4 is not allowed: give 1 or 2"),
        ({"depths": (1,)}, r"depths = \(1,\) are not allowed: give one width"),
        ({"depths": (1, 0)}, r"depths = \(1, 0\) are not allowed"),
        ({"stem_width": 0}, "stem_width = 0 is not allowed: give 1 channel or more"),
        ({"window_size": 0}, "window_size = 0 is not allowed: give 1 place or more"),
        ({"dim_head": 3}, "dim_head = 3 does not divide a width of 4"),
        ({"dim_head": 0}, "dim_head = 0 does not divide"),
        ({"global_pool": ""}, "global_pool = '' is not allowed"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_a_classifier_needs_pooling():
    model = tiny(num_classes=0, global_pool="").eval()
    with pytest.raises(InputError, match="global_pool = ''"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


# ---- the authors' weights --------------------------------------------------------------------------------------------

CONV = {
    "shortcut.expand": "shortcut_conv",
    "pre_norm": "pre_norm",
    "conv1_1x1": "expand_conv",
    "norm1": "expand_norm",
    "conv2_kxk": "depthwise_conv",
    "norm2": "depthwise_norm",
    "se.fc1": "se/reduce_conv2d",
    "se.fc2": "se/expand_conv2d",
    "conv3_1x1": "shrink_conv",
}
ATTENTION = {
    "norm1": "attn_layer_norm{}",
    "norm2": "ffn_layer_norm{}",
    "mlp.fc1": "ffn{}/expand_dense",
    "mlp.fc2": "ffn{}/shrink_dense",
    "attn.proj": "attention{}/o",
    "attn.qkv": "attention{}/qkv",
}
ENDS = {
    "stem.conv1": "stem/conv_0",
    "stem.norm1": "stem/norm_0",
    "stem.conv2": "stem/conv_1",
    "head.norm": "final_layer_norm",
    "head.pre_logits.fc": "cls_head/inner_dense",
    "head.fc": "cls_head/logit_dense",
}
TABLE = "rel_pos.relative_position_bias_table"


def place_of(key):
    """Return the authors' name of the layer that a weight of timm's belongs to."""
    layer = key.rpartition(".")[0]
    if layer in ENDS:
        return ENDS[layer]
    _, stage, _, block, kind, rest = layer.split(".", 5)
    place = f"block_{int(stage):02d}_{int(block):02d}/"
    if kind == "conv":
        return f"{place}mbconv/{CONV[rest]}"
    return place + ATTENTION[rest].format("_1" if kind == "attn_grid" else "")


def authors(model):
    """Return the weights under the names and in the shapes of the authors' code."""
    found = {}
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith(TABLE):
            found[place_of(key.replace(TABLE, "qkv.bias")).replace("qkv", "relative_bias")] = value
            continue
        place, leaf = place_of(key), key.rpartition(".")[2]
        leaf = {"running_mean": "moving_mean", "running_var": "moving_variance"}.get(leaf, leaf)
        if value.ndim == 4 and leaf == "weight":
            depthwise = "depthwise" in place
            leaf = "depthwise_kernel" if depthwise else "kernel"
            value = value.permute(2, 3, 0, 1) if depthwise else value.permute(2, 3, 1, 0)
        elif "norm" in place:
            leaf = {"weight": "gamma", "bias": "beta"}.get(leaf, leaf)
        elif value.ndim == 2:
            value = value.T
        if place.endswith("/qkv"):
            width = model.stages[0].blocks[0].attn_grid.attn.dim_head
            for name, part in zip("qkv", value.chunk(3, dim=-1)):
                found[f"{place[:-3]}{name}/{leaf}"] = part.unflatten(-1, (-1, width))
        elif place.endswith("/o") and leaf == "weight":
            width = model.stages[0].blocks[0].attn_grid.attn.dim_head
            found[f"{place}/{leaf}"] = value.unflatten(0, (-1, width))
        else:
            found[f"{place}/{leaf}"] = value
    return found


def test_the_authors_checkpoints_are_mapped():
    model = moved(tiny())
    state, named = model.state_dict(), authors(model)
    for given in (named, {f"maxvit/{name}:0": value for name, value in named.items()}):
        found = checkpoint_filter_fn(given, model)
        assert set(found) == {key for key in state if not key.endswith("num_batches_tracked")}
        for key, value in found.items():
            torch.testing.assert_close(value, state[key])


def test_moving_averages_of_weights_go_first():
    model = moved(tiny())
    state, named = model.state_dict(), authors(model)
    both = {f"{name}/ExponentialMovingAverage": value for name, value in named.items()}
    both |= {name: torch.zeros_like(value) for name, value in named.items()} | {"global_step": torch.zeros(())}
    for given in (both, dict(reversed(both.items()))):
        found = checkpoint_filter_fn(given, model)
        torch.testing.assert_close(dict(found), {key: state[key] for key in found})
        assert len(found) == len(named) - 2 * 2 * 2 * 3  # queries, keys and values are one, of weights and biases


@pytest.mark.filterwarnings("ignore:.*:UserWarning:timm")
def test_weights_for_other_windows_are_resized():
    small, large = tiny(), tiny(window_size=3)
    for given in (small.state_dict(), authors(small)):
        large.load_state_dict(checkpoint_filter_fn(given, large), strict=False)
        table = large.stages[0].blocks[0].attn_grid.attn.rel_pos.relative_position_bias_table
        assert table.shape == (1, 5, 5)
        torch.testing.assert_close(
            large.stages[0].blocks[0].attn_grid.attn.qkv.weight, small.stages[0].blocks[0].attn_grid.attn.qkv.weight
        )


# ---- the check's images and arms -------------------------------------------------------------------------------------


def test_the_colour_to_name_is_two_squares_to_the_right():
    images, wanted = boards(3, seed=1)
    side = SIDE // SQUARES
    for image, colours in zip(images, wanted):
        for row in range(SQUARES):
            for column in range(SQUARES // 2):
                left = (column + 2) * side
                seen = image[:, row * side : (row + 1) * side, left : left + side].mean((1, 2))
                assert int((COLOURS - seen).norm(dim=1).argmin()) == int(colours[row, column])


def test_a_reader_names_the_left_half():
    images, wanted = boards(2, seed=1)
    assert Reader("grid", 0)(images).argmax(1).shape == wanted.shape


def reach(arm):
    """Return which places of a map the second attention of an arm's block takes from, for its place (5, 5)."""
    layer = Reader(arm, 0).net.stages[0].blocks[0].attn_grid.double().eval()
    x = normal(1, 16, 16, 16).requires_grad_()
    (slope,) = torch.autograd.grad(layer._partition_attn(x)[0, 5, 5].sum(), x)
    return {tuple(place) for place in slope[0].any(2).nonzero().tolist()}


def test_arms_attend_where_they_say():
    assert reach("grid") == {(row, column) for row in range(1, 16, 4) for column in range(1, 16, 4)}
    assert reach("block") == {(row, column) for row in range(4, 8) for column in range(4, 8)}
    assert reach("shifted") == {(row, column) for row in range(2, 6) for column in range(2, 6)}
