import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.errors import InputError
from vitrail.methods.supervised.token_labelling import (
    TokenLabelling,
    class_labels,
    draw_box,
    mixed,
    on_finer,
    on_grid,
    place_scores,
    prefix_of,
    token_labelling_losses,
    token_labels,
)
from vitrail.models import create_model


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(values):
    top = max(float(v.detach()) for v in values)
    powers = [torch.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


# ---- labels


def sample(scores, row, column):
    """Bilinear, between the middles of places; what is outside is the border's."""
    height, width = scores.shape
    row, column = min(max(row, 0.0), height - 1.0), min(max(column, 0.0), width - 1.0)
    top, left = int(row), int(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = row - top, column - left
    upper = (1 - across) * scores[top, left] + across * scores[top, right]
    lower = (1 - across) * scores[bottom, left] + across * scores[bottom, right]
    return (1 - down) * upper + down * lower


@pytest.mark.parametrize(("given", "grid"), [((4, 4), (4, 4)), ((2, 3), (4, 5)), ((6, 4), (2, 2)), ((5, 7), (2, 3))])
def test_labels_are_cut_out_of_a_map_of_scores(given, grid):
    scores = 3 * normal(2, 3, *given)
    found = token_labels(scores, grid)
    assert found.shape == (2, *grid, 3)
    points = [math.ceil(side / wanted) for side, wanted in zip(given, grid)]
    for b, i, j in np.ndindex(2, *grid):
        values = []
        for k in range(3):
            total = 0.0
            for p, q in np.ndindex(*points):
                row = (i + (p + 0.5) / points[0]) * given[0] / grid[0] - 0.5
                column = (j + (q + 0.5) / points[1]) * given[1] / grid[1] - 0.5
                total = total + sample(scores[b, k], row, column) / (points[0] * points[1])
            values.append(total)
        torch.testing.assert_close(found[b, i, j], torch.stack(softmax(values)))


def test_an_image_is_labelled_by_its_target_or_the_mean_of_its_places():
    scores = normal(3, 4, 2, 3)
    answer = scores.mean((2, 3)).softmax(1)
    target = answer.argmax(1)
    target[1] = (target[1] + 1) % 4
    truth = F.one_hot(target, 4).double()
    torch.testing.assert_close(class_labels(target, scores), truth)
    torch.testing.assert_close(class_labels(target, scores, "teacher"), answer)
    both = torch.stack([share * answer[n] + (1 - share) * truth[n] for n, share in enumerate((0.5, 0.9, 0.5))])
    torch.testing.assert_close(class_labels(target, scores, "both"), both)
    torch.testing.assert_close(class_labels(truth, scores, "both"), both)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("box", [None, (0, 1, 2, 3), (1, 1, 1, 2)])
def test_the_losses_are_the_papers(smoothing, box):
    count, height, width, classes = 5, 3, 4, 3
    logits, tokens = normal(count, classes), normal(count, height, width, classes, seed=1)
    target = normal(count, classes, seed=2).softmax(1)
    labels = normal(count, height, width, classes, seed=3).softmax(3)
    for value in (logits, tokens):
        value.requires_grad_()
    of_images = of_tokens = 0.0
    inside = 0 if box is None else (box[2] - box[0]) * (box[3] - box[1])
    share = 1 - inside / (height * width)
    for n in range(count):
        other = count - 1 - n
        p = softmax(logits[n])
        for k in range(classes):
            wanted = share * target[n, k] + (1 - share) * target[other, k]
            of_images = of_images - ((1 - smoothing) * wanted + smoothing / classes) * torch.log(p[k]) / count
        for i, j in np.ndindex(height, width):
            # As published: the answers of the box go back to the image that its tokens came from.
            back = box is not None and box[0] <= i < box[2] and box[1] <= j < box[3]
            p = softmax(tokens[other if back else n, i, j])
            for k in range(classes):
                wanted = (1 - smoothing) * labels[n, i, j, k] + smoothing / classes
                of_tokens = of_tokens - wanted * torch.log(p[k]) / (count * height * width)
    found = token_labelling_losses(logits, tokens, target, labels, smoothing=smoothing, box=box)
    torch.testing.assert_close(found, (of_images, of_tokens))
    for mine, slow in zip(found, (of_images, of_tokens)):
        grads = (
            torch.autograd.grad(loss, (logits, tokens), allow_unused=True, retain_graph=True) for loss in (mine, slow)
        )
        for ours, theirs in zip(*grads):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 3), (5, 2)])
def test_shapes_that_do_not_go_together_are_explained(shape):
    with pytest.raises(InputError, match="do not go together"):
        token_labelling_losses(torch.zeros(5, 3), torch.zeros(5, 2, 2, 3), torch.zeros(shape), torch.zeros(5, 2, 2, 3))


# ---- boxes and grids


def test_boxes_are_those_of_cutmix():
    class Given:
        def __init__(self, lam, *centres):
            self.lam, self.centres = lam, list(centres)

        def beta(self, one, other):
            assert (one, other) == (0.7, 0.7)
            return self.lam

        def integers(self, size):
            assert size in (10, 8)
            return self.centres.pop(0)

    # sqrt(1 - 0.64) = 0.6: sides 6 and 4 (of 4.8), around the row first and the column next, cut at the border.
    assert draw_box((10, 8), 0.7, Given(0.64, 5, 4)) == (2, 2, 8, 6)
    assert draw_box((10, 8), 0.7, Given(0.64, 1, 7)) == (0, 5, 4, 8)
    assert draw_box((10, 8), 0.7, Given(1.0, 5, 4)) == (5, 4, 5, 4)
    # sqrt(1 - 0.75) = 0.5: of an odd side, the middle goes to the end.
    assert draw_box((10, 8), 0.7, Given(0.75, 5, 4)) == (3, 2, 8, 6)
    boxes = [draw_box((4, 6), 1.0, np.random.default_rng(seed)) for seed in range(50)]
    assert all(0 <= t <= b <= 4 and 0 <= left <= right <= 6 for t, left, b, right in boxes)
    assert len(set(boxes)) > 10


def test_places_inside_the_box_come_from_the_reversed_batch():
    x = normal(3, 4, 5, 2)
    before = x.clone()
    found = mixed(x, (1, 0, 3, 2))
    for b, i, j in np.ndindex(3, 4, 5):
        source = 2 - b if 1 <= i < 3 and j < 2 else b
        assert torch.equal(found[b, i, j], x[source, i, j])
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("grid", "finer", "box", "wanted"),
    [
        ((4, 4), (8, 16), (1, 2, 3, 4), (2, 8, 6, 16)),
        ((4, 4), (4, 4), (0, 1, 2, 3), (0, 1, 2, 3)),
        ((6, 8), (11, 17), (5, 0, 6, 8), (10, 0, 11, 17)),  # rounded up, and down
        ((6, 8), (11, 17), (1, 1, 2, 7), (2, 2, 4, 14)),
    ],
)
def test_a_box_covers_the_patches_of_its_places(grid, finer, box, wanted):
    assert on_finer(box, grid, finer) == wanted


@pytest.mark.parametrize("size", [(32, 32), (28, 60), (45, 61)])
def test_tokens_and_maps_are_put_on_one_grid(size):
    rows, columns = (-(-side // 16) for side in size)
    grid = normal(2, rows, columns, 7)
    tokens = torch.cat((normal(2, 2, 7, seed=1), grid.flatten(1, 2)), 1)
    for x, options in ((tokens, {"prefix": 2}), (grid.movedim(3, 1), {}), (grid, {}), (grid, {"channels_last": True})):
        found = on_grid(x, size, **options)
        assert torch.equal(found, grid)
        assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    square = normal(2, 2, 2, 2)
    assert torch.equal(on_grid(square, (32, 32), channels_last=True), square)


@pytest.mark.parametrize("x", [torch.zeros(2, 5, 3), torch.zeros(2, 3), [torch.zeros(2, 4, 3)]])
def test_what_is_no_grid_is_explained(x):
    with pytest.raises(InputError, match=r"fill no grid|needs one"):
        on_grid(x, (32, 32))


def test_class_tokens_have_to_be_in_front():
    assert prefix_of(SimpleNamespace()) == 0
    assert prefix_of(SimpleNamespace(cls_token=1)) == 1
    assert prefix_of(SimpleNamespace(cls_token=1, num_prefix_tokens=2)) == 2
    with pytest.raises(InputError, match="one elsewhere"):
        prefix_of(SimpleNamespace(cls_token=1, num_prefix_tokens=0))


# ---- what a teacher says of places


class Net(nn.Module):
    """Each patch of four pixels is embedded; the layout is a parameter."""

    def __init__(self, layout="NCHW", classes=3, aux=False, wide=5):
        super().__init__()
        self.layout, self.num_features, self.num_classes = layout, wide, classes
        self.patch_embed = nn.Conv2d(3, wide, 2, 2)
        self.pool = nn.AvgPool2d(2, ceil_mode=True)
        self.mix = nn.Conv2d(wide, wide, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, classes)
        if layout == "cls":
            self.cls_token = nn.Parameter(torch.ones(1, 1, wide))
        if aux:
            self.aux_head = nn.Linear(wide, classes)

    def forward_features(self, x):
        x = self.mix(self.pool(self.patch_embed(x)))
        if self.layout == "NCHW":
            return x
        if self.layout == "NHWC":
            return x.movedim(1, 3)
        tokens = x.flatten(2).mT
        if self.layout == "cls":
            return torch.cat(((self.cls_token + tokens.mean(1, keepdim=True)), tokens), 1)
        return tokens

    def forward_head(self, x, pre_logits=False):
        places = {"NCHW": (2, 3), "NHWC": (1, 2)}
        x = x[:, 0] if self.layout == "cls" else x.mean(places.get(self.layout, 1))
        x = self.norm(x)
        return x if pre_logits else self.head(x)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC", "cls"])
def test_a_teacher_answers_for_each_place_alone(layout, aux):
    torch.manual_seed(0)
    net, images = Net(layout, aux=aux).double(), normal(2, 3, 8, 12)
    scores = place_scores(net, images)
    assert scores.shape == (2, 3, 2, 3)
    x = net.mix(net.pool(net.patch_embed(images)))
    for b, i, j in np.ndindex(2, 2, 3):
        wanted = net.aux_head(x[b, :, i, j]) if aux else net.head(net.norm(x[b, :, i, j]))
        torch.testing.assert_close(scores[b, :, i, j], wanted)


def test_a_teacher_without_a_second_head_answers_by_its_class_token():
    torch.manual_seed(0)
    for pool in ("token", "avg"):
        teacher = create_model("test_vit", num_classes=3, img_size=32, global_pool=pool).eval()
        images = torch.randn(2, 3, 32, 32)
        tokens = teacher.forward_features(images)[:, 1:]
        wanted = teacher.head(teacher.fc_norm(tokens))
        torch.testing.assert_close(place_scores(teacher, images).flatten(2).mT, wanted)


# ---- the method


def method_of(layout="NCHW", aux=False, **options):
    torch.manual_seed(0)
    return TokenLabelling(Net(layout, aux=aux), Net("NHWC"), **options).train()


def batch(count=5):
    return {"image": normal(count, 3, 8, 12).float(), "target": torch.arange(count) % 3}


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC", "cls"])
@pytest.mark.parametrize("options", [{}, {"mix_token": 0}, {"weight": 2.0, "class_target": "both", "smoothing": 0.0}])
def test_it_learns_the_labels_of_mixed_patches(layout, aux, options):
    method, data = method_of(layout, aux, **options), batch()
    net, images = method.model, data["image"]
    for number in range(3):
        box = None
        patches = net.patch_embed(images)
        if method.mix_token:
            box = draw_box((2, 3), 1.0, np.random.default_rng((int(method.seed), number)))
            top, left, bottom, right = (2 * at for at in box)
            patches = patches.clone()
            patches[:, :, top:bottom, left:right] = net.patch_embed(images).flip(0)[:, :, top:bottom, left:right]
        x = net.mix(net.pool(patches)).movedim(1, 3)
        pooled = x.mean((1, 2)) + (1 if layout == "cls" else 0)
        head = net.aux_head if aux else method.token_head
        scores = place_scores(method.teacher, images)
        supervised, places = token_labelling_losses(
            net.head(net.norm(pooled)),
            head(x),
            class_labels(data["target"], scores, options.get("class_target", "label")),
            token_labels(scores, (2, 3)),
            smoothing=options.get("smoothing", 0.1),
            box=box,
        )
        terms = method(data)
        torch.testing.assert_close(terms["loss"], supervised + options.get("weight", 0.5) * places)
        torch.testing.assert_close((terms["supervised"], terms["tokens"]), (supervised, places))
        method.after_step()
    assert net.training, "finding the grid leaves the model in evaluation mode"


def test_the_grid_is_found_without_a_trace():
    method, data = method_of(), batch()
    method.model.mix = nn.Sequential(method.model.mix, nn.BatchNorm2d(5))
    method.model.norm.eval()
    before, hooks = copy.deepcopy(method.model.state_dict()), len(method.model.patch_embed._forward_hooks)
    state = torch.get_rng_state()
    method._box(data["image"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    assert (method.model.training, method.model.norm.training) == (True, False)
    method(data)
    assert len(method.model.patch_embed._forward_hooks) == hooks == 0
    odd = method({**data, "image": data["image"][:, :, :7, :9]})
    assert odd["loss"].isfinite()
    assert method._grids == {(8, 12): (2, 3), (7, 9): (2, 2)}


def test_an_interrupted_run_goes_on_with_the_same_boxes():
    one, other, data = method_of(), method_of(), batch()
    for _ in range(3):
        one.after_step()
    other.load_state_dict(one.state_dict())
    assert one._box(data["image"]) == other._box(data["image"])
    boxes = set()
    for _ in range(8):
        boxes.add(one._box(data["image"]))
        one.after_step()
    assert len(boxes) > 3


def test_the_teacher_gets_no_gradient():
    method = method_of()
    method(batch())["loss"].backward()
    assert all(value.grad is None for value in method.teacher.parameters())
    assert all(value.grad is not None for value in method.parameters())
    assert not any("teacher" in name for name, _ in method.named_parameters())
    assert float(method.token_head.weight.detach().std()) == pytest.approx(0.02, rel=0.5)
    assert not method_of(aux=True).token_head


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small_resnet_nano", {"channels": (8, 8, 8, 8)}),
        ("test_vit", {"img_size": 32}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}),
        ("xcit_nano_12_p16_224", {"embed_dim": 16, "depth": 1, "num_heads": 1}),
        ("volo_d1_224", {"img_size": 32, "layers": (1, 1), "embed_dims": (8, 8), "num_heads": (1, 1)}),
        ("uniformer_nano", {}),
    ],
)
def test_backbones_of_many_kinds_learn_by_it(name, options):
    if name.startswith("volo"):
        from timm.models.volo import VOLO

        model = VOLO(num_classes=4, **options)
    else:
        model = create_model(name, num_classes=4, **options)
    teacher = create_model("small_resnet_nano", num_classes=4, channels=(8, 8, 8, 8))
    method = TokenLabelling(model, teacher).train()
    terms = method({"image": normal(3, 3, 32, 32).float(), "target": torch.arange(3)})
    terms["loss"].backward()
    assert all(value.grad is not None for value in method.parameters())
    assert method._grids[32, 32] in ((2, 2), (4, 4))


def test_without_mixing_it_is_a_mean_over_images():
    method, data = method_of(mix_token=0), batch()
    parts = [({name: value[part] for name, value in data.items()}, n) for part, n in ((slice(3), 3), (slice(3, 5), 2))]
    torch.testing.assert_close(sum(n / 5 * method(part)["loss"] for part, n in parts), method(data)["loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight = -1.0"),
        ({"mix_token": "on"}, "mix_token = 'on'"),
        ({"smoothing": 1.0}, "smoothing = 1.0"),
        ({"class_target": "truth"}, "class_target = 'truth'.*label, teacher, both"),
        ({"multilabel": True}, "several"),
        ({"patches": "stm"}, "has no 'stm'.*patch_embed, pool, mix"),
    ],
)
def test_options_that_cannot_be_used_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        method_of(**options)


def test_nets_that_cannot_be_used_are_explained():
    with pytest.raises(InputError, match="needs a teacher"):
        TokenLabelling(Net())
    with pytest.raises(InputError, match="student, Linear, has no forward_features"):
        TokenLabelling(nn.Linear(2, 2), Net())
    with pytest.raises(InputError, match="teacher, Linear, has no forward_features"):
        TokenLabelling(Net(), nn.Linear(2, 2))
    bare = Net()
    bare.embed = bare.patch_embed
    del bare.patch_embed
    with pytest.raises(InputError, match=r"has no patch_embed, stem.*method.options.patches"):
        TokenLabelling(bare, Net())
    assert not TokenLabelling(bare, Net(), mix_token=0).patches
    unused = Net()
    unused.stem = unused.patch_embed
    unused.other = nn.Identity()
    with pytest.raises(InputError, match="went past its layer 'other'"):
        TokenLabelling(unused, Net(), patches="other")(batch())
    with pytest.raises(InputError, match="do not go together"):
        TokenLabelling(Net(classes=4), Net(), class_target="teacher")(batch())
