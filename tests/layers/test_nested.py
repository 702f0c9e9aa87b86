import pytest
import torch
from torch import nn

from exact import moved, normal, same
from vitrail.errors import InputError
from vitrail.layers.nested import (
    NestedLinear,
    its_nested_classifier,
    leading_logits,
    linear_classifier,
    nested_dims,
    nested_loss,
    nested_weights,
    truncated,
    with_embedding,
)


@pytest.mark.parametrize(
    ("width", "dims", "wanted"),
    [
        (2048, None, (8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
        (96, None, (8, 16, 32, 64, 96)),
        (8, None, (8,)),
        (5, None, (5,)),
        (9, None, (8, 9)),
        (20, [3, 7], (3, 7, 20)),
        (20, (1, 20), (1, 20)),
    ],
)
def test_the_dimensions_are_powers_of_two_or_as_given_and_the_whole(width, dims, wanted):
    assert nested_dims(width, dims) == wanted


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [(1, 3, 7), (2, 7), (7,)])
def test_each_dimension_answers_as_the_slow_loop(independent, bias, dims):
    layer = moved(NestedLinear(7, 5, dims=dims, independent=independent, bias=bias)).eval()
    x = normal(2, 7).requires_grad_()
    for level, dim in enumerate(dims):
        own = layer.smaller[level] if independent and dim < 7 else layer
        slow = torch.stack(
            [
                torch.stack([sum(own.weight[c, j] * row[j] for j in range(dim)) for c in range(5)])
                + (own.bias if bias else 0)
                for row in x
            ]
        )
        given = [x, own.weight, *([own.bias] if bias else [])]
        same(layer.logits(x, dim), slow, given)
    torch.testing.assert_close(layer(x), layer.logits(x, 7))
    assert sum(value.numel() for value in layer.parameters()) == sum(
        5 * (dim + bias) for dim in (dims if independent else (7,))
    )


def test_in_training_an_unused_classifier_gets_a_gradient_of_zero():
    layer = NestedLinear(6, 3, dims=(2, 6), independent=True)
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    layer.train()(x).sum().backward()
    assert not layer.smaller[0].weight.grad.any()
    assert layer.weight.grad.any()


def test_a_loss_is_asked_of_every_part_at_length_one():
    first, second = (normal(3, 6, seed=seed).requires_grad_() for seed in (0, 1))

    def loss(a, b):
        return (a * b).sum(1).exp().mean()

    slow = 0
    for dim, weight in ((2, 0.5), (5, 0.0), (6, 2.0)):
        cosines = []
        for a, b in zip(first, second):
            product = sum(a[j] * b[j] for j in range(dim))
            lengths = [sum(v[j] ** 2 for j in range(dim)).sqrt() for v in (a, b)]
            cosines.append((product / (lengths[0] * lengths[1])).exp())
        slow = slow + weight * sum(cosines) / 3
    ours = nested_loss(loss, first, second, dims=(2, 5), weights=(0.5, 0.0, 2.0))
    same(ours[None], slow[None], [first, second])


def test_embeddings_are_cut_and_then_scaled():
    x = normal(3, 6)
    torch.testing.assert_close(truncated(x, 4), x[:, :4] / x[:, :4].norm(dim=1, keepdim=True))
    assert truncated(x.bfloat16(), 4).dtype == torch.float32


def test_weights_are_one_each_or_as_given():
    assert nested_weights((8, 16), None) == (1.0, 1.0)
    assert nested_weights((8, 16), [0, 2]) == (0.0, 2.0)


def test_what_the_classifier_sees_is_caught_and_no_hook_stays():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    logits, embedding = with_embedding(model, model[2], x)
    torch.testing.assert_close(model[2](embedding), logits)
    torch.testing.assert_close(embedding, model[:2](x))
    model[2] = nn.Linear(5, 3)
    with pytest.raises(RuntimeError):
        with_embedding(model, model[2], x)
    assert not model[2]._forward_hooks


def test_the_one_linear_classifier_is_found():
    class Net(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def get_classifier(self):
            return self.head

    line, nested = nn.Linear(8, 2), NestedLinear(8, 2, dims=(4,), independent=True)
    assert linear_classifier(Net(line)) is line
    assert linear_classifier(Net(nn.Sequential(line, nn.Identity()))) is line
    assert linear_classifier(Net(nested)) is nested
    for head in (nn.Identity(), nn.Sequential(line, nn.Linear(2, 2)), None):
        assert linear_classifier(Net(head)) is None
    assert linear_classifier(line) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nested_dims(8, [4, 2]), r"dims = \[4, 2\] .*width, 8"),
        (lambda: nested_dims(8, [0, 2]), r"dims = \[0, 2\]"),
        (lambda: nested_dims(8, [9]), r"dims = \[9\]"),
        (lambda: nested_dims(8, [2, 2]), r"dims = \[2, 2\]"),
        (lambda: nested_dims(8, [2.5]), r"dims = \[2.5\]"),
        (lambda: nested_weights((2, 4), [1]), r"weights = \[1\] .*2, 4"),
        (lambda: nested_weights((2, 4), [0, 0]), r"weights = \[0, 0\]"),
        (lambda: nested_weights((2, 4), [1, -1]), r"weights = \[1, -1\]"),
        (lambda: NestedLinear(8, 2, dims=(4,)).logits(torch.zeros(1, 8), 5), "dim = 5 .*4, 8"),
        (lambda: nested_loss(torch.dot, torch.zeros(2, 3), torch.zeros(2, 4)), r"widths \[3, 4\]"),
        (lambda: its_nested_classifier(nn.Linear(2, 2)), "Linear is not nested: add the edit mrl"),
    ],
)
def test_what_cannot_be_nested_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_leading_columns_need_no_bias():
    layer = nn.Linear(4, 2, bias=False)
    torch.testing.assert_close(leading_logits(layer, torch.ones(1, 4), 2), layer.weight[:, :2].sum(1)[None])
