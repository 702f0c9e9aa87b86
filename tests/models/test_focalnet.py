import pytest
import torch
import torch.nn.functional as F
from timm.models import focalnet as timms

from exact import moved, normal
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.focalnet import FocalNet, checkpoint_filter_fn

SMALL = {"embed_dim": 8, "depths": (1, 1), "focal_levels": (2, 1), "focal_windows": (3, 3), "num_classes": 3}


@pytest.mark.parametrize("size", [(28, 28), (45, 61), (1, 3), (225, 190)])
def test_the_nano_takes_images_of_any_size(size):
    model = create_model("focalnet_nano", num_classes=3).eval()
    height, width = (-(-side // 16) for side in size)
    assert model.forward_features(torch.zeros(1, 3, *size)).shape == (1, 128, height, width)


@pytest.mark.parametrize(("patch", "size"), [(4, (16, 24)), (4, (13, 9)), (3, (7, 14))])
def test_plain_patches_are_filled_up_with_zeros(patch, size):
    torch.manual_seed(0)
    model = FocalNet(patch_size=patch, **SMALL).eval()
    x, whole = torch.randn(2, 3, *size), 2 * patch
    height, width = (-(-side // whole) * whole for side in size)
    filled = F.pad(x, (0, width - size[1], 0, height - size[0]))
    torch.testing.assert_close(model(x), model(filled))
    assert model.forward_features(x).shape == (2, 16, height // whole, width // whole)
    assert [info["reduction"] for info in model.feature_info] == [patch, 2 * patch]


@pytest.mark.parametrize("overlap", [False, True])
def test_with_patches_of_four_it_is_timms_net(overlap):
    options = {**SMALL, "use_overlap_down": overlap}
    ours, theirs = FocalNet(**options).eval(), timms.FocalNet(**options).eval()
    moved(ours)
    theirs.double().load_state_dict(ours.state_dict())
    x = normal(2, 3, 32, 48)
    torch.testing.assert_close(ours(x), theirs(x))


def test_it_begins_as_the_authors_code():
    torch.manual_seed(0)
    model = FocalNet(**{**SMALL, "embed_dim": 96})
    block = model.layers[1].blocks[0]
    for layer in (block.modulation.f, block.modulation.proj, block.mlp.fc1, block.mlp.fc2):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    convolutions = (block.modulation.h, block.modulation.focal_layers[0][0], model.stem.proj)
    for layer in (*convolutions, model.layers[1].downsample.proj):
        fan = layer.weight[0].numel()
        assert float(layer.weight.detach().std()) == pytest.approx((1 / 3 / fan) ** 0.5, rel=0.1)
        assert layer.bias is None or layer.bias.any()


def test_variants_are_as_published():
    with torch.device("meta"):
        tiny, base = (create_model(f"focalnet_{name}_iso", num_classes=3, depths=(1,)) for name in ("tiny", "base"))
        nano = create_model("focalnet_nano", num_classes=10)
    for model in (tiny, base):
        kernels = [[layer[0].kernel_size[0] for layer in b.modulation.focal_layers] for b in model.layers[0].blocks]
        assert kernels == [[3, 5, 7]]
        assert model.stem.proj.stride == (16, 16)
    assert type(tiny.layers[0].blocks[0].norm1) is type(base.layers[0].blocks[0].norm1_post) is timms.LayerNorm2d
    assert isinstance(base.layers[0].blocks[0].norm1, torch.nn.Identity)
    assert base.layers[0].blocks[0].ls1.init_values == 1e-4
    assert {model.pretrained_cfg["crop_pct"] for model in (tiny, base)} == {0.9}
    assert nano.stem.proj.kernel_size == (3, 3)


def published_names(state, model):
    """Return the weights under the names and in the shapes of the authors' code."""
    names = {}
    for key, value in state.items():
        stage = key.split(".")[1]
        key = key.replace("stem", "patch_embed").replace("head.fc", "head")
        if "downsample" in key:
            key = key.replace(f"layers.{stage}.", f"layers.{int(stage) - 1}.")
        for number in "12":
            key = key.replace(f"ls{number}.gamma", f"gamma_{number}").replace(f"norm{number}_post", f"norm{number}")
        linear = any(part in key for part in (".f.", "modulation.proj.weight", ".fc"))
        names[f"module.{key}"] = value.flatten(1) if linear and value.ndim == 4 else value
    return names


@pytest.mark.parametrize("late", [False, True])
def test_the_authors_checkpoints_are_mapped(late):
    model = FocalNet(**SMALL, use_post_norm=late, layerscale_value=0.1 if late else None)
    state = moved(model).state_dict()
    found = checkpoint_filter_fn({"model": published_names(state, model)}, model)
    assert set(found) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(found[key], value)
    assert set(checkpoint_filter_fn(state, model)) == set(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size = 0 is not allowed: give 1 or more"),
        ({"patch_size": 3, "use_overlap_down": True}, "patch_size = 3 .*2 or 4 with use_overlap_down"),
        ({"focal_levels": (2,)}, r"focal_levels = \(2,\) .*for every stage"),
        ({"global_pool": ""}, "global_pool = '' is not allowed"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        FocalNet(**{**SMALL, **options})


def test_a_classifier_needs_pooling():
    model = FocalNet(**{**SMALL, "num_classes": 0}, global_pool="").eval()
    with pytest.raises(InputError, match="global_pool = ''"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
