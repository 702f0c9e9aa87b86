import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer

from exact import moved, normal
from vitrail.app.build import count_parameters
from vitrail.checks import aft as check
from vitrail.errors import InputError
from vitrail.models import aft, create_model
from vitrail.models.aft import AFTConv, AFTFull, AFTLocal, AFTNet, AFTSimple, PixelAFT, checkpoint_filter_fn, jittered

TINY = {"img_size": 16, "patch_size": 4, "num_classes": 3, "embed_dim": 8, "depth": 2, "heads": 2, "kernel_size": 3}
PIXELS = {"img_size": (3, 4), "in_chans": 2, "levels": 5, "embed_dim": 8, "depth": 2, "heads": 2}
OWN = {
    "local": {"window": 5, "rank": 4},
    "simple": {},
    "full": {"rank": None},
    "conv": {"kernel_size": (3, 5)},
}


def tiny(**options):
    torch.manual_seed(0)
    return AFTNet(**{**TINY, **options})


def pixels(mixer="local", **options):
    torch.manual_seed(0)
    return moved(PixelAFT(**{**PIXELS, "mixer": mixer, **OWN[mixer], **options}))


def some_images(batch=3, seed=0):
    return torch.randint(5, (batch, 2, 3, 4), generator=torch.Generator().manual_seed(seed))


def norm(x, layer):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-6)


# ---- classification


@pytest.mark.parametrize("mixer", ["conv", "full"])
def test_the_net_is_patches_blocks_norm_and_head(mixer):
    net, x = moved(tiny(mixer=mixer)).eval(), normal(2, 3, 16, 12)
    found = F.conv2d(x, net.patch_embed.proj.weight, net.patch_embed.proj.bias, 4).flatten(2).transpose(1, 2)
    if mixer == "full":
        found = F.conv2d(F.pad(x, (0, 4)), net.patch_embed.proj.weight, net.patch_embed.proj.bias, 4)
        x, found = F.pad(x, (0, 4)), found.flatten(2).transpose(1, 2)
        found = torch.cat([net.cls_token.expand(2, -1, -1), found], 1) + net.pos_embed
    for block in net.blocks:
        found = found + block.mixer(norm(found, block.norm1), (4, 3 if mixer == "conv" else 4))
        inside = F.gelu(block.mlp.fc1(norm(found, block.norm2)))
        found = found + block.mlp.fc2(inside)
    found = norm(found, net.norm)
    torch.testing.assert_close(net.forward_features(x), found)
    pooled = found.mean(1) if mixer == "conv" else found[:, 0]
    torch.testing.assert_close(net(x), net.head(pooled))


@pytest.mark.parametrize("mixer", ["conv", "full"])
def test_any_size_features_and_pooling(mixer):
    net = tiny(mixer=mixer).eval()
    for size in ((28, 28), (45, 61), (5, 3)):
        assert net(torch.randn(1, 3, *size)).shape == (1, 3)
    final, maps = net.forward_intermediates(torch.randn(1, 3, 18, 21), indices=[0, 1], norm=True)
    assert [tuple(found.shape) for found in maps] == [(1, 8, 5, 6)] * 2
    patches = final[:, net.num_prefix_tokens :]
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), patches)
    assert net.forward_intermediates(torch.randn(1, 3, 8, 8), 1, output_fmt="NLC")[1][0].shape == (1, 4, 8)
    net.reset_classifier(0, "avg")
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(net(x), net.forward_features(x)[:, net.num_prefix_tokens :].mean(1))


def test_a_pyramid_of_one_stride():
    features = create_model("aft_conv_nano", num_classes=10, features_only=True, out_indices=(0, 3)).eval()
    assert [tuple(found.shape[1:]) for found in features(torch.randn(1, 3, 45, 61))] == [(64, 12, 16)] * 2
    assert features.feature_info.reduction() == [4, 4]


def test_positions_of_another_size_are_interpolated():
    net = tiny(mixer="full").eval()
    with torch.no_grad():
        net.pos_embed[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    (x, _), grid = net.begin(torch.zeros(1, 3, 32, 8))
    rows = (x[:, 1:] - net.patch_embed.proj.bias).unflatten(1, grid)
    assert grid == (8, 2)
    torch.testing.assert_close(rows[:, :, :1].expand_as(rows), rows)
    torch.testing.assert_close(x[:, :1], net.cls_token + net.pos_embed[:, :1])


def test_drop_path_rises_and_weights_begin_as_deits():
    net = tiny(embed_dim=64, depth=3, drop_path_rate=0.2)
    assert isinstance(net.blocks[0].drop_path, torch.nn.Identity)
    assert [block.drop_path.drop_prob for block in net.blocks[1:]] == pytest.approx([0.1, 0.2])
    assert isinstance(net.blocks[2].drop_path, DropPath)
    for layer in (net.blocks[0].mixer.qkv, net.blocks[0].mlp.fc1, net.blocks[0].mlp.fc2):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert (layer.bias == 0).all()
    full, pixel = tiny(mixer="full", embed_dim=64), PixelAFT(**{**PIXELS, "levels": 64, "embed_dim": 64})
    for weight in (full.pos_embed, full.cls_token, pixel.pos_embed, pixel.embed.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_what_the_classifier_takes_is_dropped():
    net, x = tiny(drop_rate=1 - 1e-12), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        net.head.bias.fill_(1)
    torch.testing.assert_close(net.train()(x), torch.ones(2, 3))
    assert not torch.allclose(net.eval()(x), torch.ones(2, 3))


def test_variants_are_as_published():
    nets = {}
    assert inspect.signature(AFTNet).parameters["depth"].default == 12
    with torch.device("meta"):
        for name in aft.default_cfgs:
            nets[name] = create_model(name, num_classes=1000, depth=1)
    for name, heads, side in (
        ("tiny_32_11", 32, 11),
        ("tiny_192_11", 192, 11),
        ("small_16_11", 16, 11),
        ("small_384_11", 384, 11),
        ("small_384_15", 384, 15),
        ("base_32_25", 32, 25),
    ):
        net = nets[f"aft_conv_{name}"]
        assert isinstance(net.blocks[0].mixer, AFTConv)
        assert (net.blocks[0].mixer.heads, net.blocks[0].mixer.bias.kernel_size) == (heads, (side, side))
        assert (net.cls_token, net.pos_embed, net.global_pool) == (None, None, "avg")
        assert net.pretrained_cfg["input_size"][1] == (384 if name == "base_32_25" else 224)
    for name, width in (("tiny", 192), ("small", 384)):
        net = nets[f"aft_full_{name}"]
        assert isinstance(net.blocks[0].mixer, AFTFull)
        assert net.blocks[0].mixer.bias.u.shape == (197, 128)
        assert (net.num_features, net.global_pool) == (width, "token")


def test_weights_are_decayed_in_linear_layers_alone():
    import fnmatch

    for net in (tiny(), tiny(mixer="full"), pixels(), pixels("conv"), pixels("simple")):
        apart = net.no_weight_decay()
        for name, value in net.named_parameters():
            linear = value.ndim > 1 and name.endswith(
                (
                    "qkv.weight",
                    "mixer.proj.weight",
                    "fc1.weight",
                    "fc2.weight",
                    "head.weight",
                    "patch_embed.proj.weight",
                )
            )
            assert any(fnmatch.fnmatch(name, pattern) for pattern in apart) == (not linear) or value.ndim == 1, name


def test_a_net_begins_from_a_vision_transformer():
    torch.manual_seed(1)
    vit = moved(VisionTransformer(img_size=16, patch_size=4, num_classes=3, embed_dim=8, depth=2, num_heads=2)).float()
    for mixer, keys in (("conv", 2), ("full", 8)):
        net = tiny(mixer=mixer)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(checkpoint_filter_fn({"model": vit.state_dict()}, net))
        ours, theirs = net.blocks[1].mixer.qkv, vit.blocks[1].attn.qkv
        assert torch.equal(ours.weight[-8:], theirs.weight[-8:])
        assert torch.equal(ours.bias[-8:], theirs.bias[-8:])
        assert torch.equal(ours.weight[: 8 + keys], before["blocks.1.mixer.qkv.weight"][: 8 + keys])
        for ours, theirs in (
            (net.blocks[0].mixer.proj, vit.blocks[0].attn.proj),
            (net.blocks[1].mlp.fc2, vit.blocks[1].mlp.fc2),
            (net.blocks[0].norm2, vit.blocks[0].norm2),
            (net.patch_embed.proj, vit.patch_embed.proj),
            (net.norm, vit.norm),
            (net.head, vit.head),
        ):
            assert torch.equal(ours.weight, theirs.weight)
        if mixer == "full":
            assert torch.equal(net.pos_embed, before["pos_embed"])
    own = tiny().state_dict()
    assert checkpoint_filter_fn(own, tiny()) is own


# ---- images as sequences


@pytest.mark.parametrize("mixer", OWN)
def test_a_sub_pixel_is_told_by_those_before_it(mixer):
    net, images = pixels(mixer).eval(), some_images(1)
    logits = net(images)
    assert logits.shape == (1, 24, 5)
    for place, (row, column, colour) in ((0, (0, 0, 0)), (9, (1, 0, 1)), (14, (1, 3, 0)), (23, (2, 3, 1))):
        other = images.clone()
        other[0, colour, row, column] = (other[0, colour, row, column] + 1) % 5
        changed = (net(other) - logits).abs().amax(2)[0] > 1e-12
        # With the sub-pixel itself, all that come after it.
        assert changed.tolist() == [False] * (place + 1) + [True] * (23 - place)


def test_bits_are_of_the_chain_of_probabilities():
    net, images = pixels().eval(), some_images(2)
    shares = net(images).softmax(-1).detach()
    for image, row in zip(images, range(2)):
        values = [int(image[colour, y, x]) for y in range(3) for x in range(4) for colour in range(2)]
        bits = [-math.log2(float(shares[row, place, value])) for place, value in enumerate(values)]
        assert net.bits_per_dim(images)[row].item() == pytest.approx(sum(bits) / 24)
    flat = PixelAFT(**PIXELS)
    with torch.no_grad():
        flat.head.weight.zero_()
    torch.testing.assert_close(flat.bits_per_dim(images), torch.full((2,), math.log2(5)))


@pytest.mark.parametrize("mixer", OWN)
def test_steps_are_the_parallel_form(mixer):
    net, images = pixels(mixer).eval(), some_images()
    values, states, found = net.sequence(images), None, []
    with torch.no_grad():
        for place in range(24):
            logits, states = net.step(values[:, place - 1] if place else None, states, 3)
            found.append(logits)
    torch.testing.assert_close(torch.stack(found, 1), net(images))
    kept = {"local": 4, "simple": 0, "full": 23, "conv": 10}[mixer]
    assert [state.keys.shape[2] for state in states] == [kept] * 2


def test_images_are_drawn_from_the_probabilities():
    net = pixels(drop_rate=0.5).train()
    draw = lambda **options: net.sample(2, generator=torch.Generator().manual_seed(3), **options)  # noqa: E731
    images = draw()
    assert images.shape == (2, 2, 3, 4)
    assert net.training
    assert torch.equal(draw(), images)
    # The same draws from the logits of the parallel form.
    generator, net = torch.Generator().manual_seed(3), net.eval()
    shares = net(images).softmax(-1)
    again = [torch.multinomial(shares[:, place], 1, generator=generator)[:, 0] for place in range(24)]
    assert torch.equal(net.sequence(images), torch.stack(again, 1))
    # Cold, the likeliest of each.
    cold = draw(temperature=1e-4)
    assert torch.equal(net(cold).argmax(2), net.sequence(cold))


def test_the_defaults_are_the_published_ones():
    with torch.device("meta"):
        net, wide, free = PixelAFT(), PixelAFT(embed_dim=512, depth=12), PixelAFT(depth=1, rank=None)
    layer = net.blocks[0].mixer
    assert isinstance(layer, AFTLocal)
    assert (net.length, len(net.blocks), net.pos_embed.shape[1]) == (3072, 24, 256)
    assert (layer.bias.window, layer.bias.rank, layer.causal) == (256, 64, True)
    assert net.blocks[0].drop.p == net.drop.p == 0.1
    # Table 3 cuts its digits off.
    assert math.floor(count_parameters(layer) / 1e5) == 6
    assert math.floor(count_parameters(free.blocks[0].mixer) / 1e5) == 97
    assert len(wide.blocks) == 12
    assert isinstance(pixels("simple").blocks[0].mixer, AFTSimple)


def test_the_embedding_and_what_branches_add_are_dropped():
    net = pixels(drop_rate=1 - 1e-12).train()
    nothing = net.head(net.norm(torch.zeros(8, dtype=torch.float64)))
    torch.testing.assert_close(net(some_images()), nothing.expand(3, 24, 5))


def test_images_are_flipped_and_made_lighter_or_darker():
    images = torch.arange(24).view(1, 2, 3, 4).expand(64, -1, -1, -1) * 10
    found = jittered(images, generator=torch.Generator().manual_seed(0))
    flips, added = 0, set()
    for image in found:
        middle = int(image[1, 0, 0])
        matches = []
        for flipped in (False, True):
            base = images[0].flip(2) if flipped else images[0]
            by = middle - int(base[1, 0, 0])
            if abs(by) <= 10 and torch.equal(image, (base + by).clamp(0, 255)):
                matches.append((flipped, by))
        assert matches
        flips += matches[0][0]
        added.add(matches[0][1])
    assert 16 < flips < 48
    assert min(added) < -5
    assert max(added) > 5
    assert jittered(torch.tensor([[[[0, 255]]]]).expand(99, 1, 1, 2)).aminmax() == (0, 255)


# ---- errors and the check


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny(mixer="cnv"), "'cnv'.*did you mean 'conv'"),
        (lambda: tiny(patch_size=0), "patch_size = 0 .*1 or more"),
        (lambda: tiny(embed_dim=0), "embed_dim = 0 .*1 or more"),
        (lambda: tiny(mlp_ratio=0.1), r"mlp_ratio = 0\.1 .*hidden width of 1 or more of 8"),
        (lambda: tiny(global_pool="token"), "global_pool = 'token' .*give avg"),
        (lambda: tiny(mixer="full", global_pool=""), "global_pool = '' .*num_classes = 0"),
        (lambda: tiny().forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NHWC"), "output_fmt = 'NHWC'"),
        (lambda: PixelAFT(mixer="locl"), "'locl'.*did you mean 'local'"),
        (lambda: PixelAFT(**{**PIXELS, "img_size": (3, 0)}), "img_size = 0 .*1 or more"),
        (lambda: PixelAFT(**{**PIXELS, "embed_dim": 0}), "embed_dim = 0 .*1 or more"),
        (lambda: PixelAFT(**PIXELS, drop_rate=1.0), r"drop_rate = 1\.0 .*in \[0, 1\)"),
        (lambda: PixelAFT(**PIXELS)(torch.zeros(1, 2, 3, 4)), "float32.*whole numbers of shape .B, 2, 3, 4"),
        (lambda: PixelAFT(**PIXELS)(torch.zeros(1, 2, 4, 4).long()), r"\(1, 2, 4, 4\).*shape .B, 2, 3, 4"),
        (lambda: PixelAFT(**PIXELS)(some_images() + 3), "values of 3 to 7: give 0 to 4"),
        (lambda: PixelAFT(**PIXELS).sample(0), "count = 0 "),
        (lambda: PixelAFT(**PIXELS).sample(1, temperature=0), "temperature = 0"),
    ],
)
def test_what_does_not_fit_is_explained(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_arms_of_the_check_are_of_one_size():
    size = check.Size()
    nets = {name: check.pixel_net(name, size) for name in check.ARMS}
    counts = [count_parameters(net) for net in nets.values()]
    assert max(counts) / min(counts) < 1.002
    assert isinstance(nets["local"].blocks[0].mixer, AFTLocal)
    assert nets["local"].blocks[0].mixer.bias.window == 37
    assert float(nets["softmax"].blocks[0].mixer.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    images = torch.randint(check.LEVELS, (1, 1, 14, 14))
    later = images.clone()
    later[0, 0, 13, 13] = (later[0, 0, 13, 13] + 1) % check.LEVELS
    later[0, 0, 7, 0] = (later[0, 0, 7, 0] + 1) % check.LEVELS
    for net in nets.values():
        changed = (net.eval()(later) - net(images)).abs().amax(2)[0] > 1e-6
        assert changed.tolist() == [False] * 99 + [True] * 97


def test_memory_grows_as_length_does():
    growth = {layer: check.peak(layer, 16, 1024) / check.peak(layer, 16, 512) for layer in check.LAYERS}
    assert max(ratio for layer, ratio in growth.items() if layer.startswith("AFT")) < 2.2
    assert growth["softmax, plain"] > 3.5


def test_entry_points_take_the_options_of_the_net():
    for name in aft.default_cfgs:
        assert set(inspect.signature(getattr(aft, name)).parameters) == {"pretrained", "kwargs"}
