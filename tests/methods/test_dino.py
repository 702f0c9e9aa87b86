import copy
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exact import moved, normal
from vitrail.data.preprocess import Preprocess
from vitrail.data.views import CropView, build_views
from vitrail.errors import InputError
from vitrail.methods.selfsup.dino import DINO, DINOHead, dino_loss
from vitrail.models import create_model
from vitrail.training.recipe import AugmentConfig, DataConfig

SMALL = {"out_dim": 6, "hidden_dim": 8, "bottleneck_dim": 4, "local_crops": 1}


def net(**options):
    torch.manual_seed(0)
    return create_model("small_resnet_nano", **{"num_classes": 3, "channels": (4, 4, 8, 8), **options})


def crops(method, images=3, side=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(images, 3, side, side, generator=rng) for name in method.views}
    return {**found, "target": torch.arange(images) % 3}


def slow_loss(student, teacher, center, student_temp, teacher_temp):
    """Add the cross-entropies up, image by image and pair by pair."""
    total, terms = 0.0, 0
    for t, wanted in enumerate(teacher):
        for v, found in enumerate(student):
            if t == v:
                continue
            terms += 1
            for b in range(student.shape[1]):
                q = torch.exp((wanted[b] - center) / teacher_temp)
                p = torch.exp(found[b] / student_temp)
                total = total - (q / q.sum() * torch.log(p / p.sum())).sum() / student.shape[1]
    return total / terms


@pytest.mark.parametrize(
    ("views", "taught", "images", "outputs"), [(2, 2, 1, 3), (5, 2, 3, 4), (3, 1, 2, 7), (4, 3, 2, 2)]
)
def test_the_loss_is_the_slow_sum(views, taught, images, outputs):
    student = normal(views, images, outputs).requires_grad_()
    teacher, center = normal(taught, images, outputs, seed=1).requires_grad_(), normal(outputs, seed=2)
    ours = dino_loss(student, teacher, center, student_temp=0.5, teacher_temp=0.3)
    theirs = slow_loss(student, teacher.detach(), center, 0.5, 0.3)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    (wanted,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(student.grad, wanted, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None


def test_the_heads_outputs_are_cosines():
    head = moved(DINOHead(5, 7, hidden_dim=6, bottleneck_dim=4))
    x = normal(3, 5)
    inner = x
    for number in (0, 2, 4):
        layer = head.mlp[number]
        inner = inner @ layer.weight.T + layer.bias
        if number < 4:
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    wanted = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in head.prototypes]) for a in inner])
    torch.testing.assert_close(head(x), wanted)
    longer = DINOHead(5, 7, hidden_dim=6, bottleneck_dim=4, norm_last_layer=False).double()
    longer.load_state_dict({**head.state_dict(), "lengths": torch.full((7, 1), 3.0)})
    torch.testing.assert_close(longer(x), 3 * head(x))


def test_the_head_begins_as_published():
    torch.manual_seed(0)
    head = DINOHead(64, 500, hidden_dim=64, bottleneck_dim=16)
    for layer in head.mlp[::2]:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    assert float(head.prototypes.detach().abs().max()) == pytest.approx(16**-0.5, rel=0.01)
    assert DINOHead(4).prototypes.shape == (65536, 256)
    torch.manual_seed(0)
    longer, x = DINOHead(64, 500, hidden_dim=64, bottleneck_dim=16, norm_last_layer=False), torch.randn(2, 64)
    torch.testing.assert_close(longer(x), head(x))


def test_the_defaults_are_the_published_ones():
    published = {
        "local_crops": 8,
        "out_dim": 65536,
        "hidden_dim": 2048,
        "bottleneck_dim": 256,
        "norm_last_layer": True,
        "student_temp": 0.1,
        "teacher_temp": 0.04,
        "warmup_teacher_temp": 0.04,
        "warmup": 0.0,
        "momentum": 0.996,
        "center_momentum": 0.9,
        "freeze_last_layer": 0.01,
    }
    defaults = {name: option.default for name, option in inspect.signature(DINO).parameters.items()}
    assert {name: defaults[name] for name in published} == published


def test_a_frozen_last_layer_gets_a_gradient_of_zero():
    head = DINOHead(4, 5, hidden_dim=4, bottleneck_dim=3, norm_last_layer=False)
    head.frozen = True
    x = torch.randn(2, 4)
    before = head(x)
    before.square().sum().backward()
    assert not head.prototypes.grad.any()
    assert not head.lengths.grad.any()
    assert head.mlp[0].weight.grad.any()
    head.frozen = False
    torch.testing.assert_close(head(x), before)
    head(x).square().sum().backward()
    assert head.prototypes.grad.any()


def test_the_method_adds_its_parts():
    method = DINO(net(), **{**SMALL, "local_crops": 2}, teacher_temp=0.3, student_temp=0.7).train()
    method.center.normal_()
    batch = crops(method)
    model, teacher = copy.deepcopy(method.model), copy.deepcopy(method.teacher)
    terms = method.loss(batch)
    large = torch.cat([batch["global_1"], batch["global_2"]])
    small = torch.cat([batch["local_0"], batch["local_1"]])

    def features(of, images):
        return of.forward_head(of.forward_features(images), pre_logits=True)

    teaching = method.teacher_head(features(teacher, large)).view(2, 3, 6)
    seen = features(model, large)
    learning = method.head(torch.cat((seen, features(model, small)))).view(4, 3, 6)
    wanted = dino_loss(learning, teaching, method.center, student_temp=0.7, teacher_temp=0.3)
    torch.testing.assert_close(terms["dino"], wanted)
    targets = batch["target"].repeat(2)
    torch.testing.assert_close(terms["probe"], F.cross_entropy(model.get_classifier()(seen), targets))
    torch.testing.assert_close(terms["loss"], terms["dino"] + terms["probe"])


def test_labels_teach_the_probe_alone():
    grads = []
    for shift in (0, 1):
        method = DINO(net(), **SMALL)
        batch = crops(method)
        batch["target"] = (batch["target"] + shift) % 3
        method(batch)["loss"].backward()
        grads.append({name: parameter.grad for name, parameter in method.named_parameters() if parameter.requires_grad})
    differ = {name for name in grads[0] if not torch.equal(grads[0][name], grads[1][name])}
    classifier = method.model.get_classifier()
    own = {name for name, p in method.named_parameters() if any(p is q for q in classifier.parameters())}
    assert differ == own
    blind = DINO(net(num_classes=0), **SMALL)
    assert set(blind(crops(blind))) == {"loss"}


def test_several_labels_of_an_image_teach_the_probe_each():
    method = DINO(net(), **SMALL, multilabel=True).eval()
    batch = {**crops(method), "target": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])}
    large = torch.cat([batch["global_1"], batch["global_2"]])
    wanted = F.binary_cross_entropy_with_logits(method.model(large), batch["target"].repeat(2, 1))
    torch.testing.assert_close(method.loss(batch)["probe"], wanted.detach())


def test_the_centre_follows_the_teachers_mean_over_all_parts_of_a_step():
    method = DINO(net(), **SMALL, center_momentum=0.6)
    method.teacher.eval()
    answers = []
    method.teacher_head.register_forward_hook(lambda _m, _i, out: answers.append(out))
    method.center += 1.0
    for seed, images in enumerate((3, 2)):
        method(crops(method, images, seed=seed))
    method.after_step()
    torch.testing.assert_close(method.center, 0.6 * torch.ones(6) + 0.4 * torch.cat(answers).mean(0))
    before = method.center.clone()
    method.eval()(crops(method))
    method.after_step()
    torch.testing.assert_close(method.center, before)


def test_the_teacher_follows_the_student_ever_more_slowly():
    method = DINO(net(), **SMALL, momentum=0.8)
    before = copy.deepcopy(method.teacher.state_dict()), copy.deepcopy(method.teacher_head.state_dict())
    with torch.no_grad():
        for parameter in (*method.model.parameters(), *method.head.parameters()):
            parameter.add_(1.0)
    for progress, share in ((0.0, 0.2), (0.5, 0.1), (1.0, 0.0)):
        method.schedule(progress)
        assert 1 - method.momentum == pytest.approx(share)
    method.schedule(0.0)
    method.after_step()
    for module, old in zip((method.teacher, method.teacher_head), before):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter, old[name] + 0.2)
            assert not parameter.requires_grad


def test_the_schedule_warms_the_teacher_and_frees_the_last_layer():
    method = DINO(net(), **SMALL, teacher_temp=0.08, warmup_teacher_temp=0.04, warmup=0.5, freeze_last_layer=0.2)
    found = []
    for progress in (0.0, 0.1, 0.25, 0.5, 1.0):
        method.schedule(progress)
        found.append((round(method.teacher_temp, 6), method.head.frozen))
    assert found == [(0.04, True), (0.048, True), (0.06, False), (0.08, False), (0.08, False)]


def test_the_teacher_drops_nothing_but_normalises_by_the_batch():
    method = DINO(net(drop_rate=0.5), **SMALL).train()
    modes = {type(module).__name__: module.training for module in method.teacher.modules() if not [*module.children()]}
    assert modes["BatchNorm2d"]
    assert not any(training for name, training in modes.items() if name != "BatchNorm2d")
    assert not method.teacher.training
    assert not any(module.training for module in method.eval().teacher.modules())


def test_it_asks_for_as_many_crops_as_it_is_told():
    assert list(DINO(net(), **SMALL).views) == ["global_1", "global_2", "local_0"]
    assert list(DINO.views)[2:] == [f"local_{number}" for number in range(8)]
    alone = DINO(net(), **{**SMALL, "local_crops": 0})
    assert alone(crops(alone))["loss"].isfinite()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("local_crops", -1, "0 or more"),
        ("out_dim", 0, "1 or more"),
        ("bottleneck_dim", 0, "1 or more"),
        ("student_temp", 0.0, "1e-06 or more"),
        ("teacher_temp", -1.0, "1e-06 or more"),
        ("momentum", 1.1, "a number from 0 to 1"),
        ("warmup", -0.1, "a number from 0 to 1"),
        ("freeze_last_layer", 2.0, "a number from 0 to 1"),
    ],
)
def test_options_out_of_range_are_explained(option, value, allowed):
    with pytest.raises(InputError, match=rf"method\.options\.{option} = {value} is not allowed: give {allowed}"):
        DINO(net(), **{**SMALL, option: value})


def test_a_classifier_that_is_not_linear_is_refused():
    model = net()
    model.get_classifier = lambda: nn.ModuleList()
    with pytest.raises(InputError, match="is a ModuleList, and the probe needs one linear layer"):
        DINO(model, **SMALL)


# ---- the crops


def views(**augment):
    config = AugmentConfig(**{"policy": "crop", "flip": 0.0, **augment})
    names = {"global_1": "global_1", "global_2": "global_2", "local_0": "local"}
    return build_views(names, Preprocess((28, 56), mean=(0.5,) * 3, std=(0.5,) * 3), config, DataConfig())


def test_the_crops_are_dinos():
    found = views(flip=0.3)
    assert [view.preprocess.size for view in found.values()] == [(28, 56), (28, 56), (12, 24)]
    assert [view.scale for view in found.values()] == [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)]
    assert [(view.blur, view.solarize, view.flip) for view in found.values()] == [
        (1.0, 0.0, 0.3),
        (0.1, 0.2, 0.3),
        (0.5, 0.0, 0.3),
    ]
    with pytest.raises(InputError, match=r"augment\.flip is still 'auto'"):
        views(flip="auto")


def picture():
    """Return an image whose colours rise from left to right."""
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    return np.stack([np.tile(ramp, (40, 1)), np.tile(ramp[::-1], (40, 1)), np.full((40, 40), 90, np.uint8)], 2)


def draw(count=300, **options):
    size = Preprocess((20, 20), mean=(0.5,) * 3, std=(0.5,) * 3)
    view = CropView(size, **{"scale": (1.0, 1.0), "flip": 0.0, "blur": 0.0, **options})
    return view.batch([picture()] * count, [np.random.default_rng(number) for number in range(count)]).astype(int)


def share(found):
    return pytest.approx(float(np.mean(found)), abs=0.09)


def test_crops_change_as_often_as_they_should():
    plain = draw()
    grey = (plain.max(3) - plain.min(3)).max((1, 2)) == 0
    assert share(grey) == 0.2
    flipped = draw(flip=0.5)
    towards = [int(np.sign(one[:, -1].astype(int).sum(0)[0] - one[:, 0].sum(0)[0])) for one in flipped]
    assert share([sign < 0 for sign, dull in zip(towards, grey) if not dull]) == 0.5
    dark = [one.max() <= 128 for one in draw(100, solarize=1.0)]
    assert np.mean(dark) > 0.95


def test_colours_are_jittered_within_their_bounds():
    plain = draw(400)
    means = plain.mean((1, 2, 3)) / picture().mean()
    assert 0.5 < means.min() < 0.7
    assert 1.3 < means.max() < 1.5
    # Red rises and green falls along a row; a turn of the hue by a tenth at most leaves them so.
    colourful = [one for one in plain if np.ptp(one, axis=2).max() > 0]
    assert all(one[:, -1, 0].mean() > one[:, -1, 1].mean() for one in colourful)
    assert len({round(float(one[:, -1, 2].mean() / one[:, -1].mean()), 2) for one in colourful}) > 50


def test_small_crops_are_blurred_less():
    sharp = picture()
    sharp[:, ::2] = 255 - sharp[:, ::2]
    big = Preprocess((40, 40), mean=(0.5,) * 3, std=(0.5,) * 3)
    rngs = [np.random.default_rng(number) for number in range(40)]
    blurred = CropView(big, scale=(1.0, 1.0), flip=0.0, blur=1.0).batch([sharp] * 40, rngs).astype(float)
    rngs = [np.random.default_rng(number) for number in range(40)]
    as_it_is = CropView(big, scale=(1.0, 1.0), flip=0.0, blur=0.0).batch([sharp] * 40, rngs).astype(float)
    kept = np.abs(np.diff(blurred, axis=2)).mean() / np.abs(np.diff(as_it_is, axis=2)).mean()
    assert 0.6 < kept < 1.0


def test_it_learns_to_tell_pictures_apart():
    """A probe of what was learned without labels beats a probe of where learning began."""
    torch.manual_seed(0)
    images, labels = stripes(192, seed=0)
    others, wanted = stripes(96, seed=1)
    model = create_model("xcit_nano", num_classes=0, embed_dim=16, depth=1, num_heads=2, patch_size=8)
    before = probe(model, images, labels, others, wanted)
    options = {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "local_crops": 0, "momentum": 0.9}
    method = DINO(model, **options, freeze_last_layer=0.0).train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    for step in range(30):
        rng = torch.Generator().manual_seed(step)
        chosen = images[torch.randperm(len(images), generator=rng)[:32]]
        pair = [chosen + 0.5 * torch.randn(chosen.shape, generator=rng) for _ in range(2)]
        method.schedule(step / 30)
        method({"global_1": pair[0], "global_2": pair[1]})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    assert probe(model, images, labels, others, wanted) > before


def stripes(count, seed):
    """Return noisy images of stripes of three directions, at any place, and which."""
    rng = torch.Generator().manual_seed(seed)
    labels, shift = torch.arange(count) % 3, 6.3 * torch.rand(count, 1, 1, generator=rng)
    down, across = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ways = torch.stack([down, across, (down + across) / 2**0.5])[labels]
    images = torch.sin(ways + shift)[:, None].expand(-1, 3, -1, -1)
    return images + 1.0 * torch.randn(count, 3, 24, 24, generator=rng), labels


@torch.no_grad()
def probe(model, images, labels, others, wanted):
    """Return the accuracy on other images of a least-squares classifier of the features."""
    model.eval()
    x, y = (F.pad(model(part), (0, 1), value=1.0).double() for part in (images, others))
    model.train()
    hot = F.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=torch.float64), x.T @ hot)
    return float(((y @ weights).argmax(1) == wanted).double().mean())
