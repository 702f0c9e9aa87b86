import math

import pytest
import torch

from vitrail.errors import InputError
from vitrail.layers import mamba2
from vitrail.layers.mamba2 import RATES, GatedRMSNorm, Mamba2

SHAPES = [
    {"dim": 4, "states": 3, "head_dim": 2},
    {"dim": 6, "states": 2, "head_dim": 3, "groups": 2, "width": 3},
    {"dim": 4, "states": 1, "head_dim": 4, "groups": 1, "width": 1, "expand": 3, "step_limits": (0.05, 0.6)},
]


def moved(module):
    """Return it in double precision, with all that starts at zero or one moved."""
    generator = torch.Generator().manual_seed(3)
    module = module.double()
    with torch.no_grad():
        for value in module.parameters():
            value += 0.5 * torch.randn(value.shape, dtype=torch.float64, generator=generator)
    return module


def made(**options):
    torch.manual_seed(0)
    return moved(Mamba2(**options))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def silu(x):
    return x / (1 + torch.exp(-x))


def slow(layer, x, groups=1, width=4, step_limits=(0.0, math.inf), expand=2, states=1, head_dim=1):
    """Mix the places of one sequence (L, C), a place, a head and a channel at a time."""
    length, inner = len(x), expand * x.shape[1]
    heads, shared = inner // head_dim, groups * states
    projected = x @ layer.in_proj.weight.T
    gate = projected[:, :inner]
    convolved = projected[:, inner : 2 * inner + 2 * shared]
    steps = torch.log1p(torch.exp(projected[:, 2 * inner + 2 * shared :] + layer.dt_bias))
    steps = steps.clamp(*step_limits)
    rows = []
    for place in range(length):
        back = [(width - 1 - k, place - k) for k in range(width) if place - k >= 0]
        row = sum(layer.conv1d.weight[:, 0, tap] * convolved[other] for tap, other in back)
        rows.append(silu(row + layer.conv1d.bias))
    u = torch.stack(rows)
    outputs = []
    h = [torch.zeros(head_dim, states, dtype=x.dtype) for _ in range(heads)]
    for place in range(length):
        y = []
        for head in range(heads):
            group = head // (heads // groups)
            value = u[place, head * head_dim : (head + 1) * head_dim]
            enter = u[place, inner + group * states : inner + (group + 1) * states]
            leave = u[place, inner + shared + group * states : inner + shared + (group + 1) * states]
            step = steps[place, head]
            h[head] = torch.exp(-step * torch.exp(layer.A_log[head])) * h[head] + step * torch.outer(value, enter)
            y.append(h[head] @ leave + layer.D[head] * value)
        outputs.append(torch.cat(y))
    gated = torch.stack(outputs) * silu(gate)
    size = inner // groups
    parts = [gated[:, at : at + size] for at in range(0, inner, size)]
    parts = [part / torch.sqrt((part**2).mean(1, keepdim=True) + 1e-5) for part in parts]
    return (torch.cat(parts, 1) * layer.norm.weight) @ layer.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_it_is_the_slow_loop_with_its_gradients(options, length):
    layer = made(**options, chunk=3)
    x = normal(2, length, options["dim"]).requires_grad_()
    ours = layer(x)
    own = {key: value for key, value in options.items() if key != "dim"}
    theirs = torch.stack([slow(layer, sequence, **own) for sequence in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    given, weight = [x, *layer.parameters()], normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("parts", [(1,) * 11, (11,), (4, 7), (5, 1, 5), (1, 2, 8)], ids=str)
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_a_stream_is_the_whole_and_its_memory_does_not_grow(options, parts):
    layer = made(**options, chunk=4)
    x = normal(2, 11, options["dim"], seed=1)
    found, memory, sizes = [], None, set()
    for part in x.split(parts, 1):
        y, memory = layer.stream(part, memory)
        found.append(y)
        sizes.add((memory.places.shape, memory.state.shape))
    torch.testing.assert_close(torch.cat(found, 1), layer(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(memory.state, layer.stream(x)[1].state, rtol=1e-10, atol=1e-10)
    inner = options.get("expand", 2) * options["dim"]
    both = inner + 2 * options.get("groups", 1) * options["states"]
    states = (2, inner // options["head_dim"], options["head_dim"], options["states"])
    assert sizes == {((2, both, options.get("width", 4) - 1), states)}


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 64])
def test_chunks_change_nothing(chunk):
    x = normal(1, 12, 4)
    torch.testing.assert_close(made(**SHAPES[0], chunk=chunk)(x), made(**SHAPES[0])(x), rtol=1e-10, atol=1e-10)


def test_one_place_of_a_stream_is_one_step():
    layer = made(**SHAPES[0])
    _, memory = layer.stream(normal(1, 3, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba2, "dual_scan", None)  # makes the products of a whole chunk
        layer.stream(normal(1, 1, 4), memory)


def test_no_place_feels_a_later_one():
    layer = made(**SHAPES[1])
    x = normal(1, 6, 6).requires_grad_()
    for place in range(6):
        (grad,) = torch.autograd.grad(layer(x)[0, place].sum(), x)
        felt = grad[0].abs().sum(1) > 0
        assert felt.tolist() == [True] * (place + 1) + [False] * (5 - place)


def test_it_begins_as_published():
    torch.manual_seed(0)
    layer = Mamba2(256, states=64, head_dim=1)
    steps = torch.nn.functional.softplus(layer.dt_bias.detach())
    assert 1e-3 <= steps.min() < 1.2e-3
    assert 0.09 < steps.max() <= 0.1001
    assert float(steps.log().mean()) == pytest.approx(math.log(1e-2), abs=0.15)  # even in the logarithm
    decay = layer.A_log.detach().exp()
    assert RATES == (1, 16)
    assert 1 <= decay.min() < 1.2
    assert 15.8 < decay.max() <= 16
    assert float(decay.mean()) == pytest.approx(8.5, abs=0.5)
    assert torch.equal(layer.D.detach(), torch.ones(512))
    assert torch.equal(layer.norm.weight.detach(), torch.ones(512))
    for weight, inputs in ((layer.in_proj.weight, 256), (layer.out_proj.weight, 512), (layer.conv1d.weight, 4)):
        assert float(weight.detach().abs().max()) == pytest.approx(inputs**-0.5, rel=0.01)


def test_parameters_are_those_of_published_checkpoints():
    # mamba2-130m: dim 768, 24 heads of 64, 128 states
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Mamba2(768).named_parameters()}
    assert shapes == {
        "in_proj.weight": (3352, 768),
        "conv1d.weight": (1792, 1, 4),
        "conv1d.bias": (1792,),
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }


def test_low_precision_keeps_rates_steps_and_norm_exact():
    torch.manual_seed(0)
    layer = Mamba2(16, states=4, head_dim=8).bfloat16()
    with torch.no_grad():
        layer.A_log.fill_(-3.015625)
    seen = {}

    def look(x, steps, decay, *rest, **named):
        seen.update(decay=decay, steps=steps)
        return x, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba2, "dual_scan", look)
        layer(torch.zeros(1, 4, 16, dtype=torch.bfloat16))
    torch.testing.assert_close(seen["decay"], torch.full((4,), -math.exp(-3.015625)), rtol=1e-6, atol=0)
    assert seen["steps"].dtype == torch.float32
    x, gate = (normal(3, 64, seed=seed).bfloat16() for seed in (5, 6))
    exact = GatedRMSNorm(64)(x.float(), gate.float())
    assert torch.equal(GatedRMSNorm(64).bfloat16()(x, gate), exact.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": 0}, "states = 0 .*1 or more"),
        ({"width": 0}, "width = 0"),
        ({"chunk": 0}, "chunk = 0"),
        ({"groups": 0}, "groups = 0 is not allowed"),
        ({"head_dim": 0}, "head_dim = 0 is not allowed"),
        ({"head_dim": 5}, "head_dim = 5 does not divide 16 = expand x dim"),
        ({"expand": 0}, "does not divide 0"),
        ({"head_dim": 4, "groups": 3}, "groups = 3 does not divide 4 heads"),
        ({"head_dim": 4, "step_limits": (0.2, 0.1)}, r"step_limits = \(0.2, 0.1\).*the smaller first"),
        ({"head_dim": 4, "step_limits": (-1.0, 0.1)}, "step_limits"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        Mamba2(8, **options)
