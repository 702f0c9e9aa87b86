import pytest
import torch
from torch import nn

from exact import moved, normal, same
from vitrail.edits.structural_head import StructuralHead, structural_head
from vitrail.errors import InputError
from vitrail.layers.large_output import large_loss
from vitrail.models import create_model

GROUPS = [[4, 0], [1, 3, 2]]


def slow(head, x):
    """Follow every image to every class."""
    rows = []
    for image in x:
        logits = [None] * 5
        for v, group in enumerate(GROUPS):
            first = head.first[v if len(head.first) > 1 else 0]
            hidden = (first.weight @ image + first.bias).clamp_min(0)
            units = []
            if head.common is not None:
                units += list((head.common.weight @ hidden + head.common.bias).clamp_min(0))
            if len(head.second):
                units += list((head.second[v].weight @ hidden + head.second[v].bias).clamp_min(0))
            out = [
                sum(w * u for w, u in zip(head.out[v].weight[k], units)) + head.out[v].bias[k]
                for k in range(len(group))
            ]
            if head.pace != "none":
                length = sum(value**2 for value in out) ** 0.5
                number = [v, v, v] if head.pace == "group" else [2 * v, 2 * v + 1, 2 * v + 2]
                out = [head.factor[number[k]] * value / length for k, value in enumerate(out)]
            for label, value in zip(group, out):
                logits[label] = value
        rows.append(torch.stack(logits))
    return torch.stack(rows)


@pytest.mark.parametrize("pace", ["group", "class", "none"])
@pytest.mark.parametrize(("shared", "first"), [(0, "shared"), (0, "own"), (1, "shared"), (3, "shared")])
def test_the_head_is_the_slow_loop(pace, shared, first):
    torch.manual_seed(0)
    head = moved(StructuralHead(4, GROUPS, s1=5, s2=3, shared=shared, first=first, pace=pace))
    x = normal(2, 4).requires_grad_()
    same(head(x), slow(head, x), [x, *head.parameters()])


@pytest.mark.parametrize(
    ("shared", "first", "count"),
    [
        (512, "shared", lambda b, s1, s2, m, n: b * s1 + s1 * s2 + s2 * n),
        (0, "shared", lambda b, s1, s2, m, n: b * s1 + s1 * s2 * m + s2 * n),
        (0, "own", lambda b, s1, s2, m, n: (b * s1 + s1 * s2) * m + s2 * n),
        (128, "shared", lambda b, s1, s2, m, n: b * s1 + s1 * 128 + s1 * (s2 - 128) * m + s2 * n),
    ],
)
def test_the_weights_are_as_many_as_published(shared, first, count):
    with torch.device("meta"):
        groups = [list(range(v * 5000, (v + 1) * 5000)) for v in range(20)]
        head = StructuralHead(1024, groups, s1=4096, s2=512, shared=shared, first=first, pace="none")
    weights = sum(value.numel() for value in head.parameters() if value.ndim > 1)
    assert weights == count(1024, 4096, 512, 20, 100_000)


@pytest.mark.parametrize(("pace", "count"), [("group", 2), ("class", 5)])
def test_factors_begin_at_the_root_of_a_groups_size(pace, count):
    torch.manual_seed(0)
    factor = StructuralHead(4, GROUPS, s1=5, s2=3, pace=pace).factor.detach()
    wanted = torch.tensor([2**0.5, 3**0.5] if count == 2 else [2**0.5] * 2 + [3**0.5] * 3)
    assert factor.shape == (count,)
    assert 0 < float((factor - wanted).abs().max()) < 5e-3


def test_groups_are_parts_of_a_loss():
    head = moved(StructuralHead(4, GROUPS, s1=5, s2=3))
    x = normal(2, 4).requires_grad_()
    places, shares = torch.tensor([[2, 4], [0, 1]]), torch.tensor([[0.5, 0.3], [0.9, 0.0]], dtype=torch.float64)
    for form in ("softmax", "sigmoid"):
        logits = head(x)
        whole = large_loss([lambda logits=logits: logits], [5], places, shares, form=form)
        parts = large_loss(head.parts(x), [2, 3], head.place[places], shares, form=form)
        same(parts, whole, [x, *head.parameters()])


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [
        ("small_resnet_nano", {}, 128),
        ("mobilenetv2_035", {}, 1280),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, 320),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 192),
        ("swin_nano", {}, 128),
    ],
)
def test_any_linear_classifier_gives_way(name, options, width):
    model = create_model(name, num_classes=5, **options).eval()
    assert structural_head(groups=GROUPS, s1=8)(model) is model
    head = model.get_classifier()
    assert isinstance(head, StructuralHead)
    assert not head.training
    assert head.first[0].weight.shape == (8, width)
    assert head.out[0].weight.shape == (2, width // 2)
    x = torch.randn(2, 3, 32, 32)
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), head(embedding))


def test_defaults_grow_with_the_features():
    model = structural_head()(create_model("small_resnet_nano", num_classes=5).bfloat16())
    assert model.fc.first[0].out_features == 512
    assert [layer.in_features for layer in model.fc.out] == [64, 64]
    assert model.fc.groups == [[0, 1], [2, 3, 4]]
    assert model.fc.factor.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: structural_head(s1=0), "s1 = 0 .*from 1"),
        (lambda: structural_head(s2=1.5), "s2 = 1.5"),
        (lambda: structural_head(shared=-1), "shared = -1 .*from 0"),
        (lambda: structural_head(first="none"), "first = 'none' .*shared, own"),
        (lambda: structural_head(pace="fast"), "pace = 'fast' .*group, class, none"),
        (lambda: structural_head(first="own", shared=2), "leave one out"),
        (lambda: StructuralHead(4, GROUPS, s1=5, s2=3, shared=4), "shared = 4 .*at most s2 = 3"),
        (lambda: StructuralHead(4, [[0], [1, 2]], s1=5, s2=3), "group of one class"),
        (lambda: structural_head(groups=9)(create_model("small_resnet_nano", num_classes=5)), "groups = 9"),
        (lambda: structural_head()(create_model("small_resnet_nano", num_classes=0)), "no single linear"),
        (lambda: structural_head()(nn.Sequential(nn.Softsign())), "no single linear .*Softsign"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
