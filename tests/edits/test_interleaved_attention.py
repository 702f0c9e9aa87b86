import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from vitrail.edits.interleaved_attention import interleaved_attention
from vitrail.errors import InputError
from vitrail.layers.interleaved import InterleavedAttention
from vitrail.layers.mixed_block import MixedSwinBlock

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **options})


def parts(model):
    return [module for module in model.modules() if isinstance(module, InterleavedAttention)]


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_attn_norm": True, "reg_tokens": 2}])
def test_with_windows_as_large_as_the_map_and_no_convolution_a_vit_stays_as_it_was(options):
    model = vit(**options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    model = interleaved_attention(window=4, conv=False)(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert len(parts(model)) == 2
    assert not any(type(module) is Attention for module in model.modules())


def test_a_vit_gets_its_grid_its_tokens_and_its_dropout():
    model = interleaved_attention(window=2)(vit(proj_drop_rate=0.3, attn_drop_rate=0.2, img_size=(16, 32)).double())
    assert [(m.grid, m.prefix, m.window, m.proj_drop.p, m.attn_drop) for m in parts(model)] == [
        ((2, 4), 1, 2, 0.3, 0.2)
    ] * 2
    first, last = parts(model)
    assert first.conv.weight.dtype == torch.float64
    assert last.conv is None  # of this block the class token alone is read
    pooled = interleaved_attention(window=2)(vit(global_pool="avg"))
    assert all(m.conv is not None for m in parts(pooled))
    x = torch.randn(1, 3, 16, 32, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(model.eval()(x).sum(), x)
    assert slope.ne(0).all()


def test_the_blocks_of_a_swin_take_maps_of_any_size():
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, **SWIN)
    old = [block.attn for stage in model.layers for block in stage.blocks]
    model = interleaved_attention(window=4)(model).eval()
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert all(isinstance(block, MixedSwinBlock) for block in blocks)
    assert [(block.mix.qkv, block.mix.proj) for block in blocks] == [(each.qkv, each.proj) for each in old]
    assert [block.mix.num_heads for block in blocks] == [1, 2, 2]
    assert model(torch.zeros(1, 3, 48, 20)).shape == (1, 3)


class Generator(nn.Module):
    """A block as diffusion transformers have it: attention of timm's, between a scale and a gate."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.attn = Attention(8, 2, qkv_bias=True)
        self.modulation = nn.Linear(8, 16)

    def forward(self, x, condition):
        scale, gate = self.modulation(condition)[:, None].chunk(2, -1)
        return x + (1 + gate) * self.attn(self.norm(x) * (1 + scale))


@pytest.mark.parametrize(("grid", "places"), [(None, 16), ((2, 4, 3), 24)])
def test_a_generator_for_images_and_one_for_clips(grid, places):
    torch.manual_seed(0)
    model = interleaved_attention(window=2, grid=grid)(Generator())
    (attention,) = parts(model)
    assert (attention.grid, attention.prefix) == (grid, 0)
    x = torch.randn(2, places, 8, requires_grad=True)
    y = model(x, torch.randn(2, 8))
    assert y.shape == x.shape
    (slope,) = torch.autograd.grad(y[0, 0].sum(), x)
    seen = slope[0].abs().sum(-1).gt(0).view(grid or (4, 4))
    first = seen[0] if grid else seen
    # The window of the first place, two places apart down and across, and its three neighbours in the frame.
    wanted = torch.zeros_like(first)
    wanted[:2, :2] = True
    wanted[::2, ::2] = True
    assert torch.equal(first, wanted)
    if grid:
        assert torch.equal(seen[1].nonzero(), torch.tensor([[0, 0], [0, 2], [2, 0], [2, 2]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interleaved_attention(window=0), "window of 0"),
        (lambda: interleaved_attention(window=(2, 2), grid=(2, 2, 2)), "3 axes"),
        (lambda: interleaved_attention()(nn.Sequential(nn.Linear(2, 2))), "no attention of a ViT and no block of Swin"),
        (lambda: interleaved_attention()(vit(dynamic_img_size=True)), "dynamic_img_size=False"),
        (lambda: interleaved_attention()(nn.Sequential(Attention(8, 2, gated=True))), "has a gate or heads"),
        (lambda: interleaved_attention()(nn.Sequential(Attention(8, 2, attn_head_dim=8))), "has a gate or heads"),
    ],
)
def test_what_it_cannot_do_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
