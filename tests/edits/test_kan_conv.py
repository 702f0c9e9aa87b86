import pytest
import torch
from torch import nn

from once import quick_run
from vitrail.checks import kan_conv as check
from vitrail.edits.kan_conv import kan_conv, kan_finetune
from vitrail.errors import InputError
from vitrail.layers.kan_layers import BottleneckKANConv, BottleneckKANExperts, KANConv, KANConvExperts, TunedKANConv
from vitrail.models import create_model


def nano(**options):
    torch.manual_seed(0)
    return create_model("small_resnet_nano", num_classes=3, **options)


def test_every_plain_convolution_changes_and_keeps_its_shape():
    plain, model = nano(), kan_conv()(nano())
    convs = {name: m for name, m in plain.named_modules() if type(m) is nn.Conv2d}
    found = {name: m for name, m in model.named_modules() if isinstance(m, KANConv)}
    assert convs.keys() == found.keys()
    for name, conv in convs.items():
        assert (conv.kernel_size, conv.stride, conv.groups) == (
            found[name].kernel_size,
            found[name].where["stride"],
            found[name].groups,
        )
        assert found[name].where["padding"] == conv.padding
        assert isinstance(found[name].norm, nn.Identity)
        assert isinstance(found[name].act, nn.Identity)
    assert model(torch.randn(2, 3, 17, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"basis": "rbf", "grid_size": 4, "grid_range": [-1, 1]}, KANConv),
        ({"basis": "wavelet"}, KANConv),
        ({"kind": "bottleneck", "degree": 2}, BottleneckKANConv),
        ({"kind": "experts", "experts": 3}, BottleneckKANExperts),
        ({"kind": "full_experts", "basis": "chebyshev"}, KANConvExperts),
    ],
)
def test_named_ones_change_to_what_was_asked(options, kind):
    model = kan_conv(modules=r"layer\d\.0\.conv2", **options)(nano())
    found = [name for name, m in model.named_modules() if type(m) is kind]
    assert len(found) == 4
    model.eval()(torch.randn(2, 3, 16, 16)).sum().backward()
    if options["basis" if "basis" in options else "kind"] == "rbf":
        assert len(model.layer1[0].conv2.basis.centres) == 4
        assert isinstance(model.layer1[0].conv2.norm, nn.BatchNorm2d)


def test_a_bias_and_depthwise_groups_stay():
    host = nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", groups=4), nn.Conv2d(8, 8, 3, padding_mode="reflect"))
    host = kan_conv()(host)
    assert host[0].groups == 4
    assert host[0].bias.shape == (8,)
    assert type(host[1]) is nn.Conv2d
    assert host[0](torch.randn(1, 4, 5, 5)).shape == (1, 8, 5, 5)


def test_the_convolutions_inside_layers_stay():
    with pytest.raises(InputError, match="plain 2-D convolution"):
        kan_conv()(kan_conv(kind="bottleneck")(nano()))


def test_finetuning_trains_new_degrees_and_all_but_the_layers():
    model = kan_conv()(nano()).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    model = kan_finetune(degrees=[2], extra_degrees=2)(model)
    torch.testing.assert_close(model(x), before)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still
    assert all(name.endswith((".base.weight", ".layer.weight", ".layer.basis.beta")) for name in still)
    assert all(m.degrees == (2,) and m.extra == 2 for m in model.modules() if isinstance(m, TunedKANConv))
    with pytest.raises(InputError, match=r"kan_conv\(\) makes such layers"):
        kan_finetune()(model)
    opened = kan_finetune(base=True)(kan_conv()(nano()))
    assert all(p.requires_grad for name, p in opened.named_parameters() if name.endswith(".base.weight"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kan_conv(basis="fourier"), "basis"),
        (lambda: kan_conv(kind="narrow"), "kind"),
        (lambda: kan_conv(degree=20), "degree = 20"),
        (lambda: kan_conv(kind="experts", experts=1), "top_k = 2"),
        (lambda: kan_conv(modules="("), "no regular expression"),
        (lambda: kan_conv(modules="conv9")(nano()), "'conv9'"),
        (lambda: kan_finetune(extra_degrees=0), "nothing to learn"),
        (lambda: kan_finetune()(nano()), "Gram layer"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert {row["basis"] for row in verdict.tables["bases"]} >= {"plain", "gram", "rbf"}
    sizes = [row["parameters"] for row in verdict.tables["bases"]]
    assert max(sizes) < 1.1 * min(sizes)
    assert {row["arm"] for row in verdict.tables["finetuning"]} == {"new degrees", "all", "head"}
    assert {row["net"] for row in verdict.tables["segmentation"]} == {"U-KAN", "U-Net"}
