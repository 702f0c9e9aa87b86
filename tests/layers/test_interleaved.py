import itertools
import math

import pytest
import torch
from torch import nn

from exact import moved, normal, same
from vitrail.errors import InputError
from vitrail.layers.interleaved import InterleavedAttention, from_interleaved, sides, to_interleaved


def windows_of(grid, window):
    """Return the windows of a grid as lists of places; None is a place that was filled up."""
    groups = [math.ceil(size / side) for size, side in zip(grid, window)]
    found = []
    for which in itertools.product(*(range(count) for count in groups)):
        steps = itertools.product(*(range(side) for side in window))
        places = [tuple(g + k * count for g, k, count in zip(which, step, groups)) for step in steps]
        found.append([p if all(at < size for at, size in zip(p, grid)) else None for p in places])
    return found


def slow(module, x, window, front=()):
    """Attend place by place on a grid (..., C), and convolve each frame; ``front`` are tokens at no place."""
    grid, dim = x.shape[:-1], x.shape[-1]
    width = dim // module.num_heads

    def project(token):
        return module.qkv(token).split(dim)

    def attended(query, others):
        parts = []
        for head in range(module.num_heads):
            own = slice(head * width, (head + 1) * width)
            weights = torch.stack([(query[own] @ key[own] / math.sqrt(width)).exp() for _, key, _ in others])
            values = torch.stack([value[own] for *_, value in others])
            parts.append((weights / weights.sum())[:, None].mul(values).sum(0))
        return module.proj(torch.cat(parts))

    ahead = [project(token) for token in front]
    out, every = torch.zeros_like(x), list(ahead)
    for places in windows_of(grid, window):
        tokens = [project(x[p] if p is not None else torch.zeros(dim, dtype=x.dtype)) for p in places]
        every += tokens
        for place, (query, _, _) in zip(places, tokens):
            if place is not None:
                out[place] = attended(query, ahead + tokens)
    for place in itertools.product(*(range(size) for size in grid)) if module.conv is not None else ():
        *frame, row, column = place
        total = module.conv.bias
        for r, c in itertools.product(range(row - 1, row + 2), range(column - 1, column + 2)):
            if 0 <= r < grid[-2] and 0 <= c < grid[-1]:
                total = total + module.conv.weight[:, 0, r - row + 1, c - column + 1] * x[(*frame, r, c)]
        out[place] = out[place] + total
    return torch.stack([attended(query, every) for query, _, _ in ahead]) if len(front) else None, out


@pytest.mark.parametrize(
    ("grid", "window", "real"),
    [
        ((4, 6), 2, (2, 2)),
        ((3, 5), 2, (2, 2)),
        ((2, 3), 4, (2, 3)),
        ((2, 3, 5), 2, (2, 2, 2)),
        ((3, 4, 2), (2, 3, None), (2, 3, 2)),
    ],
)
def test_windows_are_the_slow_loops_and_come_together_again(grid, window, real):
    x = normal(2, *grid, 3)
    windows = to_interleaved(x, window)
    assert sides(window, grid) == real
    wanted = torch.stack(
        [
            torch.stack([image[p] if p is not None else torch.zeros(3, dtype=x.dtype) for p in places])
            for image in x
            for places in windows_of(grid, real)
        ]
    )
    assert torch.equal(windows, wanted)
    assert torch.equal(from_interleaved(windows, grid, window), x)


def test_a_window_of_whole_times_has_all_of_them():
    assert sides(7, (16, 56, 56)) == (16, 7, 7)
    assert sides((None, 7), (5, 3)) == (5, 3)


@pytest.mark.parametrize(
    ("grid", "window", "conv"),
    [((3, 5), 2, True), ((4, 2), 2, False), ((2, 3), 7, True), ((2, 3, 2), (1, 2, None), True)],
)
def test_it_is_the_slow_loop(grid, window, conv):
    torch.manual_seed(0)
    module = moved(InterleavedAttention(4, 2, window, conv=conv))
    x = normal(2, *grid, 4).requires_grad_()
    theirs = torch.stack([slow(module, image, sides(window, grid))[1] for image in x])
    same(module(x), theirs, [x, *module.parameters()])
    tokens = moved(InterleavedAttention(4, 2, window, conv=conv, grid=grid))
    tokens.load_state_dict(module.state_dict())
    torch.testing.assert_close(tokens(x.flatten(1, -2)), theirs.flatten(1, -2))


def test_tokens_at_no_place_attend_to_all_and_are_in_every_window():
    torch.manual_seed(0)
    module = moved(InterleavedAttention(4, 2, 2, grid=(3, 4), prefix=2))
    x = normal(2, 14, 4).requires_grad_()
    theirs = []
    for image in x:
        front, places = slow(module, image[2:].unflatten(0, (3, 4)), (2, 2), front=image[:2])
        theirs.append(torch.cat((front, places.flatten(0, 1))))
    same(module(x), torch.stack(theirs), [x, *module.parameters()])
    assert torch.equal(module.eval()(x[:, 2:].unflatten(1, (3, 4))).isfinite().all(), torch.tensor(True))


def test_queries_and_keys_may_be_normed_and_weights_dropped():
    module = moved(InterleavedAttention(4, 1, 2, conv=False, attn_drop=0.5, proj_drop=0.0))
    x = normal(1, 2, 2, 4)
    module.eval()
    plain = module(x)
    assert torch.equal(module(x), plain)
    assert not torch.equal(module.train()(x), plain)
    module.eval().q_norm = nn.LayerNorm(4, elementwise_affine=False)
    once = module(x)
    assert not torch.allclose(once, plain)
    module.k_norm = nn.LayerNorm(4, elementwise_affine=False)
    assert not torch.allclose(module(x), once)
    qkv = module.qkv(x.flatten(1, 2))
    query, key = (nn.functional.layer_norm(part, (4,)) for part in qkv.split(4, -1)[:2])
    weights = (query @ key.mT / 2).softmax(-1)
    torch.testing.assert_close(module(x).flatten(1, 2), module.proj(weights @ qkv[..., 8:]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InterleavedAttention(6, 4), "num_heads = 4 does not divide a width of 6"),
        (lambda: InterleavedAttention(6, 0), "num_heads = 0 "),
        (lambda: InterleavedAttention(4, 1, 0), "window of 0 does not suit .*one number from 1"),
        (lambda: InterleavedAttention(4, 1, (2, 2), grid=(2, 2, 2)), r"window of \(2, 2\) .*3 axes"),
        (lambda: InterleavedAttention(4, 1, (0, 2))(torch.zeros(1, 2, 2, 4)), "window of "),
        (lambda: InterleavedAttention(4, 1)(torch.zeros(1, 6, 4)), r"6 tokens came .*0 \+ a square"),
        (lambda: InterleavedAttention(4, 1, prefix=1)(torch.zeros(1, 1, 4)), r"1 tokens came .*1 \+ a square"),
        (lambda: InterleavedAttention(4, 1, grid=(2, 3))(torch.zeros(1, 7, 4)), r"7 tokens came .*\(2, 3\)"),
        (lambda: InterleavedAttention(4, 1)(torch.zeros(1, 4, 4), torch.zeros(4, 4)), "takes no attention mask"),
        (lambda: InterleavedAttention(4, 1)(torch.zeros(1, 4, 4), is_causal=True), "takes no attention mask"),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
