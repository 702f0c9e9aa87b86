import math

import pytest
import torch

from vitrail.errors import InputError
from vitrail.search.cell_space import CellSpace
from vitrail.search.controller import Controller, ControllerSearch, ppo_loss
from vitrail.search.strategy import Trial, search

CHOICES = (2, 3, 4, 2)
FEW = CellSpace(blocks=1, operations=("identity", "conv_1x1", "sep_3x3"))


def controller(choices=CHOICES, hidden=5):
    torch.manual_seed(0)
    net = Controller(choices, hidden).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 8  # so that options are unlike
    return net


def slow_walk(net, code):
    """Return the logarithms of probabilities and the entropies of one code, from the equations of an LSTM."""
    hidden = cell = torch.zeros(len(net.start), dtype=torch.float64)
    told, log_probs, entropies = net.start, [], []
    for number, option in enumerate(code):
        gates = net.lstm.weight_ih @ told + net.lstm.bias_ih + net.lstm.weight_hh @ hidden + net.lstm.bias_hh
        take, forget, new, give = gates.chunk(4)
        cell = forget.sigmoid() * cell + take.sigmoid() * new.tanh()
        hidden = give.sigmoid() * cell.tanh()
        scores = net.heads[number].weight @ hidden + net.heads[number].bias
        probs = scores.exp() / scores.exp().sum()
        log_probs.append(probs[option].log())
        entropies.append(-sum(p * p.log() for p in probs))
        if number + 1 < len(code):
            told = net.told[number].weight[option]
    return torch.stack(log_probs), torch.stack(entropies)


def test_a_controller_is_the_slow_loop():
    net = controller()
    codes = torch.tensor([[0, 1, 2, 1], [1, 2, 0, 0], [1, 0, 3, 1]])
    log_probs, entropies = net(codes)
    slow = [torch.stack(each) for each in zip(*(slow_walk(net, code) for code in codes.tolist()))]
    torch.testing.assert_close(log_probs, slow[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropies, slow[1], rtol=1e-10, atol=1e-10)
    given = list(net.parameters())
    weight = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    for got, wanted in zip(
        torch.autograd.grad(((log_probs + 0.3 * entropies) * weight).sum(), given, allow_unused=True),
        torch.autograd.grad(((slow[0] + 0.3 * slow[1]) * weight).sum(), given, allow_unused=True),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_codes_are_drawn_as_likely_as_they_are():
    net = controller((2, 3))
    codes, log_probs = net.sample(4_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(codes)[0].detach(), log_probs)
    assert not log_probs.requires_grad
    every = torch.tensor([[a, b] for a in range(2) for b in range(3)])
    likely = net(every)[0].sum(1).exp().tolist()
    assert sum(likely) == pytest.approx(1)
    for code, share in zip(every, likely):
        assert float((codes == code).all(1).float().mean()) == pytest.approx(share, abs=0.03)


def test_a_controller_begins_as_published():
    torch.manual_seed(0)
    net = Controller(CHOICES)
    assert net.lstm.hidden_size == 100
    for name, parameter in net.named_parameters():
        assert parameter.detach().abs().max() <= 0.1, name
        if parameter.numel() > 300:
            assert float(parameter.detach().std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.1), name


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_the_loss_is_that_of_proximal_policy_optimisation(clip):
    generator = torch.Generator().manual_seed(0)
    before = -torch.rand(4, 3, generator=generator, dtype=torch.float64)
    now = (before + 0.4 * torch.randn(4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.1], dtype=torch.float64)
    slow = 0.0
    for row in range(4):
        for column in range(3):
            ratio = (now[row, column] - before[row, column]).exp()
            free, held = ratio * advantages[row], ratio.clamp(1 - clip, 1 + clip) * advantages[row]
            slow = slow - (free if free < held else held) / 4
    ours = ppo_loss(now, before, advantages, clip)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(*(torch.autograd.grad(each, now, retain_graph=True)[0] for each in (ours, slow)))


@pytest.mark.parametrize(("steps", "clip"), [(1, 0.2), (3, 0.05)])
def test_learning_is_by_hand(steps, clip):
    own = {"lr": 0.03, "hidden": 4}
    strategy = ControllerSearch(FEW, steps=steps, clip=clip, entropy_weight=0.5, baseline_decay=0.9, **own)
    twin = ControllerSearch(FEW, **own).controller
    baseline = None
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.03)
    for rewards in ([0.2, 0.8, 0.5], [0.9, 0.1, 0.3]):
        asked = strategy.ask(3)
        codes = torch.tensor([FEW.encode(each) for each in asked])
        baseline = sum(rewards) / 3 if baseline is None else baseline
        gain = (torch.tensor(rewards) - baseline)[:, None]
        before = twin(codes)[0].detach()  # of the draw, for all steps
        for _ in range(steps):
            log_probs, entropies = twin(codes)
            ratio = (log_probs - before).exp()
            held = ratio.clamp(1 - clip, 1 + clip) * gain
            loss = -torch.minimum(ratio * gain, held).sum(1).mean() - 0.5 * entropies.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        strategy.tell([Trial(each, reward) for each, reward in zip(asked, rewards)])
        for reward in rewards:
            baseline = 0.9 * baseline + 0.1 * reward
        assert strategy.baseline == pytest.approx(baseline)
        for ours, theirs in zip(strategy.controller.parameters(), twin.parameters()):
            torch.testing.assert_close(ours, theirs)


def test_several_steps_start_from_the_odds_of_the_draw():
    strategy = ControllerSearch(FEW, lr=0.5, steps=10, entropy_weight=0.0, clip=0.2, hidden=4)
    strategy.baseline = 0.0
    (asked,) = strategy.ask(1)
    code = torch.tensor([FEW.encode(asked)])
    before = strategy.controller(code)[0].exp().detach()
    strategy.tell([Trial(asked, 1.0)])
    after = strategy.controller(code)[0].exp().detach()
    assert (after > 1.2 * before).any()  # and no further than the clip lets it be pushed by this reward, but for Adam
    assert strategy.baseline == pytest.approx(0.05)


def test_published_figures_are_the_defaults():
    strategy = ControllerSearch(FEW)
    assert strategy.optimizer.param_groups[0]["lr"] == 3.5e-4
    assert (strategy.entropy_weight, strategy.baseline_decay) == (1e-5, 0.95)
    assert isinstance(strategy.optimizer, torch.optim.Adam)


def test_it_learns_what_is_rewarded():
    wanted = FEW.decode((1, 0, 2, 1, 0) * 2)
    target = FEW.encode(wanted)

    def reward(architecture):
        return sum(a == b for a, b in zip(FEW.encode(architecture), target)) / len(target)

    state = torch.get_rng_state()
    done = search(ControllerSearch(FEW, lr=0.03, hidden=32), reward, trials=144, batch=12)
    assert torch.equal(torch.get_rng_state(), state)
    early, late = (sum(trial.reward for trial in part) / len(part) for part in (done[:36], done[-36:]))
    assert late > early + 0.15
    again = search(ControllerSearch(FEW, lr=0.03, hidden=32), reward, trials=24, batch=12)
    assert again == done[:24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr = 0.0 .*above 0"),
        ({"entropy_weight": -1.0}, "entropy_weight = -1.0 .*from 0"),
        ({"baseline_decay": 1.0}, r"baseline_decay = 1.0 .*\[0, 1\)"),
        ({"clip": 0.0}, "clip = 0.0 .*above 0"),
        ({"steps": 0}, "steps = 0 .*1 or more"),
        ({"hidden": 0}, "hidden = 0 .*1 or more"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        ControllerSearch(FEW, **options)


def test_it_is_told_what_it_asked_for():
    strategy = ControllerSearch(FEW)
    (asked,) = strategy.ask(1)
    other = FEW.decode([(at + 1) % n for at, n in zip(FEW.encode(asked), FEW.choices)])
    for trials in ([Trial(other, 1.0)], []):
        with pytest.raises(InputError, match="did not just ask for"):
            strategy.tell(trials)
    strategy.tell([Trial(asked, 1.0)])
    with pytest.raises(InputError, match="did not just ask for"):
        strategy.tell([Trial(asked, 1.0)])
