import math

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.methods.supervised import mambaeye_training
from vitrail.methods.supervised.mambaeye_training import MambaEyeTraining, draw_positions, stepwise_loss
from vitrail.models import create_model
from vitrail.models.mambaeye import MambaEye, cut, moves_between, seen_share


def net():
    torch.manual_seed(0)
    return MambaEye(num_classes=4, patch_size=3, dim=8, depth=1, move_dim=2, states=2, head_dim=8)


def trainer(**options):
    model = net()
    torch.manual_seed(1)
    return MambaEyeTraining(model, **options)


def batch(height=6, width=7, rows=(3, 8, 5)):
    images = torch.randn(len(rows), 3, height, width, generator=torch.Generator().manual_seed(0))
    return {"image": images, "target": torch.arange(len(rows)) % 4, "row": torch.tensor(rows)}


class Walker(nn.Module):
    """Answers with what it was shown, and keeps it."""

    def __init__(self, patch_size=3):
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.ones(()))

    def forward_walk(self, patches, moves):
        self.patches, self.moves = patches, moves
        return self.weight * patches[:, :, :4]


# ---- the loss


def slow(logits, target, share):
    """Sum over images, steps and classes: the target goes from one over C to the label."""
    batch, length, classes = logits.shape
    total = 0.0
    for image in range(batch):
        for step in range(length):
            t = share[step] if share.ndim == 1 else share[image, step]
            p = torch.exp(logits[image, step]) / torch.exp(logits[image, step]).sum()
            for c in range(classes):
                label = target[image, c] if target.ndim == 2 else float(target[image] == c)
                total = total - (t * label + (1 - t) / classes) * torch.log(p[c])
    return total / (batch * length)


@pytest.mark.parametrize("each", [False, True], ids=["one walk", "walks"])
@pytest.mark.parametrize("mixed", [False, True], ids=["numbers", "probabilities"])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 4), (2, 7, 3)], ids=str)
def test_the_loss_is_the_slow_loop_with_its_gradient(shape, mixed, each):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.arange(shape[0]) % shape[2]
    if mixed:
        target = torch.rand(shape[0], shape[2], dtype=torch.float64, generator=generator).softmax(1)
    share = torch.rand(*(shape[:2] if each else shape[1:2]), dtype=torch.float64, generator=generator)
    ours, theirs = stepwise_loss(logits, target, share), slow(logits, target, share)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_targets_harden_from_all_alike_to_the_label():
    logits = torch.tensor([[[2.0, 0.0, -1.0]]])
    nothing = stepwise_loss(logits, torch.tensor([0]), torch.zeros(1))
    everything = stepwise_loss(logits, torch.tensor([0]), torch.ones(1))
    log_p = logits[0, 0].log_softmax(0)
    assert nothing.item() == pytest.approx(-log_p.mean().item())
    assert everything.item() == pytest.approx(-log_p[0].item())
    # An answer that is as sure as what was seen allows has the least loss.
    sure = torch.tensor([0.5 + 0.5 / 3, 0.5 / 3, 0.5 / 3])
    best = stepwise_loss(sure.log()[None, None], torch.tensor([0]), torch.tensor([0.5]))
    assert best.item() == pytest.approx(-(sure * sure.log()).sum().item())
    assert stepwise_loss(logits.half(), torch.tensor([0]), torch.ones(1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("logits", "target", "share"),
    [((2, 4), (2,), (2,)), ((2, 5, 4), (3,), (5,)), ((2, 5, 4), (2, 3), (5,)), ((2, 5, 4), (2,), (4,))],
)
def test_shapes_that_do_not_fit_are_explained(logits, target, share):
    with pytest.raises(InputError, match=r"do not go together: give \(B, L, C\)"):
        stepwise_loss(torch.zeros(logits), torch.zeros(target, dtype=torch.int64), torch.zeros(share))


# ---- walks


def test_positions_are_drawn_from_all_that_there_are():
    positions = draw_positions(5, 4, 3, 400, np.random.default_rng(0))
    assert positions.dtype == torch.int64
    found, counts = positions.unique(dim=0, return_counts=True)
    assert found.tolist() == [[row, column] for row in range(3) for column in range(2)]
    assert counts.min() > 40
    assert not torch.equal(positions, draw_positions(5, 4, 3, 400, np.random.default_rng(1)))


def walked(method, given):
    """Return the patches that the model of a method was shown."""
    method(given)
    return method.model.patches.clone()


def test_every_image_and_every_step_has_a_walk_of_its_own():
    torch.manual_seed(0)
    method = MambaEyeTraining(Walker(), steps=40)
    same = {**batch(rows=(3, 8)), "image": batch(rows=(3,))["image"].expand(2, -1, -1, -1)}
    first = walked(method, same)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(walked(method, same), first)
    # A row walks alike whatever is beside it: in any process.
    turned = {**same, "row": same["row"].flip(0)}
    assert torch.equal(walked(method, turned), first.flip(0))
    method.after_step()
    assert not torch.equal(walked(method, same), first)
    torch.manual_seed(2)
    assert not torch.equal(walked(MambaEyeTraining(Walker(), steps=40), same), first)


def test_a_run_that_goes_on_takes_the_walks_that_it_would_have_had():
    one = trainer(steps=9)
    one.after_step()
    two = trainer(steps=9)
    two.seed += 1
    two.load_state_dict(one.state_dict())
    one.after_step()
    two.after_step()
    assert one(batch())["loss"] == two(batch())["loss"]
    assert two.batches == 2


@pytest.mark.parametrize(("height", "width", "steps", "expected"), [(6, 7, None, 6), (6, 7, 11, 11), (2, 4, None, 2)])
def test_a_walk_has_as_many_steps_as_tiles_or_as_asked(height, width, steps, expected):
    method = MambaEyeTraining(Walker(), steps=steps)
    assert walked(method, batch(height, width)).shape == (3, expected, 27)
    assert method.model.moves.shape == (3, expected, 2)


# ---- the method


@pytest.mark.parametrize("supervision", ["hardening", "label", "last"])
def test_each_step_is_asked_for_what_it_should(supervision, monkeypatch):
    method, given = trainer(steps=7, supervision=supervision), batch()
    drawn = []
    draw = mambaeye_training.draw_positions
    monkeypatch.setattr(mambaeye_training, "draw_positions", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    loss = method(given)["loss"]
    positions = torch.stack(drawn)
    logits = method.model.forward_walk(cut(given["image"], positions, 3), moves_between(positions))
    share = {
        "hardening": seen_share(positions, 6, 7, 3),
        "label": torch.ones(3, 7),
        "last": torch.ones(3, 1),
    }[supervision]
    expected = slow(logits[:, -1:] if supervision == "last" else logits, given["target"], share)
    torch.testing.assert_close(loss, expected)


def test_images_are_resized_as_drawn_and_keep_their_aspect(monkeypatch):
    method, seen = MambaEyeTraining(Walker(), sides=(6, 12), steps=1), []
    monkeypatch.setattr(mambaeye_training, "seen_share", lambda p, *size: seen.append(size[:2]) or seen_share(p, *size))
    for _ in range(60):
        method(batch(4, 8))
        method(batch(4, 8, rows=(1,)))
        assert seen[-1] == seen[-2]  # whatever is in the batch: in any process
        method.after_step()
    assert set(seen) == {(round(side / 2), side) for side in range(6, 13)}
    left = MambaEyeTraining(Walker())
    left(batch(4, 8))
    assert seen[-1] == (4, 8)


def test_resizing_is_smooth():
    method = MambaEyeTraining(Walker(patch_size=6), sides=(6, 6))
    images = batch(12, 12)["image"]
    patches = walked(method, {**batch(), "image": images})
    expected = torch.nn.functional.interpolate(images, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(patches[:, 0], expected.flatten(1))


def test_sides_below_a_patch_are_filled_up():
    method = MambaEyeTraining(Walker(patch_size=5), sides=(2, 2))
    patches = walked(method, {**batch(), "image": torch.ones(3, 3, 4, 4)}).view(3, 3, 5, 5)
    torch.testing.assert_close(patches[:, :, :2, :2], torch.ones(3, 3, 2, 2))
    assert not patches[:, :, 2:].any()
    assert not patches[:, :, :, 2:].any()
    assert method(batch(4, 4))["loss"].isfinite()


def test_it_learns():
    torch.manual_seed(0)
    method = MambaEyeTraining(create_model("mambaeye_nano", num_classes=4, depth=1))
    given = batch(16, 16, rows=range(8))
    given["image"] = given["target"].view(-1, 1, 1, 1).float().expand(-1, 3, 16, 16) / 2 - 1
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        method(given)["loss"].backward()
        optimizer.step()
        method.after_step()
    method.eval()
    assert (method.model(given["image"]).argmax(1) == given["target"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"supervision": "soft"}, "supervision = 'soft' .*hardening, label, last"),
        ({"steps": 0}, "steps = 0 .*1 or more"),
        ({"sides": (12, 6)}, r"sides = \(12, 6\) .*smallest and the largest"),
        ({"sides": (0, 6)}, r"sides = \(0, 6\)"),
        ({"sides": (6,)}, r"sides = \(6,\)"),
        ({"multilabel": True}, "one label per image"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        MambaEyeTraining(Walker(), **options)


def test_a_model_that_does_not_walk_is_refused():
    with pytest.raises(InputError, match=r"Linear has no forward_walk: .*mambaeye_nano"):
        MambaEyeTraining(nn.Linear(2, 2))


def test_a_walk_sees_as_much_as_chance_lets_it():
    # n patches of one pixel, drawn from m with repetition, see 1 - (1 - 1/m)^n of an image on average.
    rng = np.random.default_rng(0)
    shares = [seen_share(draw_positions(8, 8, 1, 64, rng), 8, 8, 1)[-1].item() for _ in range(200)]
    assert np.mean(shares) == pytest.approx(1 - math.exp(64 * math.log(1 - 1 / 64)), abs=0.01)
