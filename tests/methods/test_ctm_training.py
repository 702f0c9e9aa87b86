import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.data.synthetic.puzzles import maze_batches, parity_batches, sorting_batches
from vitrail.errors import InputError
from vitrail.methods.supervised.ctm_training import CTMTraining, curriculum, sequence_loss, thought_loss, tick_losses
from vitrail.models import create_model
from vitrail.models.ctm import CTM, ParityCTM, SortingCTM

SMALL = {"ticks": 3, "dim": 16, "input_dim": 8, "num_heads": 2, "synch_out": 6, "synch_action": 6}
SMALL |= {"memory": 2, "memory_dim": 2, "temperature": 0.3}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("positions", "classes"), [(1, 5), (4, 2), (3, 1)])
def test_each_tick_and_position_has_its_cross_entropy(positions, classes):
    logits = normal(2, 3, positions, classes)
    target = torch.arange(2 * positions).view(2, positions) % classes
    found = tick_losses(logits, target)
    for b, t, p in itertools.product(range(2), range(3), range(positions)):
        expected = -logits[b, t, p].log_softmax(0)[target[b, p]]
        torch.testing.assert_close(found[b, t, p], expected)
    soft = F.one_hot(target, classes).to(logits).flatten(1)
    torch.testing.assert_close(tick_losses(logits, soft), found)
    if positions == 1:
        torch.testing.assert_close(tick_losses(logits, target[:, 0]), found)
    mixed = 0.3 * soft + 0.7 * soft.roll(1, 0)
    torch.testing.assert_close(tick_losses(logits, mixed), 0.3 * found + 0.7 * tick_losses(logits, target.roll(1, 0)))


@pytest.mark.parametrize("choice", ["certain", "last"])
def test_the_best_tick_and_the_chosen_one_learn(choice):
    losses, certainty = normal(5, 4).abs().requires_grad_(), normal(5, 4, seed=1)
    loss = thought_loss(losses, certainty, choice)
    expected, slope = 0.0, torch.zeros(5, 4, dtype=torch.float64)
    for b in range(5):
        least = min(range(4), key=lambda t: losses[b, t].item())
        chosen = max(range(4), key=lambda t: float(certainty[b, t])) if choice == "certain" else 3
        expected += (float(losses[b, least]) + float(losses[b, chosen])) / 2 / 5
        slope[b, least] += 0.1
        slope[b, chosen] += 0.1
    assert float(loss) == pytest.approx(expected)
    torch.testing.assert_close(torch.autograd.grad(loss, losses)[0], slope)


@pytest.mark.parametrize("lookahead", [1, 3])
def test_a_route_is_asked_for_up_to_a_little_beyond_what_is_right(lookahead):
    # Right from the first on: 2 at one tick and 0 at the other; none; all.
    target = torch.zeros(3, 6, dtype=torch.int64)
    answers = torch.tensor(
        [
            [[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
            [[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]],
            [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
        ]
    )
    asked = curriculum(F.one_hot(answers, 3).double(), target, lookahead)
    lengths = [min(2 - 1 + lookahead, 6), lookahead, 6]
    assert asked.tolist() == [[place < length for place in range(6)] for length in lengths]


def test_a_route_is_learnt_only_where_it_is_asked_for():
    torch.manual_seed(0)
    model = CTM(num_classes=20, depths=(1,), bottleneck=False, width=8, positions=4, **SMALL).eval()
    batch = next(maze_batches(5, 4, 3))
    assert CTMTraining(model).lookahead == 5
    method = CTMTraining(model, objective="route", lookahead=2)
    logits = model.forward_ticks(batch["image"])
    losses = tick_losses(logits.unflatten(-1, (4, 5)), batch["target"])
    certainty = model.certainty(logits)
    expected = 0.0
    for b in range(3):
        reached = 0
        for t in range(3):
            right = 0
            for p in range(4):
                if int(logits[b, t].view(4, 5)[p].argmax()) != int(batch["target"][b, p]):
                    break
                right += 1
            reached = max(reached, right)
        mean = losses[b, :, : max(reached, 1) - 1 + 2].mean(1)
        expected += float(mean.min() + mean[certainty[b].argmax()]) / 2 / 3
    assert float(method(batch)["loss"]) == pytest.approx(expected, rel=1e-5)


def test_certainty_chooses_and_is_not_pushed():
    torch.manual_seed(0)
    model = ParityCTM(4, **SMALL)
    batch = next(parity_batches(4, 6))
    loss = CTMTraining(model)(batch)["loss"]
    gradient = torch.autograd.grad(loss, model.head.weight)[0]
    logits = model.forward_ticks(batch["image"])
    losses = tick_losses(logits.unflatten(-1, (4, 2)), batch["target"]).mean(-1)
    certain = model.certainty(logits).argmax(1)
    rows = torch.arange(6)
    again = (losses[rows, losses.argmin(1)] + losses[rows, certain]).mean() / 2
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(gradient, torch.autograd.grad(again, model.head.weight)[0])
    last = CTMTraining(model, choice="last")(batch)["loss"]
    torch.testing.assert_close(last, (losses.min(1).values + losses[:, -1]).mean() / 2)


def said(path, blank):
    return [c for c, _ in itertools.groupby(path) if c != blank]


def test_a_sequence_is_the_sum_over_all_ways_to_say_it():
    logits = normal(2, 4, 3).requires_grad_()
    target = torch.tensor([[0, 1], [1, 0]])
    log_p = logits.log_softmax(-1)
    expected = 0.0
    for b in range(2):
        ways = [path for path in itertools.product(range(3), repeat=4) if said(path, 2) == target[b].tolist()]
        total = sum(log_p[b, range(4), list(path)].sum().exp() for path in ways)
        expected = expected - total.log() / 2 / 2  # of two places, a mean over two inputs
    found = sequence_loss(logits, target)
    torch.testing.assert_close(found, expected)
    ours, slow = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected))
    torch.testing.assert_close(ours, slow)


@pytest.mark.parametrize(
    ("objective", "model", "stream"),
    [
        ("answer", lambda: ParityCTM(5, **SMALL), parity_batches(5, 4)),
        (
            "sequence",
            lambda: SortingCTM(3, ticks=5, dim=16, synch_out=8, synapse_depth=1, memory=2, temperature=0.3),
            sorting_batches(3, 4),
        ),
        (
            "route",
            lambda: CTM(num_classes=30, depths=(1,), bottleneck=False, width=8, positions=6, **SMALL),
            maze_batches(7, 6, 4),
        ),
    ],
)
def test_every_puzzle_is_trained_by_the_same_method(objective, model, stream):
    torch.manual_seed(0)
    method = CTMTraining(model(), objective=objective).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    batch, losses = next(stream), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        optimizer.step()
        method.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


def test_decays_are_put_back_to_their_bounds_after_a_step():
    model = ParityCTM(4, **SMALL)
    with torch.no_grad():
        model.out.decay[:3] = torch.tensor([-1.0, 20.0, 3.0])
    CTMTraining(model).after_step()
    assert model.out.decay[:3].tolist() == [0.0, 15.0, 3.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: CTMTraining(nn.Linear(2, 2)), "Linear has no forward_ticks.*ctm_nano"),
        (lambda m: CTMTraining(m, multilabel=True), "several.*supervised"),
        (lambda m: CTMTraining(m, objective="maze"), "objective = 'maze' .*answer, route, sequence"),
        (lambda m: CTMTraining(m, choice="first"), "choice = 'first' .*certain, last"),
        (lambda m: CTMTraining(m, lookahead=0), "lookahead = 0 .*1 or more"),
        (
            lambda m: CTMTraining(m, objective="route")(
                {"image": torch.zeros(2, 3, 8, 8), "target": torch.zeros(2).long()}
            ),
            "no routes",
        ),
        (lambda m: tick_losses(torch.zeros(2, 3, 4, 5), torch.zeros(2).long()), "do not fit answers of 2 x 4"),
        (lambda m: tick_losses(torch.zeros(2, 3, 1, 5), torch.zeros(2, 4)), "do not fit answers"),
        (lambda m: sequence_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4).long()), "in 3 ticks"),
        (lambda m: sequence_loss(torch.zeros(2, 3, 5), torch.zeros(2).long()), "class numbers"),
    ],
)
def test_what_does_not_fit_is_explained(build, message):
    with pytest.raises(InputError, match=message):
        build(create_model("ctm_nano", num_classes=5))
