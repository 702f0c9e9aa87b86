import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.evaluate.expert_load import load_plot, run
from vitrail.layers.experts import MixtureOfExperts


class Twice(nn.Module):
    """Uses one mixture twice, of vectors that a router reads as logits."""

    def __init__(self):
        super().__init__()
        self.mixture = MixtureOfExperts(3, 4, 3, top_k=2, capacity=1.0)
        self.mixture.router.weight.data = torch.eye(3)

    def forward(self, x):
        self.mixture(x)
        self.mixture(-x)
        return x


def stream(*batches):
    return lambda: ((torch.tensor(rows).view(1, -1, 3), torch.zeros(1)) for rows in batches)


def test_choices_gates_and_room_are_counted_at_each_use():
    first = [[3.0, 2.0, 0.0], [3.0, 2.0, 0.0], [1.0, 0.0, 2.0]]
    second = [[0.0, 2.0, 1.0]]
    model = Twice().train()
    table = run(model, stream(first, second)).table
    assert [(row["layer"], row["depth"], row["expert"]) for row in table] == [
        ("mixture", depth, expert) for depth in (0, 1) for expert in range(3)
    ]
    assert [row["share"] for row in table[:3]] == pytest.approx([3 / 8, 3 / 8, 2 / 8])
    assert [row["share"] for row in table[3:]] == pytest.approx([2 / 8, 3 / 8, 3 / 8])
    p = torch.tensor(first + second).softmax(1)
    assert table[0]["gate"] == pytest.approx(float(p[:3, 0].mean()))
    assert table[2]["gate"] == pytest.approx(float(p[2:, 2].mean()))
    # Three tokens leave room for two each, and one alone for none.
    assert [row["without_room"] for row in table[:3]] == pytest.approx([1 / 3, 1 / 3, 1 / 2])
    assert model.training
    assert not model.mixture._forward_pre_hooks


def test_a_chart_has_a_bar_for_each_use():
    result = run(Twice(), stream([[3.0, 2.0, 0.0]]))
    chart = result.figures["Load of experts"]
    assert "mixture, depth 1" in chart
    assert load_plot([]) == ""


def test_bad_input_is_explained():
    with pytest.raises(InputError, match=r"Flatten has no experts: .*widenet_nano"):
        run(nn.Flatten(), stream())
    with pytest.raises(InputError, match="without images"):
        run(Twice(), stream())
