import pytest
import torch

from exact import normal, same
from vitrail.errors import InputError
from vitrail.layers.large_output import large_loss, sampled_loss, sharded_loss

FORMS = ("softmax", "sigmoid")


def layer(count=7, width=3, images=2, bias=True):
    x, weight = (
        normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(((images, width), (count, width)))
    )
    return x, weight, normal(count, seed=2).requires_grad_() if bias else None


def targets(dtype=torch.float64):
    """Two images: one of two classes, one of a single class, padded by it."""
    return torch.tensor([[6, 1], [3, 3]]), torch.tensor([[0.7, 0.2], [0.9, 0.0]], dtype=dtype)


def slow(x, weight, bias, places, shares, form):
    """Add up over classes."""
    losses = []
    for i, row in enumerate(x):
        logits = [row @ weight[j] + (0 if bias is None else bias[j]) for j in range(len(weight))]
        total = 0
        for j, logit in enumerate(logits):
            z = sum(shares[i, k] for k in range(places.shape[1]) if places[i, k] == j)
            if form == "sigmoid":
                yes = torch.sigmoid(logit)
                total = total - z * yes.log() - (1 - z) * (1 - yes).log()
            else:
                total = total - z * (logit.exp() / sum(other.exp() for other in logits)).log()
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_shards_are_the_slow_loop(form, bias, size):
    x, weight, offset = layer(bias=bias)
    given = [value for value in (x, weight, offset) if value is not None]
    ours = sharded_loss(x, weight, offset, *targets(), size=size, form=form)
    same(ours, slow(x, weight, offset, *targets(), form), given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 5, 1)])
def test_parts_are_the_slow_loop_and_are_computed_again(form, sizes):
    x, weight, bias = layer()
    calls = []

    def part(start, size):
        def logits():
            calls.append(start)
            return x @ weight[start : start + size].T + bias[start : start + size]

        return logits

    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ours = large_loss([part(*pair) for pair in zip(starts, sizes)], sizes, *targets(), form=form)
    same(ours, slow(x, weight, bias, *targets(), form), [x, weight, bias])
    assert len(calls) == (1 if len(sizes) == 1 else 2 * len(sizes))


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_of_every_class_once_is_the_whole(form):
    x, weight, bias = layer()
    ours = sampled_loss(x, weight, bias, *targets(), samples=7, form=form, drawn=torch.arange(7))
    same(ours, slow(x, weight, bias, *targets(), form), [x, weight, bias])
    bare = sampled_loss(x, weight, None, *targets(), samples=7, form=form, drawn=torch.arange(7))
    same(bare, slow(x, weight, None, *targets(), form), [x, weight])


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_over_all_samples_is_the_whole(form):
    """Of every pair of classes that can be drawn: the loss of sigmoids, and the partition function of the softmax."""
    x, weight, bias = layer(count=5)
    places, shares = torch.tensor([[4, 1], [3, 3]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)

    def value(loss):
        dot = ((x[:, None] * weight[places]).sum(-1) + bias[places]).mul(shares).sum(1)
        return loss if form == "sigmoid" else (loss + dot).exp()

    pairs = [(a, b) for a in range(5) for b in range(5)]
    found = [
        value(sampled_loss(x, weight, bias, places, shares, samples=2, form=form, drawn=torch.tensor(pair)))
        for pair in pairs
    ]
    same(sum(found) / len(pairs), value(slow(x, weight, bias, places, shares, form)), [x, weight, bias])


def test_samples_are_drawn_evenly_and_anew():
    x, weight, bias = layer(count=500)
    one, other = (sampled_loss(x, weight, bias, *targets(), samples=20) for _ in range(2))
    assert not torch.equal(one, other)
    drawn = torch.autograd.grad(sampled_loss(x, weight, bias, *targets(), samples=50).sum(), weight)[0].any(1)
    assert 30 < int(drawn.sum()) <= 53


def test_under_autocast_the_loss_is_in_single_precision():
    x, weight, bias = (value.detach().float().requires_grad_() for value in layer())
    places, shares = targets(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sharded = sharded_loss(x.bfloat16(), weight, bias, places, shares, size=3)
        sampled = sampled_loss(x.bfloat16(), weight, bias, places, shares, samples=4)
        whole = large_loss([lambda: torch.nn.functional.linear(x, weight, bias)], [7], places, shares)
    assert sharded.dtype == sampled.dtype == whole.dtype == torch.float32
    torch.testing.assert_close(sharded, whole, rtol=0.05, atol=0.05)
    (sharded.sum() + sampled.sum()).backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharded_loss(*layer(), *targets(), size=0), "shards of 0"),
        (lambda: sharded_loss(*layer(), *targets(), size=1, form="hinge"), "form = 'hinge'"),
        (lambda: sampled_loss(*layer(), *targets(), samples=0), "samples = 0"),
        (lambda: sampled_loss(*layer(), *targets(), samples=1, form="hinge"), "form = 'hinge'"),
        (lambda: large_loss([], [], *targets(), form="hinge"), "form = 'hinge'"),
    ],
)
def test_what_cannot_be_computed_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
