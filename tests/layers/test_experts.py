import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from exact import moved, normal
from vitrail.errors import InputError
from vitrail.layers.experts import MixtureOfExperts, balance_loss, with_room


def layer(**options):
    torch.manual_seed(0)
    return moved(MixtureOfExperts(6, 5, **{"experts": 4, "top_k": 2, "noise": 0.0, **options}))


# ---- slow loops, from the papers and the published code


def gelu(x):
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def slow_mixture(mixture, tokens, room):
    """Give each token, in order, to its k best experts, where these have room; return that and the balance loss."""
    experts, count, k = mixture.experts, mixture.count, mixture.top_k
    taken, mean, share = [0] * count, [0.0] * count, [0.0] * count
    rows = []
    for token in tokens:
        scores = torch.exp(mixture.router.weight @ token)
        p = scores / scores.sum()
        best = sorted(range(count), key=lambda e: -p[e].item())[:k]
        out = torch.zeros_like(token)
        for e in best:
            share[e] += 1 / k / len(tokens)
            if taken[e] < room:
                inside = gelu(experts.fc1_weight[e] @ token + experts.fc1_bias[e])
                out = out + p[e] * gelu(experts.fc2_weight[e] @ inside + experts.fc2_bias[e])
            taken[e] += 1
        mean = [m + p[e] / len(tokens) for e, m in enumerate(mean)]
        rows.append(out)
    return torch.stack(rows), count * sum(s * m for s, m in zip(share, mean))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("experts", "top_k", "capacity"), [(4, 2, 0.5), (4, 1, 1.2), (3, 3, 1.0), (5, 2, 1.2), (1, 1, 0.4)]
)
def test_a_mixture_is_the_slow_loop(experts, top_k, capacity, training):
    mixture = layer(experts=experts, top_k=top_k, capacity=capacity).train(training)
    x = normal(2, 7, 6).requires_grad_()
    room = int(14 * capacity * top_k / experts) if training else 14
    ours, balance = mixture(x)
    theirs, expected = slow_mixture(mixture, x.flatten(0, 1), room)
    torch.testing.assert_close(ours, theirs.view(x.shape), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(balance, expected, rtol=1e-9, atol=1e-9)
    given, weight = [x, *mixture.parameters()], normal(2, 7, 6, seed=9)
    for found, wanted in zip(
        torch.autograd.grad((ours * weight).sum() + 0.3 * balance, given, allow_unused=True),
        torch.autograd.grad((theirs * weight.flatten(0, 1)).sum() + 0.3 * expected, given, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, rtol=1e-8, atol=1e-8)


def test_the_first_tokens_have_room():
    chosen = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 1], [0, 1, 1]]).bool()
    assert with_room(chosen, 2).int().tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert not with_room(chosen, 0).any()


def test_an_even_load_costs_one_and_the_worst_as_much_as_experts():
    even = torch.eye(4).bool().repeat(3, 1)
    assert float(balance_loss(torch.full((12, 4), 0.25), even)) == pytest.approx(1)
    worst = torch.zeros(12, 4)
    worst[:, 2] = 1
    assert float(balance_loss(worst, worst.bool())) == pytest.approx(4)
    assert balance_loss(worst.bfloat16(), worst.bool()).dtype == torch.float32


def test_noise_is_of_training_alone():
    mixture = MixtureOfExperts(6, 5, 4)
    assert mixture.noise == 0.25
    torch.nn.init.zeros_(mixture.router.weight)
    torch.manual_seed(0)
    probabilities = mixture.route(torch.zeros(4000, 6)).probabilities
    logits = probabilities.detach().log()
    assert float((logits - logits.mean(1, keepdim=True)).std()) == pytest.approx(0.25 * 0.75**0.5, rel=0.03)
    assert float(mixture.eval().route(torch.zeros(9, 6)).probabilities.detach().std()) == 0


def test_a_router_is_exact_where_tokens_are_not():
    mixture = MixtureOfExperts(6, 5, 4).bfloat16().eval()
    routing = mixture.route(torch.randn(9, 6).bfloat16())
    assert (routing.probabilities.dtype, routing.gates.dtype) == (torch.float32, torch.float32)
    said, balance = mixture(torch.randn(1, 9, 6).bfloat16())
    assert (said.dtype, balance.dtype) == (torch.bfloat16, torch.float32)


def test_dropout_follows_both_layers_of_an_expert():
    mixture = layer(experts=1, top_k=1, drop=0.5, capacity=2.0)
    tokens = normal(200, 6)
    torch.manual_seed(0)
    out = mixture(tokens[None])[0][0]
    torch.manual_seed(0)
    inside = torch.dropout(gelu(tokens @ mixture.experts.fc1_weight[0].T + mixture.experts.fc1_bias[0]), 0.5, True)
    outside = gelu(inside @ mixture.experts.fc2_weight[0].T + mixture.experts.fc2_bias[0])
    torch.testing.assert_close(out, torch.dropout(outside, 0.5, True))
    assert float((out == 0).double().mean()) == pytest.approx(0.5, abs=0.1)


def test_experts_begin_as_published():
    torch.manual_seed(0)
    mixture = MixtureOfExperts(64, 96, 4)
    for weight in (mixture.experts.fc1_weight, mixture.experts.fc2_weight):
        assert float(weight.detach().abs().max()) == pytest.approx((6 / 160) ** 0.5, rel=0.01)
    assert float(mixture.router.weight.detach().abs().max()) == pytest.approx((6 / 68) ** 0.5, rel=0.02)
    assert 0 < float(mixture.experts.fc1_bias.detach().std()) < 2e-6


def test_on_the_meta_device_the_load_is_even():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        MixtureOfExperts(64, 96, 4).eval()(torch.zeros(2, 11, 64))
    assert counter.get_total_flops() == 2 * 22 * (64 * 4 + 2 * 2 * 64 * 96)


def test_a_file_of_it_takes_any_number_of_tokens():
    mixture = layer().eval().float()
    x = normal(3, 7, 6).float()
    program = torch.export.export(mixture, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    for batch in (x, normal(5, 7, 6, seed=4).float()):
        torch.testing.assert_close(program(batch)[0], mixture(batch)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0, "top_k": 1}, "experts = 0 with top_k = 1 .*1 expert or more"),
        ({"top_k": 5}, "experts = 4 with top_k = 5"),
        ({"top_k": 0}, "experts = 4 with top_k = 0"),
        ({"capacity": 0}, "capacity = 0 .*above 0"),
        ({"capacity": math.nan}, "capacity = nan .*above 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        layer(**options)
