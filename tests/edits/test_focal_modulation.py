import math

import pytest
import timm
import torch
from timm.models.focalnet import FocalModulation as TimmsModulation
from torch import nn

from vitrail.edits.focal_modulation import FocalModulation, focal_modulation
from vitrail.errors import InputError
from vitrail.layers.mixed_block import MixedSwinBlock

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 3}


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **options})


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def slow(module, x, prefix, grid, sides, normalize, post_norm):
    """Modulate (N, C) token by token: the context of each place by explicit windows."""
    height, width = grid
    dim = x.shape[1]
    out = [module.f.weight @ token + module.f.bias for token in x]
    query = [value[:dim] for value in out]
    gates = [value[2 * dim :] for value in out]
    context = {(i, j): out[prefix + i * width + j][dim : 2 * dim] for i in range(height) for j in range(width)}  # Z^0
    sums = {place: torch.zeros_like(value) for place, value in context.items()}
    for level, side in enumerate(sides):
        weight, reach = module.focal_layers[level][0].weight[:, 0], side // 2
        wider = {}
        for i, j in context:
            total = torch.zeros(dim, dtype=x.dtype)
            for u in range(-reach, reach + 1):
                for v in range(-reach, reach + 1):
                    if (i + u, j + v) in context:
                        total = total + weight[:, u + reach, v + reach] * context[i + u, j + v]
            wider[i, j] = gelu(total)
        context = wider
        for i, j in context:
            sums[i, j] = sums[i, j] + gates[prefix + i * width + j][level] * context[i, j]
    mean = gelu(sum(context.values()) / len(context))
    rows = []
    for token in range(len(x)):
        total = gates[token][len(sides)] * mean
        if token >= prefix:
            total = total + sums[divmod(token - prefix, width)]
        if normalize:
            total = total / (len(sides) + 1)
        value = query[token] * (module.h.weight[:, :, 0, 0] @ total + module.h.bias)
        if post_norm:
            value = (value - value.mean()) / (value.var(unbiased=False) + 1e-5).sqrt()
            value = value * module.ln.weight + module.ln.bias
        rows.append(module.proj.weight @ value + module.proj.bias)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("grid", "prefix", "window", "levels", "factor", "normalize", "post_norm"),
    [
        ((3, 5), 0, 3, 2, 2, False, False),
        ((4, 3), 1, 1, 3, 2, True, False),
        ((2, 7), 2, 5, 1, 2, False, True),
        ((1, 1), 1, 3, 2, 4, True, True),
    ],
)
def test_it_is_the_slow_loop(grid, prefix, window, levels, factor, normalize, post_norm):
    torch.manual_seed(0)
    module = FocalModulation(
        4, window, levels, factor, grid=grid, prefix=prefix, normalize_modulator=normalize, post_norm=post_norm
    ).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, prefix + grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True)
    sides = [window + factor * level for level in range(levels)]
    ours = module(x)
    theirs = torch.stack([slow(module, image, prefix, grid, sides, normalize, post_norm) for image in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    given, weight = [x, *module.parameters()], torch.randn_like(ours)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
    if not prefix:
        torch.testing.assert_close(module(x.unflatten(1, grid)), ours.unflatten(1, grid))


def test_it_is_timms_on_maps():
    torch.manual_seed(0)
    ours, theirs = (
        FocalModulation(6, 3, 3, normalize_modulator=True),
        TimmsModulation(6, 3, 3, normalize_modulator=True),
    )
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    shapes = theirs.state_dict()
    theirs.load_state_dict({key: value.view(shapes[key].shape) for key, value in ours.state_dict().items()})
    x = torch.randn(2, 9, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_it_begins_as_published():
    torch.manual_seed(0)
    module = FocalModulation(128)
    for linear in (module.f, module.proj):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    for conv in (module.h, module.focal_layers[2][0]):
        fan = conv.weight[0].numel()
        assert float(conv.weight.detach().std()) == pytest.approx((1 / 3 / fan) ** 0.5, rel=0.05)
    assert [layer[0].kernel_size for layer in module.focal_layers] == [(3, 3), (5, 5), (7, 7)]


def test_every_attention_of_a_vit_is_replaced():
    model = focal_modulation(focal_level=2)(vit(proj_drop_rate=0.3, img_size=(16, 32)).double()).eval()
    found = [module for module in model.modules() if isinstance(module, FocalModulation)]
    assert [(module.grid, module.prefix, module.proj_drop.p) for module in found] == [((2, 4), 1, 0.3)] * 2
    assert [module.focal_layers[-1][0].kernel_size for module in found] == [(5, 5)] * 2
    x = torch.randn(2, 3, 16, 32, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 3)
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert (slope.abs().amax((1, 2, 3)) > 0).all()
    given = torch.randn(2, 9, 12, dtype=torch.float64)
    assert torch.equal(found[0](given), found[0](given))
    assert (found[0].train()(given) == 0).double().mean() == pytest.approx(0.3, abs=0.1)


def test_the_class_token_depends_on_every_place_and_no_place_on_it():
    torch.manual_seed(0)
    module = FocalModulation(4, 1, 1, grid=(3, 3), prefix=1)
    x = torch.randn(1, 10, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x)[:, 0].sum(), x)
    assert slope.abs().sum(-1).gt(0).all()
    (slope,) = torch.autograd.grad(module(x)[:, 1:].sum(), x)
    assert not slope[:, 0].any()


def test_the_blocks_of_a_swin_take_maps_of_any_size():
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, **SWIN)
    norms = [block.norm1 for stage in model.layers for block in stage.blocks]
    model = focal_modulation(focal_window=5, post_norm=True)(model).eval()
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert all(isinstance(block, MixedSwinBlock) for block in blocks)
    assert [block.norm1 for block in blocks] == norms
    assert blocks[0].mix.focal_layers[0][0].kernel_size == (5, 5)
    assert isinstance(blocks[0].mix.ln, nn.LayerNorm)
    assert model(torch.zeros(1, 3, 48, 20)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_window": 2}, "focal_window = 2 .*odd number from 1"),
        ({"focal_factor": 1}, "focal_factor = 1 .*even number from 0"),
        ({"focal_level": 0}, "focal_level = 0 .*from 1"),
        ({"focal_level": 1.5}, "focal_level = 1.5 "),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        focal_modulation(**options)
    with pytest.raises(InputError, match=message):
        FocalModulation(8, **options)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(InputError, match="no attention of a ViT and no block of Swin in Sequential"):
        focal_modulation()(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="dynamic_img_size=False"):
        focal_modulation()(vit(dynamic_img_size=True))
    module = FocalModulation(4, grid=(2, 2), prefix=1)
    with pytest.raises(InputError, match=r"6 tokens came .*1 \+ \(2, 2\)"):
        module(torch.zeros(1, 6, 4))
    with pytest.raises(InputError, match="no attention mask"):
        module(torch.zeros(1, 5, 4), attn_mask=torch.ones(5, 5))
    with pytest.raises(InputError, match="no attention mask"):
        module(torch.zeros(1, 5, 4), is_causal=True)
