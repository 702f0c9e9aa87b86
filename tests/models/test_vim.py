"""Vim as published: tokens, positions, first weights, keys; its mixers have tests of their own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exact import normal
from vitrail.app.build import count_parameters
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.vim import PatchEmbed, Vim, checkpoint_filter_fn

TINY = {"img_size": 12, "patch_size": 4, "num_classes": 3, "embed_dim": 16, "depth": 3, "states": 4}


def tiny(**options):
    torch.manual_seed(0)
    model = Vim(**{**TINY, **options}).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def norm(layer, x):
    if isinstance(layer, nn.RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("token", ["middle", "first", "none"])
@pytest.mark.parametrize(("kind", "height", "width"), [("rms", 12, 12), ("layer", 8, 4)])
def test_the_net_is_patches_token_positions_blocks_and_head(token, kind, height, width):
    model = tiny(class_token=token, norm=kind)
    x = normal(2, 3, height, width)
    rows, columns = height // 4, width // 4
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    places = [
        (x[:, None, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] * weight).sum((2, 3, 4)) + bias
        for i in range(rows)
        for j in range(columns)
    ]
    old = {"middle": 4, "first": 0, "none": None}[token]
    table = model.pos_embed[0]
    grid = torch.stack([row for place, row in enumerate(table) if place != old]).T.reshape(1, 16, 3, 3)
    if (rows, columns) != (3, 3):
        grid = F.interpolate(grid, (rows, columns), mode="bicubic")
    places = [place + grid[0, :, i // columns, i % columns] for i, place in enumerate(places)]
    now = {"middle": len(places) // 2, "first": 0, "none": None}[token]
    if now is not None:
        places.insert(now, (model.cls_token[0, 0] + table[old]).expand(2, -1))
    sequence = torch.stack(places, 1)
    for layer in model.layers:
        sequence = sequence + layer.mixer(norm(layer.norm, sequence))
    sequence = norm(model.norm_f, sequence)
    torch.testing.assert_close(model.forward_features(x), sequence)
    pooled = sequence.mean(1) if now is None else sequence[:, now]
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0, "avg")
    patches = [place for place in range(sequence.shape[1]) if place != now]
    torch.testing.assert_close(model(x), sequence[:, patches].mean(1))


@pytest.mark.parametrize(
    ("size", "stride", "side", "count"), [(4, 4, 12, 3), (4, 4, 13, 4), (4, 2, 12, 5), (4, 2, 13, 6), (8, 8, 3, 1)]
)
def test_patches_cover_the_image_with_zeros_beyond_it(size, stride, side, count):
    embed = PatchEmbed(1, 2, size, stride).double()
    x = normal(1, 1, side, 20)
    found = embed(x)
    assert found.shape[2] == embed.grid(side, 20)[0] == count
    padded = F.pad(x, (0, 12, 0, 12))
    expected = F.conv2d(padded, embed.proj.weight, embed.proj.bias, stride)[:, :, :count, : found.shape[3]]
    torch.testing.assert_close(found, expected)


def test_weights_begin_as_published():
    torch.manual_seed(0)
    model = Vim(embed_dim=128, depth=4, num_classes=50, patch_size=8, img_size=64)
    mixer = model.layers[1].mixer
    for value in (model.pos_embed, model.cls_token, model.head.weight):
        assert float(value.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert not model.head.bias.any()
    assert not model.patch_embed.proj.bias.any()
    assert float(model.patch_embed.proj.weight.detach().std()) == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    # A linear layer of torch begins below the root of its inputs.
    assert float(mixer.in_proj.weight.detach().abs().max()) == pytest.approx(128**-0.5, rel=0.01)
    assert float(mixer.out_proj.weight.detach().abs().max()) == pytest.approx(256**-0.5 / 4**0.5, rel=0.01)
    assert not mixer.back.dt_proj.bias.any()
    assert F.softplus(mixer.dt_proj.bias).max() <= 0.1 + 1e-6


def test_variants_are_as_published():
    # Counted from the authors' nets.
    counts = {"vim_tiny": 7_148_008, "vim_small": 25_796_584, "vim_base": 97_598_440}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        assert count_parameters(model) == count
        assert model.class_token == "middle"
        assert len(model.layers) == 24
        assert model.patch_embed.size == model.patch_embed.stride == 16


def authors_names(model):
    """The state of a net under the names of the authors' code."""
    theirs = {}
    for key, value in model.state_dict().items():
        for new, old in (("back.A_log", "A_b_log"), ("back.D", "D_b")):
            key = key.replace(new, old)
        if ".back." in key:
            part = key.split(".back.")[1].split(".")[0]
            key = key.replace(f".back.{part}", f".{part}_b")
        theirs[key] = value + 1
    return theirs


def test_the_authors_keys_become_ours():
    ours, twin = tiny(), tiny()
    theirs = authors_names(ours)
    assert {"layers.2.mixer.A_b_log", "layers.0.mixer.dt_proj_b.bias", "norm_f.weight", "cls_token"} <= set(theirs)
    for given in (theirs, {"model": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    same = checkpoint_filter_fn(ours.state_dict(), twin)
    assert same.keys() == ours.state_dict().keys()


@pytest.mark.parametrize("token", ["middle", "first", "none"])
def test_positions_of_a_checkpoint_are_interpolated(token):
    small, large = tiny(class_token=token), tiny(class_token=token, img_size=20)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large), strict=True)
    x = normal(1, 3, 20, 20)
    torch.testing.assert_close(large(x), small(x))


def test_features_are_of_the_patches_alone():
    model = tiny()
    x = normal(2, 3, 8, 12)
    last, (first, second) = model.forward_intermediates(x, [0, 2])
    assert first.shape == second.shape == (2, 16, 2, 3)
    full = model.forward_features(x)
    torch.testing.assert_close(last, full)
    normed = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(normed, torch.cat((full[:, :3], full[:, 4:]), 1))
    plain = model.forward_intermediates(x, 1, intermediates_only=True)[0]
    torch.testing.assert_close(norm(model.norm_f, plain.flatten(2).transpose(1, 2)), normed)
    with pytest.raises(InputError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    assert len(tiny().forward_intermediates(x, [1], stop_early=True, intermediates_only=True)) == 1


def test_what_sets_the_rates_is_not_decayed_and_drop_path_rises():
    model = Vim(**{**TINY, "drop_path_rate": 0.4})
    assert [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers] == pytest.approx([0, 0.2, 0.4])
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "*.A_log"}
    assert [tiny(class_token=token).num_prefix_tokens for token in ("first", "middle", "none")] == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch'.*rms"),
        ({"class_token": "last"}, "unknown class_token 'last'"),
        ({"patch_size": 0}, "patch_size = 0 .*1 pixel"),
        ({"stride": -1}, "stride = -1"),
        ({"depth": 0}, "depth = 0 .*1 or more"),
        ({"global_pool": "max"}, "global_pool = 'max' .*token or avg"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
        ({"class_token": "none", "global_pool": "token"}, "global_pool = 'token' .*give avg"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        Vim(**{**TINY, **options})
