import pytest
import torch
from timm.layers import DropPath

from vitrail.errors import InputError
from vitrail.models import create_model, model_names


def test_creates_timm_and_own_models_by_name():
    for name in ("small_resnet_nano", "mobilenetv3_small_050", "vit_tiny_patch16_224"):
        assert name in model_names()
    model = create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, depth=1)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_size_is_only_given_to_models_of_fixed_size():
    assert create_model("mobilenetv3_small_050", num_classes=4, img_size=64)(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_stochastic_depth_is_what_was_asked_for():
    for name in ("swin_tiny_patch4_window7_224", "swin_nano", "tiny_vit_5m_224"):  # in timm 0.1 unless told
        rates = [part.drop_prob for part in create_model(name, num_classes=2).modules() if isinstance(part, DropPath)]
        assert not any(rates), name
    told = create_model("swin_nano", num_classes=2, drop_path_rate=0.2).modules()
    assert max(part.drop_prob for part in told if isinstance(part, DropPath)) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["vgg11", "hrnet_w18_small"])
def test_a_net_without_stochastic_depth_refuses_a_rate_alone(name):
    with torch.device("meta"):
        assert create_model(name, num_classes=2).num_classes == 2
        with pytest.raises(InputError, match=rf"{name} does not take the option 'drop_path_rate'"):
            create_model(name, num_classes=2, drop_path_rate=0.1)


def test_unknown_model_offers_the_nearest():
    with pytest.raises(InputError, match="small_resnet_nano"):
        create_model("small_resnet_nanno", num_classes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes = -1 is not allowed: give 0 or more"),
        ({"in_chans": 0}, "in_chans = 0 is not allowed: give 1 or more"),
        ({"drop_rate": 1.0}, r"drop_rate = 1.0 is not allowed: give a rate in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate = -0.1 is not allowed: give a rate in \[0, 1\)"),
    ],
)
def test_numbers_and_rates_that_are_not_allowed_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        create_model("small_resnet_nano", **{"num_classes": 10, **options})


def test_unknown_option_offers_the_nearest():
    with pytest.raises(InputError, match=r"'chanels'.*did you mean 'channels'"):
        create_model("small_resnet_nano", num_classes=2, chanels=(8, 8, 8, 8))
