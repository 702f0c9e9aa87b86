import json
import math

import numpy as np
import pytest
import torch
from small_runs import PREPROCESS, MemoryIndex
from torch import nn

import vitrail.training.features as features
from vitrail.errors import InputError, RunError
from vitrail.training.features import warm_start_head


class ColourNet(nn.Module):
    """The mean of random channels: informative features at once."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)
        self.fc = nn.Linear(16, classes)

    def forward_features(self, images):
        return self.conv(images)

    def forward_head(self, maps, pre_logits=False):
        pooled = maps.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))

    def get_classifier(self):
        return self.fc


def model(classes=3):
    torch.manual_seed(0)
    return ColourNet(classes)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(features, "EPOCHS", 10)


def start(net, index, folder, rows=None, **options):
    rows = index.rows("train") if rows is None else rows
    settings = {"seconds": 60.0, "seed": 0, "folder": folder, **options}
    return warm_start_head(net, index, rows, PREPROCESS, **settings)


def logits(net, index, rows):
    images = torch.from_numpy(PREPROCESS.normalise(np.stack([index.read(int(row)) for row in rows])))
    with torch.no_grad():
        return net.eval()(images)


def test_head_learns_and_the_backbone_stays(tmp_path):
    index, net = MemoryIndex(300, 90), model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    report = start(net, index, tmp_path)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"fc.weight", "fc.bias"}
    assert (report.images, report.views, report.reused) == (300, 2, False)
    assert net.training
    rows = index.rows("val")
    top1 = (logits(net, index, rows).argmax(1).numpy() == index.targets(rows)).mean()
    assert top1 > 0.8
    assert abs(report.holdout_top1 - top1) < 0.15
    assert f"{report.holdout_top1:.1%}" in str(report)


def test_the_same_seed_gives_the_same_head_and_a_complete_cache_is_reused(tmp_path):
    index = MemoryIndex(80, 0)
    nets = [model(), model(), model()]
    first = start(nets[0], index, tmp_path / "a")
    again = start(nets[1], index, tmp_path / "a")
    fresh = start(nets[2], index, tmp_path / "b")
    assert (first.reused, again.reused, fresh.reused) == (False, True, False)
    for net in nets[1:]:
        assert torch.equal(net.fc.weight, nets[0].fc.weight)
        assert torch.equal(net.fc.bias, nets[0].fc.bias)


@pytest.mark.parametrize("change", ["weights", "seed", "rows", "damaged", "torn"])
def test_a_cache_of_something_else_is_not_reused(tmp_path, change):
    index, net, options = MemoryIndex(40, 0), model(), {}
    start(net, index, tmp_path)
    if change == "weights":
        with torch.no_grad():
            net.conv.weight.mul_(2)
    elif change == "seed":
        options["seed"] = 1
    elif change == "rows":
        options["rows"] = index.rows("train")[:30]
    elif change == "damaged":
        (tmp_path / "features.json").write_text("{")
    else:
        (tmp_path / "features.npy").write_bytes((tmp_path / "features.npy").read_bytes()[:500])
    assert not start(net, index, tmp_path, **options).reused


def test_time_and_size_bound_what_is_computed(tmp_path):
    index = MemoryIndex(300, 0)
    assert start(model(), index, tmp_path / "a", seconds=0.0).images == 64
    assert start(model(), index, tmp_path / "b", max_bytes=100 * 4 * 16).images == 100
    assert np.load(tmp_path / "b" / "features.npy", mmap_mode="r").shape == (2, 100, 16)


def test_unreadable_images_are_left_out(tmp_path):
    index = MemoryIndex(50, 0)
    index.broken = {3, 7}
    report = start(model(), index, tmp_path)
    assert report.images == 48
    assert not {3, 7} & set(json.loads((tmp_path / "features.json").read_text())["rows"])


def test_several_labels_per_image(tmp_path):
    index, net = MemoryIndex(300, 60, multilabel=True), model()
    report = start(net, index, tmp_path)
    assert math.isnan(report.holdout_top1)
    rows = index.rows("val")
    right = ((logits(net, index, rows) > 0).numpy() == index.targets(rows).astype(bool)).mean()
    assert right > 0.8


def test_weights_apply_to_features_as_they_are(tmp_path):
    """Centring and scaling, used in training, are folded into the weights."""
    index, net = MemoryIndex(200, 0), model()
    seen = []
    real = features._train

    def spy(*args):
        linear = real(*args)
        seen.append((linear, args[3], args[4]))
        return linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_train", spy)
        start(net, index, tmp_path)
    linear, mean, scale = seen[-1]
    some = torch.rand(5, 16)
    assert torch.allclose(net.fc(some), linear((some - mean) / scale), atol=1e-4)


def test_errors_say_what_to_do(tmp_path):
    index = MemoryIndex(10, 0)
    with pytest.raises(InputError, match="needs a linear classifier, and that of Conv2d is NoneType"):
        start(nn.Conv2d(3, 3, 1), index, tmp_path)
    with pytest.raises(InputError, match="no training images"):
        start(model(), index, tmp_path, rows=np.zeros(0, np.int64))
    net = model()
    with torch.no_grad():
        net.conv.weight.fill_(math.inf)
    with pytest.raises(RunError, match="not finite"):
        start(net, index, tmp_path)
