import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitrail.edits.focal_modulation import focal_modulation
from vitrail.errors import InputError
from vitrail.evaluate.modulator import modulation_picture, modulations
from vitrail.models import create_model

NANO = {"num_classes": 3, "embed_dim": 8, "depths": (1, 2), "focal_levels": (2, 1), "focal_windows": (3, 3)}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}
SWIN = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depths": (1,), "num_heads": (1,), "num_classes": 3}


def test_they_are_what_the_layers_of_timm_compute():
    torch.manual_seed(0)
    model = create_model("focalnet_nano", **NANO, drop_path_rate=1 - 1e-9).train()  # nothing is left out of it
    x = torch.randn(1, 3, 24, 16)
    found = modulations(model, x)
    assert model.training
    assert [one.layer for one in found] == [f"layers.{i}.blocks.{j}.modulation" for i, j in ((0, 0), (1, 0), (1, 1))]
    block = model.eval().layers[0].blocks[0]
    with torch.no_grad():
        given = block.modulation.f(block.norm1(model.stem(x)))
        _, context, gates = given.split([8, 8, 3], 1)
        total = 0
        for level, layer in enumerate(block.modulation.focal_layers):
            context = layer(context)
            total = total + context * gates[:, level : level + 1]
        total = total + nn.functional.gelu(context.mean((2, 3), keepdim=True)) * gates[:, 2:]
        modulator = block.modulation.h(total)[0]
    np.testing.assert_allclose(found[0].modulator, modulator.square().sum(0).sqrt(), rtol=1e-5)
    np.testing.assert_allclose(found[0].gates, gates[0], rtol=1e-5)
    for one, again in zip(found, modulations(model, x), strict=True):
        np.testing.assert_allclose(one.modulator, again.modulator, rtol=1e-5)
    assert [one.gates.shape for one in found] == [(3, 12, 8), (2, 6, 4), (2, 6, 4)]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "options"), [("vit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN)])
def test_they_are_those_of_edited_models(name, options):
    torch.manual_seed(0)
    model = focal_modulation(focal_level=1)(timm.create_model(name, **options)).eval()
    (one,) = modulations(model, torch.randn(1, 3, 16, 16))
    layer = model.get_submodule(one.layer)
    assert (one.modulator.shape, one.gates.shape) == ((4, 4), (2, 4, 4))
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    modulations(model, torch.full((1, 3, 16, 16), 0.3))
    handle.remove()
    places = layer.f(seen[0])[..., -2:].reshape(-1, 2)[-16:]
    found = modulations(model, torch.full((1, 3, 16, 16), 0.3))[0].gates
    np.testing.assert_allclose(found, places.detach().T.reshape(2, 4, 4), rtol=1e-5, atol=1e-6)


def test_a_picture_shows_each_map():
    torch.manual_seed(0)
    model = create_model("focalnet_nano", **NANO)
    x = torch.randn(1, 3, 24, 16)
    svg = modulation_picture(model, x)
    assert svg.startswith("<svg") and "http" not in svg
    assert svg.count("<image") == 4 + 3
    assert [svg.count(text) for text in ("whole image", "level 2", "layers.1.blocks.1", "layers.1.blocks.0")] == [
        2,
        1,
        1,
        0,
    ]
    one = modulation_picture(model, x, np.zeros((24, 16, 3), np.uint8), ["layers.1.blocks.0.modulation"])
    assert one.count("<image") == 4


def test_what_has_no_modulation_is_refused():
    model = create_model("focalnet_nano", **NANO)
    with pytest.raises(InputError, match=r"\(2, 3, 16, 16\) was given: give \(1, C, H, W\)"):
        modulations(model, torch.zeros(2, 3, 16, 16))
    with pytest.raises(InputError, match="Linear has no focal modulation: give a focalnet"):
        modulations(nn.Linear(2, 2), torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match=r"layers\.0\.blocks\.0\.modulation"):
        modulation_picture(model, torch.zeros(1, 3, 16, 16), layers=["layers.0.blocks.0.modulatio"])
