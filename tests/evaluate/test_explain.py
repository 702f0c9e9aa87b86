import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.evaluate.explain import cam_sheet, grad_cam, grad_cam_plus_plus, overlay
from vitrail.models import create_model


class Corner(nn.Module):
    """Adds up redness: class 0 is red, class 1 is blue."""

    def __init__(self, stride=2):
        super().__init__()
        self.pool = nn.AvgPool2d(stride)

    def forward_features(self, pixels):
        return torch.relu(self.pool(pixels))

    def forward_head(self, features):
        return features.mean((2, 3))[:, [0, 2]]

    def forward(self, pixels):
        return self.forward_head(self.forward_features(pixels))


def test_the_map_is_where_the_class_is():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[0, 0, :6, :6] = 1  # red, above left
    pixels[0, 2, 10:, 10:] = 2  # blue, below right
    red, blue = grad_cam(Corner(), pixels, 0), grad_cam(Corner(), pixels, 1)
    assert red.shape == (16, 16)
    assert red.dtype == np.float32
    assert red[:5, :5].min() > 0.9
    assert red[8:, 8:].max() == 0
    assert blue[11:, 11:].min() > 0.9
    assert blue[:8, :8].max() == 0
    assert (grad_cam(Corner(), pixels) == blue).all()  # blue is what it predicts


def test_it_is_the_papers_formula():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4).eval()
    pixels = torch.randn(1, 3, 128, 128)
    features = model.forward_features(pixels)
    features.retain_grad()
    model.forward_head(features)[0, 2].backward()
    alpha = features.grad.mean((2, 3))
    expected = torch.relu(sum(alpha[0, k] * features[0, k] for k in range(features.shape[1])))
    expected = nn.functional.interpolate(expected[None, None], (128, 128), mode="bilinear")[0, 0].detach()
    assert grad_cam(model, pixels, 2) == pytest.approx((expected / expected.max()).numpy(), abs=1e-4)


class Twisted(nn.Module):
    """Its logits are linear in its features, with another weight at every place, so that Y = exp(S) has all slopes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3 * 5 * 4))

    def forward_features(self, pixels):
        return torch.relu(nn.functional.avg_pool2d(pixels, 2))

    def forward_head(self, features):
        return features.flatten(1) @ self.weight.T / 10


def test_grad_cam_plus_plus_is_the_papers_formula():
    """Its weights, place by place, from derivatives of exp(S) of all three orders by differentiation."""
    torch.manual_seed(0)
    model, pixels = Twisted().double(), torch.randn(1, 3, 10, 8, dtype=torch.float64)
    features = model.forward_features(pixels).detach()[0]
    weights = [0.0] * 3
    for k in range(3):
        total = float(features[k].sum())
        for i in range(5):
            for j in range(4):
                place = features[k, i, j].clone().requires_grad_()
                changed = features.clone()
                changed[k, i, j] = place
                y = torch.exp(model.forward_head(changed[None])[0, 1])
                first = torch.autograd.grad(y, place, create_graph=True)[0]
                second = torch.autograd.grad(first, place, create_graph=True)[0]
                third = torch.autograd.grad(second, place)[0]
                first, second = first.item(), second.item()
                weights[k] += second / (2 * second + total * third.item()) * max(first, 0.0)
    expected = torch.relu(sum(weight * feature for weight, feature in zip(weights, features)))
    expected = nn.functional.interpolate(expected[None, None], (10, 8), mode="bilinear")[0, 0]
    got = grad_cam_plus_plus(model, pixels, 1)
    assert got == pytest.approx((expected / expected.max()).numpy(), abs=1e-5)
    assert np.abs(got - grad_cam(model, pixels, 1)).max() > 0.05


def test_maps_stand_beside_the_image():
    torch.manual_seed(0)
    models, pixels = [Twisted(), Twisted()], torch.randn(1, 3, 10, 8)
    image = np.full((10, 8, 3), 50, np.uint8)
    sheet = np.asarray(cam_sheet(models, image, pixels, 0))
    assert sheet.shape == (20, 24, 3)
    tiles = [sheet[10 * row : 10 * row + 10, 8 * n : 8 * n + 8] for row in (0, 1) for n in (0, 1, 2)]
    drawn = [
        np.asarray(overlay(image, f(model, pixels, 0))) for f in (grad_cam, grad_cam_plus_plus) for model in models
    ]
    expected = [image, *drawn[:2], image, *drawn[2:]]
    assert all((tile == other).all() for tile, other in zip(tiles, expected, strict=True))
    assert len({tile.tobytes() for tile in tiles}) == 5


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 3}),
        ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2, "global_pool": "avg", "class_token": False}),
        ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 2}),
        ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
        ("tf_efficientnet_lite0", 64, {}),
        ("convnext_atto", 64, {}),
        ("mobilenetv3_small_050", 64, {}),
        ("small_resnet_nano", 8, {}),
    ],
)
def test_models_of_all_kinds(name, side, options):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **options).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a frozen backbone is explained as well
    buffers = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        pixels = torch.randn(1, 3, side, side)
    for explain in (grad_cam, grad_cam_plus_plus):
        cam = explain(model, pixels.clone(), 1)
        assert cam.shape == (side, side)
        assert 0 <= cam.min() <= cam.max() <= 1
        assert cam.max() > cam.min() or explain is grad_cam_plus_plus
    assert model.training
    assert all((value == buffers[key]).all() for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_lie_where_their_patches_are():
    """A class-token transformer whose attention is uniform: its map follows the patch that matters."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=2, num_classes=2).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
    base = torch.zeros(1, 3, 64, 96)
    bright = base.clone()
    bright[..., 48:, 80:] = 8
    change = np.abs(grad_cam(model, bright, 0) - grad_cam(model, base, 0))
    assert grad_cam(model, bright, 0).shape == (64, 96)
    below_right = [grad_cam(model, bright, k)[56:, 88:].mean() for k in (0, 1)]
    above_left = [grad_cam(model, bright, k)[:40, :70].mean() for k in (0, 1)]
    assert change.max() > 0
    assert any(abs(a - b) > 0.2 for a, b in zip(below_right, above_left))


def test_a_class_that_depends_on_nothing_has_an_empty_map():
    model = create_model("resnet18", num_classes=3)
    nn.init.zeros_(model.fc.weight)
    assert (grad_cam(model, torch.randn(1, 3, 64, 64), 1) == 0).all()
    assert (grad_cam_plus_plus(model, torch.randn(1, 3, 64, 64), 1) == 0).all()


def test_a_deep_map_that_is_too_small_gives_way_to_an_earlier_layer():
    model = create_model("resnet18", num_classes=3).eval()
    wide = grad_cam(model, torch.randn(1, 3, 32, 32), 1)  # 1 x 1 in the last layer, 2 x 2 in the one before
    assert 0 < (wide > 0).mean() < 1


class Tokens(nn.Module):
    """Mixes everything into one vector."""

    def forward_features(self, pixels):
        return pixels.flatten(1)

    def forward_head(self, features):
        return features[:, :3]


@pytest.mark.parametrize(
    ("model", "shape", "target", "words"),
    [
        (Tokens(), (1, 3, 8, 8), 0, "none of its layers"),
        (Corner(8), (1, 3, 8, 8), 0, "none of its layers"),
        (nn.Conv2d(3, 4, 3), (1, 3, 8, 8), 0, "forward_features"),
        (Corner(), (2, 3, 8, 8), 0, "one image at a time"),
        (Corner(), (1, 3, 8, 8), 2, "classes 0 to 1"),
    ],
)
def test_what_cannot_be_explained_says_why(model, shape, target, words):
    with pytest.raises(InputError, match=words):
        grad_cam(model, torch.rand(shape), target)


def test_overlay_is_transparent_where_the_map_is_nought():
    image = np.full((6, 9, 3), 100, np.uint8)
    cam = np.zeros((6, 9), np.float32)
    cam[2, 3] = 1
    result = np.asarray(overlay(image, cam))
    assert (result[0] == 100).all()
    assert (result[2, 3] != 100).all()
    with pytest.raises(InputError, match="differ in size"):
        overlay(image, cam.T)
