import pytest
import torch

from vitrail.errors import InputError
from vitrail.models import create_model, model_names


def test_creates_timm_and_own_models_by_name():
    for name in ("small_resnet_nano", "mobilenetv3_small_050", "vit_tiny_patch16_224"):
        assert name in model_names()
    model = create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=8, depth=1)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_size_is_only_given_to_models_of_fixed_size():
    assert create_model("mobilenetv3_small_050", num_classes=4, img_size=64)(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_unknown_model_offers_the_nearest():
    with pytest.raises(InputError, match="small_resnet_nano"):
        create_model("small_resnet_nanno", num_classes=2)


def test_unknown_option_offers_the_nearest():
    with pytest.raises(InputError, match=r"'chanels'.*did you mean 'channels'"):
        create_model("small_resnet_nano", num_classes=2, chanels=(8, 8, 8, 8))
