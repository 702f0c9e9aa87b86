import inspect

import pytest
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock

from exact import moved, normal
from vitrail.checks.ga_heads import correlation, of_heads
from vitrail.errors import InputError
from vitrail.models import create_model, ga_convnext
from vitrail.models.ga_convnext import Aggregate, GAConvNeXt, checkpoint_filter_fn, default_cfgs

TINY = {
    "num_classes": 3,
    "dims": (4, 4, 8, 8),
    "depths": (1, 1, 6, 1),
    "between": 2,
    "heads": 2,
    "gram_dim": 4,
    "width": 8,
    "stem_stride": 2,
}


def tiny(**options):
    torch.manual_seed(0)
    return GAConvNeXt(**{**TINY, **options})


def norm_of(layer, x):
    shape = (1, -1, 1, 1)
    scale = layer.weight / (layer.running_var + 1e-5).sqrt()
    return (x - layer.running_mean.view(shape)) * scale.view(shape) + layer.bias.view(shape)


def test_the_aggregation_is_a_bottleneck_with_squeeze_and_excitation():
    layer = moved(Aggregate(6, 32, 0.0)).eval()
    x = normal(2, 6, 3, 4)
    y = norm_of(layer.bn1, layer.conv1(x)).relu()
    assert y.shape[1] == 8
    y = norm_of(layer.bn2, F.conv2d(y, layer.conv2.weight, padding=1)).relu()
    gate = layer.se.fc2(layer.se.fc1(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
    y = norm_of(layer.bn3, layer.conv3(y * gate))
    conv, norm = layer.downsample
    torch.testing.assert_close(layer(x), (norm_of(norm, conv(x)) + y).relu())


def test_maps_of_all_stages_come_together_at_the_third_ones_size():
    model = moved(tiny()).eval()
    x = normal(1, 3, 33, 46)
    first = model.stages[0](model.stem(x))
    second = model.stages[1](first)
    third = model.stages[2].downsample(second)
    inside = []
    for count, block in enumerate(model.stages[2].blocks, 1):
        third = block(third)
        if count in (2, 4):
            inside.append(third)
    fourth = model.stages[3](third)
    size = third.shape[2:]
    assert size == (4, 5)
    maps = [F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size), *inside, third]
    maps.append(F.interpolate(fourth, size, mode="bilinear"))
    features = model.aggregate(torch.cat(maps, 1))
    torch.testing.assert_close(model.forward_features(x), features)
    torch.testing.assert_close(model(x), model.head(features))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    bare = tiny(num_classes=0).double().eval()
    assert bare(x).shape == (1, 8)
    bare.reset_classifier(5)
    assert bare(x).shape == (1, 5)
    assert tiny(num_classes=0, global_pool="")(x.float()).shape == (1, 8, 4, 5)


def test_weights_begin_and_drop_path_rises_as_published():
    model = tiny(drop_path_rate=0.9, dims=(32, 32, 32, 32))
    rates = [getattr(block.drop_path, "drop_prob", 0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(9)])
    assert model.aggregate.drop_path.drop_prob == 0.9
    for head in model.head.heads:
        assert isinstance(head.layer, ConvNeXtBlock)
        assert head.layer.drop_path.drop_prob == 0.9
        assert torch.equal(head.layer.gamma, torch.full((4,), 1e-6))
    assert torch.equal(model.stages[2].blocks[0].gamma, torch.full((32,), 1e-6))
    for name, module in [*model.stages.named_modules(), *model.stem.named_modules(), *model.aggregate.named_modules()]:
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.2), name
            assert module.bias is None or not module.bias.any()


def test_variants_are_as_published(monkeypatch):
    made = {}
    monkeypatch.setattr(ga_convnext, "create", lambda kind, name, pretrained, weights, **own: made.update({name: own}))
    published = {
        "tiny_688": (9, 2, 96, 168),
        "tiny_768": (9, 2, 96, 192),
        "small_688": (27, 4, 96, 168),
        "small_768": (27, 4, 96, 192),
        "base_976": (27, 4, 128, 240),
        "base_1024": (27, 4, 128, 256),
    }
    defaults = {key: value.default for key, value in inspect.signature(GAConvNeXt).parameters.items()}
    for name, (deep, between, dim, width) in published.items():
        getattr(ga_convnext, f"ga_convnext_{name}")()
        own = {**defaults, **made[f"ga_convnext_{name}"]}
        assert own["depths"] == (3, 3, deep, 3)
        assert own["dims"] == (dim, 2 * dim, 4 * dim, int(name.split("_")[1]))
        assert (own["between"], own["width"], own["heads"], own["gram_dim"]) == (between, width, 5, 192)
        assert own["stem_stride"] == 4
        assert default_cfgs[f"ga_convnext_{name}"].default.crop_pct == 0.875


def authors_name(key):
    head, _, rest = key.partition(".")
    if head == "aggregate":
        return f"stages.4.{rest}"
    if head != "head":
        return key
    _, number, part, *rest = rest.split(".")
    if part in ("contraction", "embedding"):
        part = f"gram_{part}"
    elif part == "layer":
        return ".".join(("gram_layer", number, "blocks.0", *rest))
    elif part == "fc":
        part = "fc"
    else:
        return ".".join(("ga", number, part, *rest))
    return ".".join((part, number, *rest))


def test_the_authors_keys_become_ours():
    ours, twin = tiny(), tiny()
    state = {key: value + 1 for key, value in ours.state_dict().items()}
    theirs = {authors_name(key): value for key, value in state.items()}
    theirs = {key: value[..., None] if ".mlp.fc" in key and value.ndim == 3 else value for key, value in theirs.items()}
    names = [
        "stem.0.weight",
        "stages.2.blocks.3.mlp.fc1.weight",
        "stages.4.se.fc1.weight",
        "stages.1.downsample.1.bias",
    ]
    names += ["gram_contraction.1.0.weight", "gram_layer.0.blocks.0.conv_dw.bias", "gram_embedding.0.1.running_var"]
    names += ["ga.1.gamma_2", "ga.0.attn.q.weight", "ga.1.mlp.fc2.weight", "ga.0.norm1.bias", "fc.1.bias"]
    assert set(names) <= set(theirs)
    worse = {key: torch.zeros_like(value) for key, value in theirs.items()}
    for given in (theirs, {"state_dict": theirs}, {"state_dict": worse, "state_dict_ema": theirs}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, state[key]), key
        twin.load_state_dict(ours.state_dict())
    twin.load_state_dict(checkpoint_filter_fn(ours.state_dict(), twin))


def test_any_size_and_dense_features():
    features = create_model("ga_convnext_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 45, 61))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 22, 30), (48, 5, 7), (64, 2, 3)]
    assert create_model("ga_convnext_nano", num_classes=10).eval()(torch.zeros(1, 3, 17, 40)).shape == (1, 10)


def test_the_check_measures_how_heads_agree():
    torch.manual_seed(0)
    one = torch.randn(6, 1, 4)
    assert correlation(torch.cat((one, 2 * one + 3), 1)) == pytest.approx(1)
    assert correlation(torch.cat((one, -one), 1)) == pytest.approx(-1)
    model = tiny().eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    found = of_heads(model, lambda: iter([(images, targets)]))
    answers = torch.stack([head(model.forward_features(images)).argmax(-1) for head in model.head.heads])
    assert found["single_top1"] == pytest.approx(float((answers == targets).float().mean()))
    assert model(images).shape == (4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\) has 3 entries.*each of four stages"),
        ({"dims": (4,)}, r"dims = \(4,\) has 1 entries"),
        ({"between": 6}, "between = 6 .*0 to 5"),
        ({"stem_stride": 3}, "stem_stride = 3 .*2 or 4"),
        ({"heads": 0}, "heads = 0 "),
        ({"global_pool": "median"}, "global_pool = 'median'"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
