import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.evaluate.shape_bias import cue_conflict, run, silhouettes


def scene(side, box, fore, back):
    image = torch.full((3, side, side), float(back))
    top, bottom, left, right = box
    image[:, top:bottom, left:right] = torch.as_tensor(fore, dtype=torch.float32)
    return image


@pytest.mark.parametrize(("fore", "back"), [(1.0, -1.0), (-0.8, 0.9), (0.2, 0.1)])
def test_a_silhouette_is_what_differs_from_the_border(fore, back):
    boxes = [(2, 7, 3, 9), (1, 4, 1, 10)]
    masks = silhouettes(torch.stack([scene(11, box, fore, back) for box in boxes]))
    for mask, (top, bottom, left, right) in zip(masks, boxes):
        expected = torch.zeros(11, 11, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(mask, expected)


def test_the_threshold_is_otsus():
    torch.manual_seed(0)
    image = torch.cat((torch.randn(15) * 0.2 - 1, torch.randn(106) * 0.6 + 0.7)).view(1, 1, 11, 11)
    grey = image.flatten()
    low, high = grey.min(), grey.max()
    scores = []
    for level in range(1, 48):
        above = grey > low + (high - low) * level / 48
        share = above.float().mean()
        scores.append(share * (1 - share) * (grey[above].mean() - grey[~above].mean()) ** 2)
    level = 1 + int(torch.stack(scores).argmax())
    mask = (grey > low + (high - low) * level / 48).view(11, 11)
    border = torch.cat((mask[0], mask[-1], mask[:, 0], mask[:, -1])).float().mean()
    assert torch.equal(silhouettes(image)[0], mask ^ (border > 0.5))


def test_a_conflict_has_one_images_shape_and_the_others_texture():
    shape = scene(12, (2, 9, 3, 8), 0.7, -1.0)[None]
    stripes = (torch.arange(9) % 3).float().expand(3, 9, 9)
    texture = scene(12, (2, 11, 1, 10), stripes, -1.0)[None]
    mixed = cue_conflict(shape, texture)[0]
    inside = silhouettes(shape)[0]
    assert torch.equal(mixed[:, ~inside], torch.full_like(mixed[:, ~inside], -1.0))
    held = silhouettes(texture)[0].float()
    squares = {(r, c): float(held[r : r + 3, c : c + 3].sum()) for r in range(10) for c in range(10)}
    top, left = max(squares, key=lambda place: (squares[place], -place[0], -place[1]))
    for row, column in inside.nonzero().tolist():
        assert torch.equal(mixed[:, row, column], texture[0, :, top + row % 3, left + column % 3])
    assert mixed[:, inside].max() == 2


class Eyes(nn.Module):
    """Tells bright from dark objects, or tall from wide ones."""

    def __init__(self, looks_at):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.looks_at = looks_at

    def forward(self, x):
        mask = silhouettes(x)
        bright = (x[:, 0] * mask).sum((1, 2)) / mask.sum((1, 2)) > 0.5
        tall = mask.any(2).sum(1) > mask.any(1).sum(1)
        kind = {"shape": tall, "texture": bright, "neither": torch.zeros_like(tall)}[self.looks_at]
        logits = torch.stack((~kind, kind), 1).float()
        if self.looks_at == "neither":
            logits = torch.cat((logits * 0, torch.ones(len(x), 1)), 1)
        return logits * self.scale


def things():
    """Yield wide dark things, class 0, and tall bright ones, class 1."""
    images = [scene(12, (4, 7, 1, 11), 0.2, -1.0), scene(12, (1, 11, 4, 7), 0.9, -1.0)] * 2
    yield torch.stack(images), torch.tensor([0, 1, 0, 1])
    yield torch.stack(images[:1]), torch.tensor([0])


@pytest.mark.parametrize(("looks_at", "bias"), [("shape", 1.0), ("texture", 0.0)])
def test_it_tells_what_a_model_looks_at(looks_at, bias):
    model = Eyes(looks_at).train()
    result = run(model, things)
    assert model.training
    assert [row["shape_of"] for row in result.table] == [0, 1, "all"]
    for row in result.table:
        assert row["shape_bias"] == bias
        assert row["pairs"] == row["shape"] + row["texture"] + row["other"]
    assert result.table[-1]["pairs"] == 4
    assert "4 of 4 pairs" in result.notes[0]


def test_pairs_that_the_model_does_not_know_do_not_count():
    result = run(Eyes("neither"), things)
    assert [row["shape_of"] for row in result.table] == ["all"]
    assert result.table[-1] == {"shape_of": "all", "pairs": 0, "shape": 0, "texture": 0, "other": 0, "shape_bias": None}


def test_what_cannot_be_measured_is_explained():
    alone = lambda: iter([(torch.rand(3, 3, 8, 8), torch.zeros(3, dtype=torch.long))])  # noqa: E731
    with pytest.raises(InputError, match="two classes or more"):
        run(Eyes("shape"), alone)
    with pytest.raises(InputError, match="do not go together: give two batches"):
        cue_conflict(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(InputError, match="4 x 4 pixels or more"):
        cue_conflict(torch.zeros(1, 3, 3, 8), torch.zeros(1, 3, 3, 8))
