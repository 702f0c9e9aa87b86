import pytest
import torch

from vitrail.models.factory import create_model

VARIANTS = {"small_resnet_nano": (0.31, 1), "small_resnet_micro": (0.69, 2), "small_resnet_tiny": (11.17, 1)}


@pytest.mark.parametrize("name", VARIANTS)
def test_has_timms_surface(name):
    millions, stride = VARIANTS[name]
    model = create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    model.set_grad_checkpointing(True)
    assert set(model.group_matcher()) >= {"stem", "blocks"}
    features = create_model(name, num_classes=10, features_only=True)
    images = torch.randn(2, 3, 32, 32)
    maps = features(images)
    assert features.feature_info.reduction() == [stride * r for r in (1, 1, 2, 4, 8)]
    assert [m.shape[-1] for m in maps] == [32 // r for r in features.feature_info.reduction()]
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, model.num_features)


@pytest.mark.parametrize(("side", "channels"), [(8, 3), (28, 1), (33, 4)])
def test_takes_any_size_and_channels(side, channels):
    for name in ("small_resnet_nano", "small_resnet_micro"):
        model = create_model(name, num_classes=3, in_chans=channels, img_size=side).eval()
        assert model(torch.randn(2, channels, side, side)).shape == (2, 3)


def test_options_set_widths_depths_and_stem():
    model = create_model(
        "small_resnet_nano", num_classes=3, layers=(1, 2, 1, 1), channels=(8, 8, 16, 16), stem_stride=4
    )
    assert model.feature_info[-1]["reduction"] == 32
    assert len(model.layer2) == 2
    assert model.num_features == 16
