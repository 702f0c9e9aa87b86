import numpy as np
import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.recursion import NonlinearProjection, in_groups


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("count", "groups", "sizes"), [(6, 2, (3, 3)), (7, 3, (3, 2, 2)), (3, 5, (1, 1, 1)), (5, 1, (5,))]
)
def test_tokens_meet_inside_their_group_alone(count, groups, sizes):
    x = normal(2, count, 3).requires_grad_()
    met = []

    def attend(tokens):
        met.append(tokens.shape)
        return tokens * tokens.sum(1, keepdim=True)

    slow, start = [], 0
    for size in sizes:
        group = x[:, start : start + size]
        slow.append(torch.stack([group[:, i] * sum(group[:, j] for j in range(size)) for i in range(size)], 1))
        start += size
    ours, theirs = in_groups(attend, x, groups), torch.cat(slow, 1)
    assert len(met) == len(set(sizes))  # groups of one size go together
    torch.testing.assert_close(ours, theirs)
    weight = normal(*ours.shape)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x, retain_graph=True) for y in (ours, theirs)))


def test_shuffled_tokens_come_back_to_their_places():
    x = normal(2, 7, 3).requires_grad_()
    places = in_groups(lambda tokens: tokens, x, 3, shuffled=True, training=True)
    assert torch.equal(places, x)
    weight = normal(2, 7, 3)
    assert torch.equal(torch.autograd.grad((places * weight).sum(), x)[0], weight)


def test_the_order_is_drawn_anew_in_training_alone():
    def partners(**options):
        """Return who is in one group with whom."""
        return in_groups(lambda t: t.sum(1, keepdim=True).expand_as(t), torch.eye(12)[None], 3, **options)

    torch.manual_seed(0)
    first, second = (partners(shuffled=True, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(partners(shuffled=True, training=True), first)
    for found in (first, second):
        assert (found.sum(1) == 4).all()
        assert torch.equal(found, found.transpose(1, 2))
        assert found.diagonal(dim1=1, dim2=2).all()
    fixed = partners(shuffled=True)
    assert torch.equal(partners(shuffled=True), fixed)
    order = np.random.default_rng(0).permutation(12)
    for group in order.reshape(3, 4):
        assert fixed[0][np.ix_(group, group)].all()
    near = partners(training=True)[0]
    assert torch.equal(near, torch.block_diag(*[torch.ones(4, 4)] * 3))


def test_a_projection_weighs_what_it_adds():
    layer = NonlinearProjection(6, 1.5).double()
    assert layer.residual.tolist() == [1, 1]
    assert layer.mlp.fc1.out_features == 9
    with torch.no_grad():
        layer.residual.copy_(torch.tensor([0.5, 2.0]))
    x = 0.01 * normal(2, 3, 6)  # small values, so that the epsilon counts
    centred = x - x.mean(-1, keepdim=True)
    norm = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    hidden = norm @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(layer(x), 0.5 * x + 2 * (hidden @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias))
    assert isinstance(layer.mlp.act, nn.GELU)
    with pytest.raises(InputError, match=r"projection_ratio = 0\.1 leaves no hidden channel of 6"):
        NonlinearProjection(6, 0.1)
