import inspect

import pytest
import torch
import torch.nn.functional as F
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock
from torch import nn

from exact import moved, normal
from vitrail.errors import InputError
from vitrail.models import create_model, gcvit
from vitrail.models.gcvit import Block, GCViT, QueryMap, checkpoint_filter_fn, default_cfgs

SMALL = {
    "embed_dim": 4,
    "depths": (1, 2),
    "num_heads": (1, 2),
    "window_size": (2, 4),
    "query_levels": (2, 0),
    "mlp_ratio": 2.0,
    "num_classes": 3,
}


def slow(block, x, shared):
    """Attend window by window, place by place: x (H, W, C), shared queries (w, w, C) or None."""
    height, width, dim = x.shape
    side, attention = block.window_size[0], block.attn
    heads, out = attention.num_heads, torch.zeros_like(x)
    table, size = attention.rel_pos.relative_position_bias_table, dim // attention.num_heads
    for top in range(0, height, side):
        for left in range(0, width, side):
            places = [(i, j) for i in range(top, min(top + side, height)) for j in range(left, min(left + side, width))]
            rows = {place: attention.qkv.weight @ x[place] + attention.qkv.bias for place in places}
            for i, j in places:
                parts = []
                for head in range(heads):
                    own = slice(head * size, (head + 1) * size)
                    query = rows[i, j][:dim] if shared is None else shared[i - top, j - left]
                    key = {p: row[-2 * dim : -dim] for p, row in rows.items()}
                    scores = []
                    for u, v in places:
                        relative = (i - u + side - 1) * (2 * side - 1) + j - v + side - 1
                        scores.append(query[own] @ key[u, v][own] / size**0.5 + table[relative, head])
                    weights = torch.stack(scores).softmax(0)
                    parts.append(sum(weight * rows[p][-dim:][own] for weight, p in zip(weights, places)))
                out[i, j] = attention.proj.weight @ torch.cat(parts) + attention.proj.bias
    return out


@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize(("size", "window"), [((4, 6), 2), ((3, 5), 2), ((2, 4), 3)])
def test_attention_is_the_slow_loop(size, window, with_queries):
    torch.manual_seed(0)
    block = moved(Block(4, (window, window), num_heads=2, window_size=window, use_global=with_queries))
    x, shared = normal(2, *size, 4), normal(2, window, window, 4, seed=1)
    given = [x.requires_grad_(), *block.attn.parameters()] + ([shared.requires_grad_()] if with_queries else [])
    ours = block._window_attn(x, shared)
    theirs = torch.stack([slow(block, one, query if with_queries else None) for one, query in zip(x, shared)])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = normal(*ours.shape, seed=2)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("use_global", [False, True])
def test_where_windows_divide_a_map_a_block_is_timms(use_global):
    options = {"dim": 8, "feat_size": (6, 9), "num_heads": 2, "window_size": 3, "use_global": use_global}
    ours = moved(Block(layer_scale=0.1, **options))
    theirs = GlobalContextVitBlock(layer_scale=0.1, **options).double()
    theirs.load_state_dict(ours.state_dict())
    x, shared = normal(2, 6, 9, 8), normal(2, 3, 3, 8, seed=1)
    torch.testing.assert_close(ours(x, shared), theirs(x, shared))


def test_dropout_of_attention_acts_in_training_alone():
    block = Block(8, (4, 4), num_heads=2, window_size=2, use_global=False, attn_drop=0.5)
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(block.eval()(x), block(x))
    assert not torch.equal(block.train()(x), block(x))


def test_queries_are_resized_to_a_window():
    torch.manual_seed(0)
    maps = QueryMap(4, 2, 3).eval()
    x = torch.randn(1, 4, 20, 9)
    found = nn.Sequential(*maps.blocks)(x)
    assert found.shape == (1, 4, 5, 3)
    torch.testing.assert_close(maps(x), F.interpolate(found, (3, 3), mode="bilinear"))
    even = torch.randn(1, 4, 12, 10)
    torch.testing.assert_close(maps(even), nn.Sequential(*maps.blocks)(even))
    assert len(QueryMap(4, 0, 3).blocks) == 1


def test_at_the_published_size_it_is_timms_net():
    ours = moved(GCViT(layer_scale=0.1, **SMALL)).eval()
    options = {key: value for key, value in SMALL.items() if key != "query_levels"}
    theirs = GlobalContextVit(img_size=32, layer_scale=0.1, **options).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = normal(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(28, 28), (45, 61), (2, 5), (225, 190)])
def test_the_nano_takes_images_of_any_size(size):
    model = create_model("gcvit_nano", num_classes=3).eval()
    height, width = (-(-side // 8) for side in size)
    assert model.forward_features(torch.zeros(1, 3, *size)).shape == (1, 96, height, width)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]


def test_a_far_corner_is_seen_through_the_queries():
    torch.manual_seed(0)
    block = Block(4, (2, 2), num_heads=1, window_size=2)
    x = torch.randn(1, 8, 8, 4, requires_grad=True)
    queries = x[:, 6:, 6:]
    (slope,) = torch.autograd.grad(block(x, queries)[0, 0, 0].sum(), x)
    assert slope[0, 6:, 6:].any()
    assert not slope[0, 2:6].any()


def test_it_begins_as_the_authors_code():
    torch.manual_seed(0)
    model = GCViT(**{**SMALL, "embed_dim": 64, "num_heads": (2, 2)}, layer_scale=1e-5, drop_path_rate=0.4)
    squeeze = model.stages[1].global_block.blocks.conv1.se
    for layer in (model.stages[1].blocks[1].attn.qkv, model.stages[1].blocks[0].mlp.fc1, squeeze.fc1, squeeze.fc2):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    assert float(model.stages[1].blocks[0].ls1.gamma.detach().mean()) == pytest.approx(1e-5)
    assert [block.drop_path1.drop_prob for block in model.stages[1].blocks] == pytest.approx([0.2, 0.4])
    assert [block.attn.use_global for block in model.stages[1].blocks] == [False, True]


def test_variants_are_as_published(monkeypatch):
    made = {}
    monkeypatch.setattr(gcvit, "create", lambda kind, name, *rest, **own: made.update({name: own}))
    defaults = {key: value.default for key, value in inspect.signature(GCViT).parameters.items()}
    for name, dim, depth, heads, ratio, scale, window, side, crop in (
        ("tiny2", 64, 29, 2, 3.0, None, 7, 224, 0.875),
        ("small2", 96, 23, 3, 3.0, 1e-5, 7, 224, 0.875),
        ("large", 192, 19, 6, 2.0, 1e-5, 7, 224, 1.0),
        ("large_384", 192, 19, 6, 2.0, 1e-5, 12, 384, 1.0),
        ("large_512", 192, 19, 6, 2.0, 1e-5, 16, 512, 1.0),
    ):
        getattr(gcvit, f"gcvit_{name}")()
        options = defaults | made[f"gcvit_{name}"]
        assert (options["stem_stride"], options["embed_dim"], options["depths"]) == (4, dim, (3, 4, depth, 5))
        assert options["num_heads"] == (heads, 2 * heads, 4 * heads, 8 * heads)
        assert options["window_size"] == (window, window, 2 * window, window)
        assert options["query_levels"] == (3, 2, 0, 0)
        assert (options["mlp_ratio"], options["layer_scale"]) == (ratio, scale)
        found = default_cfgs[f"gcvit_{name}"].default
        assert (found.input_size, found.crop_pct) == ((3, side, side), crop)
        assert found.crop_mode == ("center" if side == 224 else "squash")


def authors_names(state):
    """Return the weights under the names and in the shapes of the authors' code."""
    parts = {"conv_dw": "0", "se.fc1": "2.fc.0", "se.fc2": "2.fc.2", "conv_pw": "3"}
    found = {}
    for key, value in state.items():
        name = key.replace("stem.conv1", "patch_embed.proj").replace("stem.down.", "patch_embed.conv_down.")
        name = name.replace("stages.1.norm.", "norm.").replace("stages.1.downsample.", "levels.0.downsample.")
        name = name.replace("stages.", "levels.").replace("rel_pos.", "").replace("head.fc", "head")
        for number in (1, 2):
            name = name.replace(f"ls{number}.gamma", f"gamma{number}")
            name = name.replace(
                f"global_block.blocks.conv{number}.", f"q_global_gen.to_q_global.{number - 1}.conv_block."
            )
        for ours, theirs in parts.items():
            name = name.replace(f"conv_block.{ours}.", f"conv.{theirs}.")
        found[f"module.{name}"] = value.flatten(1) if ".se." in key else value
    return {**found, "module.levels.0.blocks.0.attn.relative_position_index": torch.zeros(1)}


def test_the_authors_checkpoints_are_mapped():
    model = GCViT(**SMALL, layer_scale=0.1)
    state = moved(model).state_dict()
    found = checkpoint_filter_fn({"state_dict": authors_names(state)}, model)
    assert set(found) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(found[key], value)
    assert checkpoint_filter_fn(state, model) is state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_stride": 3}, "stem_stride = 3 is not allowed: give 2 or 4"),
        ({"depths": (1,)}, r"depths = \(1,\), .*one of each for every stage"),
        ({"window_size": 4}, "window_size = 4 is one number: give a list"),
        ({"depths": (0, 2)}, r"depths = \(0, 2\) .*1 block or more"),
        ({"window_size": (0, 4)}, r"window_size = \(0, 4\) .*1 place or more"),
        ({"query_levels": (-1, 0)}, r"query_levels = \(-1, 0\) .*levels from 0"),
        ({"num_heads": (1, 3)}, "num_heads = 3 does not divide a width of 8"),
        ({"global_pool": ""}, "global_pool = '' is not allowed"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        GCViT(**{**SMALL, **options})


def test_a_classifier_needs_pooling():
    model = GCViT(**{**SMALL, "num_classes": 0}, global_pool="").eval()
    with pytest.raises(InputError, match="global_pool = ''"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
