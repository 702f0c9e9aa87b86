import sys
from itertools import islice
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import nn

from vitrail.data.synthetic.shapes import batches
from vitrail.errors import InputError
from vitrail.evaluate.dense import average_precision, confusion, mean_iou
from vitrail.models import create_model
from vitrail.models.dense import (
    Pyramid,
    Segmenter,
    UPerHead,
    _LevelOf,
    detector,
    pyramid,
    segmentation_loss,
    segmenter,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "contracts"))
from probes import unsettled
from subjects import models

DENSE = [model.name for card, model in models() if {"dense", "nano"} <= model.traits]


class Stub(nn.Module):
    """A net of features of these strides, whose values are the mean of the pixels that a place covers."""

    def __init__(self, strides, channels_last=False):
        super().__init__()
        info = [{"num_chs": 8 + place, "reduction": stride, "module": ""} for place, stride in enumerate(strides)]
        self.feature_info = FeatureInfo(info, tuple(range(len(strides))))
        if channels_last:
            self.output_fmt = "NHWC"

    def forward(self, x):
        maps = [F.avg_pool2d(x, s, ceil_mode=True)[:, :1] for s in self.feature_info.reduction()]
        maps = [x.expand(-1, wide, -1, -1) for x, wide in zip(maps, self.feature_info.channels())]
        return [x.permute(0, 2, 3, 1) for x in maps] if hasattr(self, "output_fmt") else maps


def gradient_norms(net):
    return {name: float(p.grad.norm()) for name, p in net.named_parameters() if p.grad is not None}


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---- any backbone


@pytest.mark.parametrize("name", DENSE)
def test_both_heads_take_every_dense_model(name):
    torch.manual_seed(0)
    net = unsettled(create_model(name, num_classes=0, features_only=True))
    x = images(2, 3, 32, 40)
    model = segmenter(net, 3, width=8)
    logits = model(x)
    assert logits.shape == (2, 3, 32, 40)
    segmentation_loss(logits, torch.ones(2, 32, 40, dtype=torch.int64)).backward()
    first = gradient_norms(net)
    assert sum(value > 0 for value in first.values()) > 0.8 * len(first) > 0
    net.zero_grad()
    model = detector(net, 3, width=8)
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 20.0, 18.0]]), "labels": torch.tensor([1])}] * 2
    losses = model(x, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert gradient_norms(net).keys() == first.keys()


@pytest.mark.parametrize("name", ["small_resnet_nano", "mambaeye_nano"])
@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_images_of_several_odd_sizes_go_together(name, kind):
    torch.manual_seed(0)
    model = detector(name, 4, width=8, kind=kind, levels=2)
    sizes = [(45, 61), (28, 28)]
    target = {"boxes": torch.tensor([[3.0, 3.0, 20.0, 22.0]]), "labels": torch.tensor([3])}
    losses = model([images(3, *size) for size in sizes], [target, target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.backbone.fpn.parameters())
    with torch.no_grad():
        found = model.eval()([images(3, *size) for size in sizes])
    for one, (height, width) in zip(found, sizes):
        assert len(one["boxes"]) == len(one["scores"]) == len(one["labels"])
        assert ((one["boxes"] >= 0) & (one["boxes"] <= torch.tensor([width, height] * 2))).all()


@pytest.mark.parametrize("size", [(28, 28), (45, 61), (64, 64)])
def test_a_segmenter_takes_any_size(size):
    model = segmenter("small_resnet_nano", 3, width=8, levels=3).eval()
    assert model(images(1, 3, *size)).shape == (1, 3, *size)


# ---- pyramids


def test_of_several_maps_of_a_stride_the_last_counts():
    net = Pyramid(Stub([1, 1, 2, 4, 4]))
    assert (net.strides, net.channels) == ([1, 2, 4], [9, 10, 12])
    assert [x.shape[1] for x in net(images(1, 3, 8, 8))] == [9, 10, 12]


def test_the_coarsest_levels_are_taken():
    net = Pyramid(Stub([1, 2, 4, 8, 16]), levels=2)
    assert (net.strides, net.channels) == ([8, 16], [11, 12])
    assert Pyramid(Stub([1, 2, 4, 8, 16])).strides == [2, 4, 8, 16]


def test_channels_come_second():
    x = images(2, 3, 16, 24)
    for plain, last in zip(Pyramid(Stub([2, 4]))(x), Pyramid(Stub([2, 4], channels_last=True))(x)):
        assert torch.equal(plain, last)


@pytest.mark.parametrize(
    ("stride", "strides", "channels"),
    [(16, [4, 8, 16, 32], [2, 5, 10, 10]), (4, [4, 8, 16, 32], [10] * 4), (14, [7, 14, 28, 56], [5, 10, 10, 10])],
)
def test_a_plain_net_gives_four_strides(stride, strides, channels):
    torch.manual_seed(0)
    net = Pyramid(Stub([stride] * 3))
    assert (net.strides, net.channels) == (strides, channels)
    x = images(1, 3, 112, 2 * 112)
    maps = net(x)
    for found, side, wide in zip(maps, strides, channels):
        assert found.shape == (1, wide, -(-112 // side), -(-224 // side))
    last = net.net(x)[-1]
    assert torch.equal(maps[strides.index(stride)], last)
    assert torch.equal(maps[strides.index(2 * stride)], F.max_pool2d(last, 2, ceil_mode=True))
    assert Pyramid(Stub([stride]), levels=2).strides == strides[-2:]


def test_weights_reach_the_features(tmp_path):
    for name in ("mambavision_nano", "small_resnet_nano", "mambaeye_nano"):
        torch.manual_seed(1)
        whole = create_model(name, num_classes=5)
        torch.save(whole.state_dict(), tmp_path / "weights.pth")
        net = pyramid(name, pretrained=str(tmp_path / "weights.pth"))
        x = images(1, 3, 32, 32)
        twin = timm.create_model(name, features_only=True)
        twin.load_state_dict(net.net.state_dict())
        known = {tuple(value.shape): value for value in whole.state_dict().values()}
        for value in net.net.state_dict().values():
            assert tuple(value.shape) in known
        first = next(p for p in net.net.parameters() if p.dim() > 1)
        assert any(torch.equal(first, p) for p in whole.parameters())
        assert all(torch.equal(a, b) for a, b in zip(net.net.eval()(x), twin.eval()(x)))


# ---- UPerNet


def slow_upernet(head, maps):
    """Follow figure 4 of the paper, one step after the other."""
    last = maps[-1]
    size = last.shape[-2:]
    grids = []
    for side, branch in zip((1, 2, 3, 6), head.pooled):
        rows = []
        for row in range(side):
            top, bottom = row * size[0] // side, -(-(row + 1) * size[0] // side)
            for column in range(side):
                left, right = column * size[1] // side, -(-(column + 1) * size[1] // side)
                rows.append(last[:, :, top:bottom, left:right].mean((2, 3)))
        grid = torch.stack(rows, 2).unflatten(2, (side, side))
        grids.append(F.interpolate(branch[1](grid), size, mode="bilinear"))
    down = head.bottleneck(torch.cat([last, *grids], 1))
    merged = [down]
    for place in (2, 1, 0)[-(len(maps) - 1) :]:
        lateral = head.laterals[place](maps[place])
        down = lateral + F.interpolate(down, lateral.shape[-2:], mode="bilinear")
        merged = [head.smooth[place](down), *merged]
    merged = [F.interpolate(x, maps[0].shape[-2:], mode="bilinear") for x in merged]
    return head.classifier(head.fuse(torch.cat(merged, 1)))


@pytest.mark.parametrize("size", [(24, 24), (21, 34)])
def test_the_head_is_upernets(size):
    torch.manual_seed(0)
    head = UPerHead([4, 6, 8, 10], 3, 8).double().eval()
    maps = [
        torch.randn(2, wide, -(-size[0] // s), -(-size[1] // s), dtype=torch.float64, requires_grad=True)
        for wide, s in zip((4, 6, 8, 10), (1, 2, 4, 8))
    ]
    ours, slow = head(maps), slow_upernet(head, maps)
    torch.testing.assert_close(ours, slow)
    for one, other in zip(torch.autograd.grad(ours.sum(), maps), torch.autograd.grad(slow.sum(), maps)):
        torch.testing.assert_close(one, other)


def test_the_head_has_the_published_size():
    with torch.device("meta"):
        head = UPerHead([96, 192, 384, 768], 150, 512)
        segmenter_of = Segmenter(Pyramid(Stub([4, 8, 16, 32])), 150, 512, auxiliary=True)
    # Swin-T with UPerNet has 60 M parameters with the auxiliary head of width 256, of which 27.5 M are Swin-T's.
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(31.5, abs=0.1)
    assert segmenter_of.auxiliary[0][0].in_channels == 10


def test_weights_of_the_head_begin_as_usual():
    torch.manual_seed(0)
    head = UPerHead([32, 64], 200, 64)
    assert float(head.classifier[1].weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert not head.classifier[1].bias.any()
    assert float(head.fuse[0].weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_the_second_head_learns_from_the_map_before_the_last():
    torch.manual_seed(0)
    model = Segmenter(Pyramid(Stub([2, 4])), 3, 8, auxiliary=True)
    x, masks = images(2, 3, 16, 16), torch.ones(2, 16, 16, dtype=torch.int64)
    logits, second = model(x)
    assert logits.shape == second.shape == (2, 3, 16, 16)
    loss = segmentation_loss((logits, second), masks)
    torch.testing.assert_close(loss, F.cross_entropy(logits, masks) + 0.4 * F.cross_entropy(second, masks))
    assert model.eval()(x).shape == (2, 3, 16, 16)


def test_pixels_that_do_not_count_are_left_out():
    logits = images(2, 3, 4, 5).requires_grad_()
    masks = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    masks[0] = 255
    wanted = F.cross_entropy(logits[1:], masks[1:])
    torch.testing.assert_close(segmentation_loss(logits, masks), wanted)
    nothing = segmentation_loss(logits, torch.full_like(masks, 255))
    assert nothing == 0
    nothing.backward()


# ---- detection


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_anchors_follow_the_strides(kind):
    model = detector(Stub([2, 4]), 3, width=8, kind=kind)
    generator = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    wanted = [[4 * stride * 2 ** (octave / 3) for octave in range(3)] for stride in (2, 4, 8)]
    for found, sizes in zip(generator.sizes, wanted, strict=True):
        assert found == pytest.approx(sizes)
    batch, _ = model.transform([images(3, 17, 9)])
    assert batch.tensors.shape == (1, 3, 24, 16)
    maps = list(model.backbone(batch.tensors).values())
    assert [tuple(x.shape[2:]) for x in maps] == [(12, 8), (6, 4), (3, 2)]
    anchors = generator(batch, maps)[0]
    # The first of the second row, on each level: one stride below the first.
    start = 0
    for x, stride in zip(maps, (2, 4, 8)):
        below = anchors[start + 9 * x.shape[3]] - anchors[start]
        assert below.tolist() == [0, stride, 0, stride]
        start += 9 * x.shape[2] * x.shape[3]


def test_images_stay_as_they_are_but_for_zeros_around():
    model = detector(Stub([2, 4]), 3, width=8).eval()
    one, other = images(3, 9, 20), images(3, 17, 5)
    batch, _ = model.transform([one, other])
    assert batch.image_sizes == [(9, 20), (17, 5)]
    assert torch.equal(batch.tensors[0, :, :9, :20], one)
    assert torch.equal(batch.tensors[1, :, :17, :5], other)
    assert batch.tensors[0, :, 9:].abs().sum() == 0


def test_a_box_is_looked_for_at_the_published_level():
    sides = [5.0, 27.9, 28.0, 55.9, 56.0, 111.9, 112.0, 500.0]
    boxes = [torch.tensor([[3.0, 2.0, 3 + side, 2 + side] for side in sides])]
    # floor(4 + log2(side / 224)), between 1 and 3: strides of 2, 4 and 8.
    assert _LevelOf([2, 4, 8])(boxes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    narrow = [torch.tensor([[0.0, 0.0, 28.0, 112.0]])]
    assert _LevelOf([2, 4, 8])(narrow).tolist() == [1]


def test_boxes_are_pooled_where_they_are():
    model = detector(Stub([3, 6]), 3, width=8, kind="faster_rcnn")
    assert model.roi_heads.box_roi_pool.scales == [1 / 3, 1 / 6]
    rows = torch.arange(48.0)[None, None, :, None].expand(1, 1, 48, 48)
    maps = {str(place): F.avg_pool2d(rows, stride) for place, stride in enumerate((3, 6))}
    box = torch.tensor([[6.0, 12.0, 36.0, 42.0]])
    pooled = model.roi_heads.box_roi_pool(maps, [box], [(48, 48)])
    assert float(pooled.mean()) == pytest.approx((12 + 42) / 2 + 1, abs=0.6)


# ---- learning


def schedule(model, rate, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)


def test_a_segmenter_learns_where_shapes_are():
    torch.manual_seed(0)
    steps = 20
    model = segmenter("small_resnet_nano", 2, width=32, levels=3)
    optimizer, rates = schedule(model, 1e-2, steps)
    for x, masks, _ in islice(batches(8, size=(32, 32), most=2), steps):
        optimizer.zero_grad()
        segmentation_loss(model(x), masks.clamp(max=1)).backward()
        optimizer.step()
        rates.step()
    x, masks, _ = next(batches(32, seed=1, size=(32, 32), most=2))
    with torch.no_grad():
        counts = confusion(model.eval()(x).argmax(1), masks.clamp(max=1), 2)
    majority = confusion(torch.zeros_like(masks), masks.clamp(max=1), 2)
    assert mean_iou(counts) > 0.7 > 0.5 > mean_iou(majority)


def of_one_class(targets):
    return [{"boxes": one["boxes"], "labels": torch.ones_like(one["labels"])} for one in targets]


def test_a_detector_learns_where_shapes_are():
    torch.manual_seed(0)
    steps = 40
    model = detector("mambavision_nano", 2, width=32, levels=3)
    x, _, truth = next(batches(16, seed=1, size=(32, 32), most=2))

    def precision():
        with torch.no_grad():
            return average_precision(model.eval()(x), of_one_class(truth))

    untrained = precision()
    optimizer, rates = schedule(model.train(), 3e-3, steps)
    for batch, _, targets in islice(batches(4, size=(32, 32), most=2), steps):
        optimizer.zero_grad()
        sum(model(batch, of_one_class(targets)).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        rates.step()
    assert precision() > 0.15 > 0.05 > untrained


# ---- what cannot be had


@pytest.mark.parametrize("build", [segmenter, detector])
@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("small_resnet_nana", {}, "did you mean 'small_resnet_nano'"),
        ("small_resnet_nano", {"depths": 3}, "does not take the option 'depths'"),
        ("small_resnet_nano", {"pretrained": "no.pth"}, "cannot find the weights"),
        ("small_resnet_nano", {"num_classes": 1}, "two classes or more"),
        ("small_resnet_nano", {"width": 0}, "a width of 1 or more"),
        ("small_resnet_nano", {"levels": 0}, "levels = 0"),
        ("mlp_mixer_none", {}, "unknown model"),
        ("mixer_s32_224", {"out_indices": (99,)}, "gives no maps of features"),
        (nn.Linear(2, 2), {}, "a Linear gives no maps of features"),
        (Stub([2, 4]), {"pretrained": "auto"}, "pretrained cannot be given"),
        (Stub([2, 4]), {"in_chans": 1}, "in_chans cannot be given"),
    ],
)
def test_what_cannot_be_built_is_refused(build, backbone, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build(backbone, **{"num_classes": 3, **options})
    assert "\n" not in str(caught.value)


def test_a_classifier_is_no_net_of_features():
    with pytest.raises(InputError, match="features_only=True"):
        segmenter(create_model("small_resnet_nano", num_classes=3), 3)


def test_another_detector_is_refused():
    with pytest.raises(InputError, match="'faster_rcnn'"):
        detector("small_resnet_nano", 3, kind="faster_rnn")


def test_one_image_alone_cannot_train():
    with pytest.raises(InputError, match="two or more"):
        segmenter("small_resnet_nano", 3, width=8)(images(1, 3, 32, 32))


@pytest.mark.parametrize("masks", [torch.zeros(2, 4, 4), torch.zeros(2, 5, 4, dtype=torch.int64)])
def test_masks_that_do_not_fit_are_refused(masks):
    with pytest.raises(InputError, match="do not fit logits"):
        segmentation_loss(images(2, 3, 4, 4), masks)
