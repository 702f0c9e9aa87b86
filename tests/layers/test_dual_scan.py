import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.errors import InputError
from vitrail.layers.scan import dual_scan, dual_step, selective_scan


def inputs(batch, length, heads, width, groups, size, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    values = {
        "x": draw(batch, length, heads, width),
        "delta": draw(batch, length, heads).abs(),
        "A": -draw(heads).exp(),
        "B": draw(batch, length, groups, size),
        "C": draw(batch, length, groups, size),
        "D": draw(heads),
        "state": draw(batch, heads, width, size),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def by_the_paper(x, delta, A, B, C, D, state):
    """A head at a time, a step at a time: h = exp(delta A) h + delta x B^T, y = h C + D x."""
    batch, length, heads, _ = x.shape
    images, ends = [], []
    for image in range(batch):
        rows, last = [], []
        for head in range(heads):
            group = head // (heads // B.shape[2])
            h, steps = state[image, head], []
            for step in range(length):
                now, value = delta[image, step, head], x[image, step, head]
                h = torch.exp(now * A[head]) * h + now * torch.outer(value, B[image, step, group])
                steps.append(h @ C[image, step, group] + D[head] * value)
            rows.append(torch.stack(steps))
            last.append(h)
        images.append(torch.stack(rows, 1))
        ends.append(torch.stack(last))
    return torch.stack(images), torch.stack(ends)


def values_and_gradients(function, given):
    for value in given.values():
        value.grad = None
    y, last = function(**given)
    generator = torch.Generator().manual_seed(1)
    loss = sum((part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in (y, last))
    loss.backward()
    return [y.detach(), last.detach(), *(value.grad for value in given.values())]


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 7, 4, 3, 2, 5), (1, 12, 3, 2, 3, 4)], ids=str)
def test_it_is_the_papers_recurrence_with_its_gradients(shape, chunk):
    given = inputs(*shape)
    found = values_and_gradients(lambda **values: dual_scan(**values, chunk=chunk), given)
    for ours, theirs in zip(found, values_and_gradients(by_the_paper, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@settings(max_examples=20)
@given(
    st.integers(1, 2), st.integers(1, 40), st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 50)
)
def test_any_shape_and_chunk(batch, length, groups, width, size, chunk):
    given = {name: value.detach() for name, value in inputs(batch, length, 2 * groups, width, groups, size).items()}
    for ours, theirs in zip(dual_scan(**given, chunk=chunk), by_the_paper(**given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_it_is_the_selective_scan_with_one_decay_for_all_states_of_a_head():
    given = {name: value.detach() for name, value in inputs(2, 300, 4, 3, 2, 8).items()}
    y, last = dual_scan(**given)
    channels = {
        "u": given["x"].flatten(2).transpose(1, 2),
        "delta": given["delta"].repeat_interleave(3, 2).transpose(1, 2),
        "A": given["A"].repeat_interleave(3)[:, None].expand(-1, 8),
        "B": given["B"].permute(0, 2, 3, 1),
        "C": given["C"].permute(0, 2, 3, 1),
        "D": given["D"].repeat_interleave(3),
        "state": given["state"].flatten(1, 2),
    }
    expected, end = selective_scan(**channels)
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), expected)
    torch.testing.assert_close(last.flatten(1, 2), end)


def test_a_stream_of_steps_is_the_scan():
    given = {name: value.detach() for name, value in inputs(2, 20, 4, 3, 2, 5).items()}
    whole, last = dual_scan(**given, chunk=8)
    state, steps = given["state"], []
    for step in range(20):
        now = {name: given[name][:, step] for name in ("x", "delta", "B", "C")}
        y, state = dual_step(**now, A=given["A"], D=given["D"], state=state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    torch.testing.assert_close(state, last)


def test_long_sequences_and_fast_decays_stay_finite():
    given = inputs(1, 16384, 2, 2, 1, 4, dtype=torch.float32)
    given["A"] = torch.tensor([-1e4, -1e-7], requires_grad=True)
    found = values_and_gradients(dual_scan, given)
    assert all(bool(value.isfinite().all()) for value in found)
    exact = dual_scan(**{name: value.detach().double() for name, value in given.items()})[0]
    assert float((found[0] - exact).abs().max()) < 1e-3 * float(exact.abs().max())


def test_half_precision_keeps_its_states_in_float32():
    given = {name: value.detach() for name, value in inputs(1, 100, 2, 3, 1, 4, dtype=torch.float32).items()}
    low = {name: value.bfloat16() if name in ("x", "delta", "B", "C") else value for name, value in given.items()}
    y, last = dual_scan(**low)
    exact, _ = dual_scan(**{name: value.float() for name, value in low.items()})
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, exact.bfloat16())


def test_state_and_skip_may_be_left_out():
    given = {name: value.detach() for name, value in inputs(1, 9, 2, 3, 1, 4).items()}
    zero = {**given, "D": torch.zeros(2), "state": torch.zeros(1, 2, 3, 4)}
    y, _ = dual_scan(*(given[name] for name in ("x", "delta", "A", "B", "C")))
    torch.testing.assert_close(y, by_the_paper(**zero)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 9, 2)}, "must be (B, L, H, P)"),
        ({"delta": torch.zeros(1, 9, 3)}, "delta (1, 9, 3)"),
        ({"A": torch.zeros(2, 4)}, "A (2, 4) must be (H,)"),
        ({"B": torch.zeros(1, 9, 1, 5)}, "must be (1, 9, G, N)"),
        ({name: torch.zeros(1, 9, 3, 4) for name in ("B", "C")}, "divides 2"),
        ({"state": torch.zeros(1, 2, 4, 3)}, "state (1, 2, 4, 3)"),
        ({"chunk": 0}, "chunk = 0"),
    ],
)
def test_wrong_shapes_are_explained(change, words):
    given = {name: value.detach() for name, value in inputs(1, 9, 2, 3, 1, 4).items()}
    with pytest.raises(InputError) as raised:
        dual_scan(**{**given, **change})
    assert words in str(raised.value)
