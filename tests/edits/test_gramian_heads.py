import math

import pytest
import timm
import torch
from torch import nn

from exact import moved, normal, same
from vitrail.edits.gramian_heads import ClassAttention, GramianHead, GramianHeads, GroupedMlp, gramian, gramian_heads
from vitrail.errors import InputError
from vitrail.models import create_model


def slow_gramian(x):
    """Take the products of all pairs of channels of (g, L), row by row of the upper triangle."""
    pairs = [sum(x[i] * x[j]) for i in range(len(x)) for j in range(i, len(x))]
    found = torch.stack(pairs)
    return found / found.square().sum().sqrt()


def norm_of(layer, x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def slow_head(head, x):
    """Classify maps (B, C, H, W) place by place, in evaluation mode."""

    def batch_norm(layer, value):
        return (value - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias

    logits = []
    for places in x.flatten(2).transpose(1, 2):  # (L, C)
        conv, norm = head.contraction
        few = torch.stack([batch_norm(norm, conv.weight[:, :, 0, 0] @ place + conv.bias) for place in places])
        pairs = slow_gramian(few.T)
        conv, norm = head.embedding
        size = len(pairs) // conv.groups
        rows = conv.weight[:, :, 0, 0].split(len(conv.weight) // conv.groups)
        parts = [rows[g] @ pairs[g * size : (g + 1) * size] for g in range(conv.groups)]
        token = batch_norm(norm, torch.cat(parts) + conv.bias)
        tokens = [norm_of(head.norm1, each) for each in (token, *places)]
        layer = head.attn
        width = layer.q.out_features // layer.num_heads
        seen = []
        for n in range(layer.num_heads):
            own = slice(n * width, (n + 1) * width)
            query = layer.q.weight[own] @ tokens[0]
            weights = torch.stack([(query @ (layer.k.weight[own] @ t) / math.sqrt(width)).exp() for t in tokens])
            seen.append(sum(w * (layer.v.weight[own] @ t) for w, t in zip(weights / weights.sum(), tokens)))
        token = token + head.gamma_1 * (layer.proj.weight @ torch.cat(seen) + layer.proj.bias)
        token = token + head.gamma_2 * slow_mlp(head.mlp, norm_of(head.norm2, token))
        logits.append(head.fc.weight @ token + head.fc.bias)
    return torch.stack(logits)


def slow_mlp(mlp, x):
    groups = mlp.groups
    parts = zip(mlp.fc1.weight[..., 0].chunk(groups), x.chunk(groups))
    hidden = torch.cat([weight @ part for weight, part in parts]) + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    each = len(hidden) // groups  # channels are taken as (each, groups), and go on as (groups, each)
    mixed = torch.stack([hidden[(i % each) * groups + i // each] for i in range(len(hidden))])
    parts = zip(mlp.fc2.weight[..., 0].chunk(groups), mixed.chunk(groups))
    return torch.cat([weight @ part for weight, part in parts]) + mlp.fc2.bias


@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 3, 1), (4, 1, 2)])
def test_the_gramian_is_the_slow_loop(shape):
    x = normal(2, *shape).requires_grad_()
    same(gramian(x), torch.stack([slow_gramian(image.flatten(1)) for image in x]), [x])


def test_the_gramian_of_half_precision_is_in_single():
    assert gramian(torch.ones(1, 2, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("gram_dim", "width", "groups", "mlp_groups", "grid"), [(3, 4, 2, 2, (2, 3)), (4, 8, 1, 4, (1, 5))]
)
def test_a_head_is_the_slow_loop(gram_dim, width, groups, mlp_groups, grid):
    torch.manual_seed(0)
    head = moved(GramianHead(8, 3, gram_dim=gram_dim, width=width, groups=groups, mlp_groups=mlp_groups)).eval()
    x = normal(2, 8, *grid).requires_grad_()
    same(head(x), slow_head(head, x), [x, *head.parameters()])


def test_the_answer_is_the_mean_of_the_heads_and_each_can_be_had():
    heads = moved(GramianHeads(8, 3, heads=3, gram_dim=4)).eval()
    x = normal(2, 8, 2, 3)
    each = torch.stack([head(x) for head in heads.heads], 1)
    torch.testing.assert_close(heads(x), each.mean(1))
    heads.apart = True
    torch.testing.assert_close(heads(x), each)
    torch.testing.assert_close(heads(x.movedim(1, -1)), each)
    heads.prefix = 1
    tokens = torch.cat((normal(2, 1, 8), x.flatten(2).transpose(1, 2)), 1)
    torch.testing.assert_close(heads(tokens), each)


def test_it_begins_as_published():
    torch.manual_seed(0)
    head = GramianHeads(64, 100, heads=1, gram_dim=16).heads[0]
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()
    assert torch.equal(head.gamma_1, torch.full((64,), 1e-4))
    assert torch.equal(head.gamma_2, head.gamma_1)
    assert (head.embedding[0].groups, head.mlp.groups, head.attn.num_heads) == (8, 4, 8)
    assert head.attn.q.out_features == 16


@pytest.mark.parametrize(
    ("name", "options", "path"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, "head"),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, "head.fc"),
        ("swin_nano", {}, "head.fc"),
        ("small_resnet_nano", {}, None),
    ],
)
def test_a_backbone_gets_heads_in_the_place_of_its_classifier(name, options, path):
    torch.manual_seed(0)
    model = gramian_heads(heads=2, gram_dim=4)(create_model(name, num_classes=7, **options)).eval()
    heads = model.get_classifier()
    assert isinstance(heads, GramianHeads)
    assert path is None or model.get_submodule(path) is heads
    assert model.num_classes == 7
    x = torch.randn(2, 3, 32, 32)
    logits = model(x)
    assert logits.shape == (2, 7)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), logits)


def test_places_reach_the_answer_and_the_class_token_does_not():
    model = (
        gramian_heads(heads=1, gram_dim=4)(
            timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
        )
        .double()
        .eval()
    )
    tokens = normal(1, 5, 192).requires_grad_()
    (slope,) = torch.autograd.grad(model.forward_head(tokens).sum(), tokens)
    assert slope.abs().sum(-1).gt(0).tolist() == [[False, True, True, True, True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gramian_heads(heads=0), "heads = 0 .*whole number from 1"),
        (lambda: gramian_heads(gram_dim=2.5), "gram_dim = 2.5"),
        (lambda: gramian_heads(gram_dim=0), "gram_dim = 0"),
        (lambda: GramianHeads(8, 2, width=12), "width = 12 .*multiple of 8"),
        (lambda: GramianHeads(8, 2, gram_dim=4, groups=3), "groups = 3 .*10 pairs"),
        (lambda: GramianHeads(8, 2, gram_dim=4, mlp_groups=3), "mlp_groups = 3"),
        (lambda: gramian_heads()(nn.Sequential(nn.Softsign())), "no classifier in Sequential; .*Softsign"),
        (lambda: gramian_heads()(create_model("swin_nano", num_classes=0)), "no classifier in Swin"),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_attention_and_feed_forward_take_what_they_say():
    attention = ClassAttention(8, 4, 2)
    assert attention(torch.zeros(2, 5, 8)).shape == (2, 1, 8)
    assert attention.proj.bias is not None
    assert attention.q.bias is attention.k.bias is attention.v.bias is None
    assert GroupedMlp(8, 4)(torch.zeros(2, 1, 8)).shape == (2, 1, 8)
