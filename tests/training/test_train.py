"""The loop: what it computes, when it stops, what it says."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from small_runs import PREPROCESS, MemoryIndex, TinyNet, folder, method, recipe

from vitrail.data.loader import make_loader
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import build_views
from vitrail.errors import InputError, RunError
from vitrail.methods.supervised.supervised import Supervised
from vitrail.models.factory import create_model
from vitrail.training.balance import class_weights, image_weights
from vitrail.training.train import train
from vitrail.training.validate import validate

INDEX = MemoryIndex(77, 33)


def run(path, index=INDEX, trained=None, events=None, deadline=None, preprocess=PREPROCESS, **overrides):
    trained = trained or method()
    return train(trained, index, preprocess, recipe(**overrides), folder(path), deadline=deadline, events=events)


def lines(path, kind=None):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def test_it_learns_and_says_what_it_did(tmp_path):
    told = []
    result = run(tmp_path, events=told.append, train__epochs=4, train__ema=0.9)
    assert result.figures["top1"] > 0.8
    assert (result.steps, result.epochs, result.stopped, result.failed) == (20, 4, "finished", [])
    assert result.images_per_second > 0
    assert not result.model.training
    assert lines(tmp_path) == result.history
    assert [line["step"] for line in lines(tmp_path, "val")] == [5, 10, 15, 20]
    start = told[0]
    assert start["event"] == "start"
    assert (start["parameters"], start["decayed"], start["undecayed"]) == (851, 3, 5)
    assert (start["steps"], start["batch_size"], start["devices"], start["precision"]) == (20, 16, ["cpu"], "fp32")
    assert told[-1]["event"] == "end"
    kinds = {event["event"] for event in told}
    assert {"start", "pace", "progress", "validation", "checkpoint", "end"} <= kinds


def test_the_loop_equals_a_plain_one(tmp_path):
    """Against a loop of a dozen lines: AdamW without decay on norms and biases, clipping, warm-up and cosine."""
    config = recipe(train__epochs=3, optim__clip_grad=0.5, optim__weight_decay=0.3)
    trained = method(norm=False)  # a bias before a normalisation has no gradient but noise, which AdamW would magnify
    plain = copy.deepcopy(trained).train()
    train(trained, INDEX, PREPROCESS, config, folder(tmp_path))

    decayed = [p for p in plain.parameters() if p.ndim > 1]
    rest = [p for p in plain.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.3}])
    views = build_views({"image": "train"}, PREPROCESS, config.augment, config.data)
    step, total, warm = 0, 15, 0.05
    losses = []
    for epoch in range(3):
        for batch in make_loader(INDEX, INDEX.rows("train"), views, batch_size=16, epoch=epoch, shuffle=True):
            step += 1
            done = step / total
            cosine = (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2
            rate = 0.01 * (done / warm if done < warm else 0.01 + 0.99 * cosine)
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels = torch.from_numpy(PREPROCESS.normalise(batch["image"].permute(0, 2, 3, 1).numpy()))
            loss = plain.loss({"image": pixels, "target": batch["target"]})["loss"]
            losses.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path, "train")], losses, rtol=1e-4)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    options = {"train__epochs": 2, "optim__name": "sgd", "optim__lr": 0.1, "augment__mixup": 0.4}
    whole = run(tmp_path / "a", trained=method(norm=False), **options)
    parts = run(tmp_path / "b", trained=method(norm=False), train__accumulate=3, **options)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch_size", [1, 19, 38, 76, 200])
def test_any_batch_size(tmp_path, batch_size):
    """77 images leave a remainder of one at 19, 38 and 76, of which batch normalisation has no statistics."""
    result = run(tmp_path, train__batch_size=batch_size, train__epochs=1)
    assert result.steps == max(77 // batch_size, 1)


def test_part_of_an_epoch(tmp_path):
    result = run(tmp_path, train__epochs=0.5, train__eval_every=0.2)
    assert result.steps == 2
    assert [line["step"] for line in lines(tmp_path, "val")] == [1, 2]


def test_moving_average_ships_and_short_runs_benefit(tmp_path):
    seen = []

    class Watched(Supervised):
        def after_step(self):
            seen.append(self.model.head.bias.detach().clone())

    torch.manual_seed(0)
    result = run(tmp_path, trained=Watched(TinyNet()), train__ema=0.5)
    # The decay rises as 1 - (1 + step) ** (-2/3), up to 0.5 here.
    average = seen[0]
    for step, value in enumerate(seen[1:], start=1):
        decay = min(1 - (1 + step) ** (-2 / 3), 0.5)
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(result.model.head.bias, average)


def test_bf16_on_the_cpu_leaves_a_plain_float_model(tmp_path):
    result = run(tmp_path, train__precision="bf16", train__channels_last=True)
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    assert "forward" not in vars(result.method)
    copy.deepcopy(result.model)
    assert result.figures["top1"] > 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_needs_an_accelerator(tmp_path):
    with pytest.raises(InputError, match=r"train.precision = 'fp16' cannot be used on 'cpu'"):
        run(tmp_path, train__precision="fp16")


def test_multilabel(tmp_path):
    index = MemoryIndex(80, 40, multilabel=True)
    result = run(tmp_path, index, method(multilabel=True), train__epochs=6, augment__cutmix=1.0, train__ema=0.9)
    assert result.figures["map"] > index._targets.mean() + 0.1
    assert "top1" not in result.figures


def test_timm_model_with_layer_decay_and_checkpointing(tmp_path):
    torch.manual_seed(0)
    trained = Supervised(create_model("small_resnet_nano", num_classes=3, drop_path_rate=0.1))
    result = run(tmp_path, trained=trained, optim__layer_decay=0.7, train__grad_checkpointing=True, train__epochs=1)
    assert result.steps == 5


def test_checkpointing_that_a_model_lacks(tmp_path):
    with pytest.raises(InputError, match=r"train.grad_checkpointing: TinyNet has none"):
        run(tmp_path, train__grad_checkpointing=True)


def test_unresolved_recipe(tmp_path):
    with pytest.raises(InputError, match=r"optim.lr, train.ema at 'auto'"):
        run(tmp_path, optim__lr="auto", train__ema="auto", train__head_start="auto")


def test_method_hooks(tmp_path):
    seen = []

    class Hooked(Supervised):
        def schedule(self, progress):
            seen.append(progress)

        def after_step(self):
            seen.append("after")

    run(tmp_path, trained=Hooked(TinyNet()), train__epochs=1)
    assert seen[1::2] == ["after"] * 5
    np.testing.assert_allclose(seen[::2], [0.2, 0.4, 0.6, 0.8, 1.0])


def test_patience_ships_the_best(tmp_path):
    class Spoiled(Supervised):
        """Forgets everything after the second epoch."""

        steps = 0

        def after_step(self):
            self.steps += 1
            if self.steps > 10:
                with torch.no_grad():
                    self.model.head.weight.zero_()
                    self.model.head.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))

    torch.manual_seed(0)
    result = run(tmp_path, trained=Spoiled(TinyNet()), train__epochs=50, train__patience=2)
    history = lines(tmp_path, "val")
    best = max(history, key=lambda line: line["top1"])
    assert result.stopped == "patience"
    assert result.steps == best["step"] + 10
    assert result.figures["top1"] == best["top1"]
    logits, targets, _ = validate(result.model, INDEX, PREPROCESS, recipe(), INDEX.rows("val"))
    assert (logits.argmax(1) == targets).mean() == best["top1"]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert f"step-{best['step']:08}.pt" in kept
    assert len(kept) <= 3


def test_finished_runs_return_at_once(tmp_path):
    first = run(tmp_path, train__ema=0.9)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    other = method(seed=5)
    told = []
    again = run(tmp_path, trained=other, events=told.append, train__ema=0.9)
    assert {event["event"] for event in told} == {"end"}
    assert again.history == first.history
    assert (again.steps, again.figures, again.seconds) == (first.steps, first.figures, first.seconds)
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()} == before


def test_another_recipe_is_refused(tmp_path):
    run(tmp_path, train__epochs=1)
    with pytest.raises(RunError, match=r"belong to another run: optim.lr \(0.01 there, 0.02 now\), train.seed"):
        run(tmp_path, train__epochs=1, optim__lr=0.02, train__seed=3)
    with pytest.raises(RunError, match="the training images"):
        run(tmp_path, MemoryIndex(78, 33), train__epochs=1)
    with pytest.raises(RunError, match="the preprocessing"):
        run(tmp_path, preprocess=Preprocess(size=(8, 8)), train__epochs=1)
    run(tmp_path, train__epochs=1, train__checkpoint_seconds=7.0, deploy__int8=False)


class NotFinite(Supervised):
    """Goes wrong at one step, in the loss or in one gradient."""

    def __init__(self, model, where, step):
        super().__init__(model)
        self.where, self.at, self.steps = where, step, 0

    def loss(self, batch):
        terms = super().loss(batch)
        terms["extra"] = terms["loss"] * 2
        if self.steps == self.at:
            if self.where == "gradient":
                # The value is zero, its derivative is infinite.
                terms["loss"] = (
                    terms["loss"] + (self.model.conv2.bias - self.model.conv2.bias.detach()).abs().sqrt().sum()
                )
            else:
                terms[self.where] = terms[self.where] * float("nan")
        return terms

    def after_step(self):
        self.steps += 1


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("loss", "the loss term 'loss'"),
        ("extra", "the loss term 'extra'"),
        ("gradient", r"gradient of 'model.conv2.bias'"),
    ],
)
def test_what_is_not_finite_is_named_and_the_checkpoint_stays(tmp_path, where, named):
    with pytest.raises(RunError, match=rf"step 7: .*{named} is not finite.*checkpoint of step 7 is kept"):
        run(tmp_path, trained=NotFinite(TinyNet(), where, 7), train__checkpoint_seconds=0.0)
    state = torch.load(tmp_path / "checkpoints" / "step-00000007.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["method"].values())


def test_unreadable_images_are_left_out_and_named(tmp_path):
    index = MemoryIndex(77, 33)
    index.broken = {3, 50, 80}
    told = []
    result = run(tmp_path, index, events=told.append)
    assert result.failed == ["image3", "image50", "image80"]
    assert sum(event["event"] == "warning" for event in told) == 3
    assert lines(tmp_path, "val")[-1]["images"] == 32
    assert result.steps == 10


def test_data_that_vanish_stop_the_run(tmp_path):
    index = MemoryIndex(77, 33)
    index.broken = set(range(77))
    with pytest.raises(RunError, match=r"images cannot be read any more, the first is image"):
        run(tmp_path, index)


def test_class_weights_have_mean_one_over_the_images():
    counts = np.array([10, 0, 30, 60])
    weights = class_weights(counts)
    assert weights.dtype == np.float32
    np.testing.assert_allclose((weights * counts).sum() / 100, 1, rtol=1e-6)
    np.testing.assert_allclose(weights[0] * 10, weights[3] * 60, rtol=1e-6)
    assert weights[1] == 1


def test_balanced_sampler_draws_classes_alike(tmp_path):
    index = MemoryIndex(300, 30)
    index._targets[:300] = np.repeat([0, 1, 2], [200, 80, 20])
    weights = image_weights(index, index.rows("train"))
    totals = [weights[index._targets[:300] == number].sum() for number in range(3)]
    np.testing.assert_allclose(totals, 1)
    seen = []

    class Counting(Supervised):
        def loss(self, batch):
            seen.extend(batch["target"].tolist())
            return super().loss(batch)

    run(tmp_path, index, Counting(TinyNet()), train__balance="sampler", train__epochs=3)
    shares = np.bincount(seen) / len(seen)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.08)


def test_weights_of_images_with_several_labels():
    index = MemoryIndex(50, 10, multilabel=True)
    weights = image_weights(index, index.rows("train"))
    rarity = 1 / index.counts("train")
    expected = [max((rarity[c] for c in range(3) if index._targets[row, c]), default=0) for row in range(50)]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


class FakeTime:
    """A clock that only training steps move."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr("vitrail.training.pace.time", fake)
    monkeypatch.setattr("vitrail.training.train.time", fake)
    return fake


class Slow(Supervised):
    def __init__(self, model, clock, seconds):
        super().__init__(model)
        self.clock, self.seconds = clock, seconds

    def loss(self, batch):
        self.clock.now += self.seconds(self.clock.now) if callable(self.seconds) else self.seconds
        return super().loss(batch)


def test_a_deadline_shortens_the_plan_and_the_rate_still_falls(tmp_path, clock):
    told = []
    trained = Slow(TinyNet(), clock, 1.0)
    result = run(tmp_path, trained=trained, deadline=1100.0, events=told.append, train__epochs=100)
    assert result.stopped == "budget"
    assert 85 <= result.steps <= 100
    assert clock.now <= 1100
    last = lines(tmp_path, "train")[-1]
    assert last["step"] == result.steps
    assert last["lr"] == pytest.approx(0.01 * 0.01)
    assert lines(tmp_path, "val")[-1]["step"] == result.steps
    assert [event["total"] for event in told if event["event"] == "replan"] == [
        line["total"] for line in lines(tmp_path, "plan")
    ]
    rates = [line["lr"] for line in lines(tmp_path, "train")]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.005


def test_a_machine_that_slows_down_still_ends_in_time(tmp_path, clock):
    trained = Slow(TinyNet(), clock, lambda now: 1.0 if now < 1040 else 2.5)
    result = run(tmp_path, trained=trained, deadline=1100.0, train__epochs=15)
    assert result.stopped == "budget"
    assert clock.now <= 1100
    assert lines(tmp_path, "train")[-1]["lr"] < 0.001


def test_a_slow_start_is_made_up_for(tmp_path, clock):
    trained = Slow(TinyNet(), clock, lambda now: 4.0 if now < 1040 else 1.0)
    result = run(tmp_path, trained=trained, deadline=1140.0, train__epochs=100)
    assert 1120 <= clock.now <= 1140
    assert result.steps >= 85
    assert lines(tmp_path, "train")[-1]["lr"] == pytest.approx(0.01 * 0.01)


def test_enough_time_changes_nothing(tmp_path, clock):
    result = run(tmp_path, trained=Slow(TinyNet(), clock, 1.0), deadline=2000.0, train__epochs=4)
    assert (result.stopped, result.steps) == ("finished", 20)
    assert not lines(tmp_path, "plan")


def test_a_deadline_that_has_passed_still_validates_and_saves(tmp_path, clock):
    result = run(tmp_path, deadline=999.0)
    assert (result.stopped, result.steps) == ("budget", 0)
    assert "top1" in result.figures
    assert (tmp_path / "checkpoints" / "step-00000000.pt").exists()


class Interrupted(Exception):
    pass


def test_a_shortened_plan_survives_an_interruption(tmp_path, clock):
    class Stopping(Slow):
        steps = 0

        def after_step(self):
            self.steps += 1
            if self.steps == 30:
                raise Interrupted

    with pytest.raises(Interrupted):
        trained = Stopping(TinyNet(), clock, 1.0)
        run(tmp_path, trained=trained, deadline=1100.0, train__epochs=100, train__checkpoint_seconds=1.0)
    (planned,) = {line["total"] for line in lines(tmp_path, "plan")}
    result = run(tmp_path, trained=Slow(TinyNet(), clock, 0.01), train__epochs=100)
    assert result.steps == planned
    assert result.stopped == "budget"
