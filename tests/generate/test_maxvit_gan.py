import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.maxxvit import MbConvBlock

from exact import moved, normal
from vitrail.errors import InputError, RunError
from vitrail.generate.maxvit_gan import (
    Blur,
    CrossAttention,
    Discriminator,
    DiscriminatorBlock,
    GanTraining,
    GeneratorStage,
    MaxViTGenerator,
    discriminator_loss,
    generator_loss,
)


def generator(**options):
    torch.manual_seed(0)
    return MaxViTGenerator(**{"latent_dim": 6, "channels": (8, 4), "depth": 1, "dim_head": 4, **options})


def discriminator(channels=(4, 6, 8)):
    torch.manual_seed(1)
    return Discriminator(channels)


def training(**options):
    return GanTraining(generator(), discriminator(), **options)


# ---- the generator ---------------------------------------------------------------------------------------------------


def normalised(norm, x):
    """Normalise (B, C, H, W) by the statistics of the batch."""
    mean, spread = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scaled = (x - mean[:, None, None]) / (spread + 1e-3)[:, None, None].sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def dense(layer, x):
    """Apply a 1 x 1 convolution to (C,)."""
    return layer.weight.flatten(1) @ x + layer.bias


def slow_cross(layer, x, embedding):
    """Attend place by place: x (B, C, H, W), embedding (B, N, E)."""
    size = layer.dim_head
    seen, out = normalised(layer.norm1, x), torch.zeros_like(x)
    for image in range(x.shape[0]):
        rows = embedding[image] @ layer.key_value.weight.T + layer.key_value.bias
        key, value = rows[:, :size], rows[:, size:]
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                query, parts = dense(layer.query, seen[image, :, row, column]), []
                for head in range(x.shape[1] // size):
                    scores = torch.stack([query[head * size : (head + 1) * size] @ one for one in key]) / size**0.5
                    parts.append(sum(weight * one for weight, one in zip(scores.softmax(0), value)))
                out[image, :, row, column] = x[image, :, row, column] + dense(layer.proj, torch.cat(parts))
    seen, after = normalised(layer.norm2, out), torch.zeros_like(x)
    for image in range(x.shape[0]):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                hidden = dense(layer.mlp[0], seen[image, :, row, column])
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
                after[image, :, row, column] = out[image, :, row, column] + dense(layer.mlp[2], hidden)
    return after


@pytest.mark.parametrize(("size", "tokens"), [((2, 2), 3), ((3, 1), 2)])
def test_cross_attention_is_the_slow_loop(size, tokens):
    layer = moved(CrossAttention(6, 5, dim_head=3))
    x, embedding = normal(2, 6, *size).requires_grad_(), normal(2, tokens, 5, seed=1).requires_grad_()
    ours, theirs = layer(x, embedding), slow_cross(layer, x, embedding)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight, given = normal(*ours.shape, seed=2), [x, embedding, *layer.parameters()]
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def kinds(stage):
    return [
        "conv" if isinstance(part, MbConvBlock) else "block" if part.partition_block else "grid"
        for part in stage.blocks
    ]


def test_a_stage_goes_from_global_to_local():
    stage = GeneratorStage(8, 8, 4, 2, "GA-BA-C")
    assert kinds(stage) == ["grid", "block", "conv"] * 2
    assert kinds(generator(order="C-BA-GA").stages[0]) == ["conv", "block", "grid"]


def test_attention_in_a_stage_has_batch_normalisation_and_windows_of_the_first_map():
    stage = GeneratorStage(8, 8, 4, 1, "GA-BA-C")
    for part in stage.blocks[:2]:
        assert part.partition_size == (8, 8)
        assert isinstance(part.norm1, torch.nn.BatchNorm2d)
        assert isinstance(part.norm2, torch.nn.BatchNorm2d)
    assert stage.blocks[0].norm1.eps == 1e-3
    assert not any(isinstance(part, torch.nn.LayerNorm) for part in generator().modules())


@pytest.mark.parametrize(("part", "step"), [(0, 2), (1, 1)])
def test_attention_in_a_stage_sees_a_grid_or_a_block(part, step):
    layer = GeneratorStage(8, 8, 4, 1, "GA-BA-C").blocks[part].eval()
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(layer._partition_attn(x)[0, :, 1, 1].sum(), x)
    first, last = (1, 16) if step == 2 else (0, 8)
    seen = {tuple(place) for place in slope[0].any(0).nonzero().tolist()}
    assert seen == {(row, column) for row in range(first, last, step) for column in range(first, last, step)}


def test_a_stage_is_modulated_before_its_blocks():
    stage = moved(GeneratorStage(4, 4, 4, 1, "GA-BA-C")).eval()
    x, embedding = normal(1, 4, 8, 8), normal(1, 3, 4, seed=1)
    torch.testing.assert_close(stage(x, embedding), stage.blocks(stage.cross(x, embedding)))


def test_the_generator_is_put_together_as_published():
    net, latent = moved(generator()), normal(3, 6)
    x = (latent @ net.start.weight.T + net.start.bias).reshape(3, 8, 8, 8)
    embedding = (latent @ net.embed.weight.T + net.embed.bias).reshape(3, 16, 8) + net.position
    mean, spread = embedding.mean((0, 1)), embedding.var((0, 1), unbiased=False)
    embedding = (embedding - mean) / (spread + 1e-3).sqrt() * net.embed_norm.weight + net.embed_norm.bias
    x = net.stages[0](x, embedding)
    shuffled = torch.stack([x[:, 2 * i + j :: 4] for i in range(2) for j in range(2)], 1)  # (B, 4, C / 4, 8, 8)
    shuffled = shuffled.reshape(3, 2, 2, 2, 8, 8).permute(0, 3, 4, 1, 5, 2).reshape(3, 2, 16, 16)
    conv = net.upsample[0][1]
    x = torch.einsum("oc,bchw->bohw", conv.weight.flatten(1), shuffled) + conv.bias[:, None, None]
    x = normalised(net.to_rgb[0], net.stages[1](x, embedding))
    colour = net.to_rgb[1]
    images = torch.einsum("oc,bchw->bohw", colour.weight.flatten(1), x) + colour.bias[:, None, None]
    torch.testing.assert_close(net(latent), images, rtol=1e-8, atol=1e-8)


def test_widths_that_pixel_shuffling_gives_need_no_convolution():
    assert isinstance(generator(channels=(16, 4)).upsample[0][1], torch.nn.Identity)


def test_the_published_generator_has_its_size():
    with torch.device("meta"):
        net, judge = MaxViTGenerator(), Discriminator()
    assert net.image_size == judge.image_size == 128
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(18.6, abs=0.1)
    assert sum(parameter.numel() for parameter in judge.parameters()) == 23_880_833  # that of the earlier GAN's code


def test_it_begins_as_the_earlier_gan():
    net, judge = generator(channels=(32, 32), latent_dim=32), discriminator((16, 32))
    for layer in (net.start, net.embed, net.stages[0].cross.query, net.stages[0].blocks[0].attn.qkv):
        # A normal distribution of deviation 0.02 that is cut off at twice that.
        assert float(layer.weight.detach().std()) == pytest.approx(0.0176, rel=0.1)
        assert float(layer.weight.detach().abs().max()) <= 0.04
        assert not layer.bias.any()
    layer = judge.head[0]
    assert float(layer.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / (512 + 32)), rel=0.01)
    assert not layer.bias.any()


def test_a_gradient_reaches_all_of_the_generator():
    net = moved(generator())
    (net(normal(4, 6)) * normal(4, 3, 16, 16, seed=1)).sum().backward()
    assert [name for name, value in net.named_parameters() if value.grad is None or not value.grad.any()] == []


# ---- the discriminator -----------------------------------------------------------------------------------------------


def test_blur_is_the_slow_loop():
    x, row = normal(1, 2, 4, 6), [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    padded, out = F.pad(x, (1, 1, 1, 1)), torch.zeros(1, 2, 2, 3, dtype=torch.float64)
    for top in range(2):
        for left in range(3):
            for i in range(4):
                for j in range(4):
                    out[..., top, left] += row[i] * row[j] * padded[..., 2 * top + i, 2 * left + j]
    torch.testing.assert_close(Blur()(x), out)


def test_a_block_adds_what_it_skips():
    block, x = moved(DiscriminatorBlock(2, 3)), normal(1, 2, 4, 4)
    y = F.leaky_relu(F.conv2d(x, block.convs[0].weight, block.convs[0].bias, padding=1), 0.2)
    y = F.leaky_relu(F.conv2d(Blur()(y), block.convs[3].weight, block.convs[3].bias, padding=1), 0.2)
    skip = F.conv2d(Blur()(x), block.skip[1].weight)
    torch.testing.assert_close(block(x), (y + skip) / 2**0.5)


def test_the_discriminator_ends_at_four_places():
    judge = discriminator((4, 6, 8))
    assert judge.image_size == 16
    assert judge.convs(torch.zeros(2, 3, 16, 16)).shape == (2, 8, 4, 4)
    assert judge(torch.zeros(2, 3, 16, 16)).shape == (2,)


# ---- training --------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_paper():
    real, fake = normal(5), normal(5, seed=1)
    expected = -(torch.log(torch.sigmoid(real)).mean() + torch.log(1 - torch.sigmoid(fake)).mean())
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -torch.log(torch.sigmoid(fake)).mean())
    hinge = sum(max(0.0, 1 - float(one)) for one in real) / 5 + sum(max(0.0, 1 + float(one)) for one in fake) / 5
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(hinge)
    torch.testing.assert_close(generator_loss(fake, "hinge"), -fake.mean())


def test_the_penalty_is_the_squared_slope_at_real_images():
    gan = training(penalty=3.0)
    weight = normal(3 * 16 * 16).float()
    gan.discriminator = lambda images: images.flatten(1).square() @ weight
    images = torch.rand(2, 3, 16, 16)
    real, penalty = gan._judge_real(images)
    torch.testing.assert_close(real, images.flatten(1).square() @ weight)
    slopes = 2 * images.flatten(1) * weight
    torch.testing.assert_close(penalty, 3.0 * slopes.square().sum(1).mean())
    assert not images.requires_grad


@pytest.mark.parametrize("loss", ["non-saturating", "hinge"])
def test_both_networks_learn_from_the_same_images(loss):
    gan, images = training(loss=loss, penalty=2.0), torch.rand(4, 3, 16, 16) * 2 - 1
    maker, judge = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)
    seen = []
    for optimizer in gan.optimizers:
        optimizer.step = lambda optimizer=optimizer: seen.append([p.grad for p in optimizer.param_groups[0]["params"]])
    torch.manual_seed(5)
    terms = gan.step(images)
    torch.manual_seed(5)
    made = maker(torch.randn(4, 6))
    one = generator_loss(judge(made), loss)
    shown = images.clone().requires_grad_()
    logits = judge(shown)
    (slope,) = torch.autograd.grad(logits.sum(), shown, create_graph=True)
    penalty = 2.0 * slope.square().flatten(1).sum(1).mean()
    other = discriminator_loss(logits, judge(made.detach()), loss)
    wanted = [
        torch.autograd.grad(one, list(maker.parameters())),
        torch.autograd.grad(other + penalty, list(judge.parameters())),
    ]
    for got, expected in zip(seen, wanted, strict=True):
        for slope, value in zip(got, expected, strict=True):
            torch.testing.assert_close(slope, value, rtol=1e-3, atol=1e-6)
    assert terms == pytest.approx(
        {"generator": float(one.detach()), "discriminator": float(other.detach()), "penalty": float(penalty.detach())},
        rel=1e-4,
    )


def test_optimisers_are_those_of_the_paper():
    gan = training()
    assert gan.penalty == 10.0
    for optimizer, net in zip(gan.optimizers, (gan.generator, gan.discriminator)):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"]) == (1e-4, (0.0, 0.99))
        assert group["params"] == list(net.parameters())


@pytest.mark.parametrize(("before", "share"), [(9, 1.0), (10, 0.5)])
def test_the_average_follows_the_generator(before, share):
    gan = training(ema=0.5, lr=1e-2)
    gan.steps = before
    old = {name: value.clone() for name, value in gan.generator.state_dict().items()}
    gan.step(torch.rand(2, 3, 16, 16))
    new, average = gan.generator.state_dict(), gan.average.module.state_dict()
    for name in ("start.weight", "embed_norm.running_var"):
        assert not torch.equal(new[name], old[name])
        torch.testing.assert_close(average[name], share * new[name] + (1 - share) * old[name])


def test_a_generator_learns_the_colour_of_images():
    torch.manual_seed(0)
    maker, judge = MaxViTGenerator(4, (8,), 1, dim_head=8), Discriminator((8, 8))
    gan = GanTraining(maker, judge, penalty=1.0, lr=1e-2, ema=0.5)
    colour = torch.tensor([0.8, -0.8, 0.2])[:, None, None]

    def off():
        return float((gan.sample(16).mean((0, 2, 3)) - colour.flatten()).abs().max())

    before = off()
    rows = gan.fit(colour + 0.1 * torch.randn(8, 3, 8, 8) for _ in range(20))
    assert len(rows) == gan.steps == 20
    assert off() < 0.8 * before


def test_samples_are_of_the_averaged_generator_and_of_their_seed():
    gan = training()
    with torch.no_grad():
        gan.average.module.to_rgb[1].bias.fill_(9.0)
    images = gan.sample(3, seed=4)
    assert images.shape == (3, 3, 16, 16)
    assert float(images.min()) == float(images.max()) == 1.0
    other = training()
    assert torch.equal(other.sample(2, seed=4), training().sample(2, seed=4))
    assert not torch.equal(other.sample(2, seed=4), other.sample(2, seed=5))
    assert other.generator.training


# ---- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim = 0, .* give 1 number, stage and block or more"),
        ({"channels": ()}, r"channels = \(\) and"),
        ({"depth": 0}, "depth = 0 are not allowed"),
        ({"dim_head": 3}, "dim_head = 3 does not divide a width of 8"),
        ({"dim_head": 0}, "dim_head = 0 does not divide"),
        ({"channels": (6, 2), "dim_head": 2}, r"channels = \(6, 2\) cannot be shuffled: give multiples of 4"),
        ({"order": "GA-BA"}, "unknown order of a generator's blocks 'GA-BA': did you mean 'GA-BA-C'"),
    ],
)
def test_generators_that_cannot_be_built_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        generator(**options)


@pytest.mark.parametrize("channels", [(8,), (8, 0)])
def test_discriminators_that_cannot_be_built_are_explained(channels):
    with pytest.raises(InputError, match="of a discriminator are not allowed: give two widths or more"):
        Discriminator(channels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hing"}, "unknown loss of a GAN 'hing': did you mean 'hinge'"),
        ({"penalty": -1.0}, r"penalty = -1.0, .* give 0 or more"),
        ({"lr": 0.0}, "lr = 0.0 and"),
        ({"ema": 1.0}, "ema = 1.0 are not allowed"),
    ],
)
def test_settings_of_training_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        training(**options)


def test_networks_for_two_sizes_are_refused():
    with pytest.raises(InputError, match="makes images of 16 pixels and the discriminator takes 8"):
        GanTraining(generator(), discriminator((4, 4)))


def test_other_losses_and_images_are_refused():
    for loss in (lambda: generator_loss(torch.zeros(1), "l2"), lambda: discriminator_loss(*torch.zeros(2, 1), "l2")):
        with pytest.raises(InputError, match="unknown loss of a GAN 'l2'"):
            loss()
    gan = training()
    for shape in ((2, 1, 16, 16), (2, 3, 8, 8), (3, 16, 16), (1, 3, 16, 16)):
        with pytest.raises(InputError, match=r"give \(B, 3, 16, 16\) with 2 images or more"):
            gan.step(torch.zeros(shape))
    with pytest.raises(InputError, match="count = 0 is not allowed: give 1 or more"):
        gan.sample(0)


def test_a_loss_that_is_not_finite_stops_the_training():
    gan = training(penalty=0.0)
    before = copy.deepcopy(gan.generator.state_dict())
    with pytest.raises(RunError, match="at step 1 the discriminator term is not finite: lower lr"):
        gan.step(torch.full((2, 3, 16, 16), float("nan")))
    assert torch.equal(gan.generator.start.weight, before["start.weight"])
