"""The nets of ShuffleMamba: where they differ from Vim."""

import pytest
import torch
from torch import nn

from vitrail.app.build import count_parameters
from vitrail.models import create_model
from vitrail.models.shufflemamba import ShuffleMamba


def test_weights_begin_as_published():
    torch.manual_seed(0)
    model = ShuffleMamba(embed_dim=128, depth=4, num_classes=50, patch_size=8, img_size=64)
    assert not model.cls_token.any()
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.15)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith("out_proj"):
            assert float(module.weight.detach().abs().max()) == pytest.approx(256**-0.5 / 4**0.5, rel=0.01)
        else:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1), name
        assert module.bias is None or not module.bias.any(), name
    row = torch.arange(1.0, 17)
    for mixer in (model.layers[0].mixer, model.layers[3].mixer.back):
        torch.testing.assert_close(mixer.A_log.detach().exp(), row.expand(256, -1))


def test_variants_are_as_published():
    # Counted from the authors' nets.
    counts = {
        "tiny": (7_148_008, 24, nn.RMSNorm),
        "small": (25_796_584, 24, nn.RMSNorm),
        "middle": (74_236_456, 32, nn.LayerNorm),
        "base": (97_598_440, 24, nn.RMSNorm),
        "large_40": (283_698_152, 40, nn.RMSNorm),
        "large": (340_034_536, 48, nn.RMSNorm),
    }
    for name, (count, depth, norm) in counts.items():
        with torch.device("meta"):
            model = create_model(f"shufflemamba_{name}", num_classes=1000)
        assert count_parameters(model) == count
        assert len(model.layers) == depth
        assert isinstance(model.layers[0].norm, norm)
        assert isinstance(model.norm_f, norm)
        assert model.class_token == "first"


def test_the_class_token_is_first():
    model = create_model("shufflemamba_nano", num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        model.forward_head(model.forward_features(x), pre_logits=True), model.forward_features(x)[:, 0]
    )
