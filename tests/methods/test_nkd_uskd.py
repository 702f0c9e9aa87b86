import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from once import quick_run
from vitrail.checks import nkd_uskd as check
from vitrail.errors import InputError
from vitrail.methods.distill.nkd_uskd import NKD, USKD, nkd_loss, target_squares, uskd_loss
from vitrail.models import create_model
from vitrail.training.optim import param_groups
from vitrail.training.recipe import OptimConfig


def softmax(values):
    top = max(float(v.detach()) for v in values)
    powers = [torch.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def slow_nkd(student, teacher, target, gamma, temperature):
    """The definition, image by image and class by class."""
    total = 0.0
    for z, y, t in zip(student, teacher, target):
        t = int(t.argmax()) if t.ndim else int(t)
        total = total - softmax(y)[t].detach() * torch.log(softmax(z)[t])
        others = [i for i in range(len(z)) if i != t]
        s = softmax([z[i] / temperature for i in others])
        soft = softmax([y[i] / temperature for i in others])
        total = total - gamma * temperature**2 * sum(b.detach() * torch.log(a) for a, b in zip(s, soft))
    return total / len(student)


def slow_uskd(student, weak, target, alpha, beta, mu):
    """The published definition, image by image and class by class."""
    classes = student.shape[1]
    labels = [
        {int(t): 1.0} if t.ndim == 0 else {int(i): float(t[i]) for i in t.argsort(descending=True)[:2] if t[i] > 0}
        for t in target
    ]
    s, w = [softmax(z) for z in student], [softmax(z) for z in weak]
    mean = [0.0, 0.0]
    for p, label in zip(s, labels):
        for k, t in enumerate(label):
            mean[k] += float(p[t].detach()) ** 2 / len(student)
    total = 0.0
    for n, label in enumerate(labels):
        for k, (t, share) in enumerate(label.items()):
            total = total - alpha * (share + s[n][t].item() ** 2 - mean[k]) * torch.log(s[n][t])
        w_t, s_t = sum(w[n][t].item() for t in label), sum(math.log(s[n][t].item()) for t in label)
        score = [
            w[n][i].item() / (1 - w_t + 1e-6) + math.log(s[n][i].item()) / (1 - s_t + 1e-6) for i in range(classes)
        ]
        rank = {i: 1 + sum(other > score[i] for other in score) for i in range(classes)}
        others = [i for i in range(classes) if i not in label]
        zipf = {i: 1 / rank[i] for i in others}
        normal = softmax([student[n, i] for i in others]) if others else []
        for i, p in zip(others, normal):
            total = total - beta * zipf[i] / sum(zipf.values()) * torch.log(p)
        for i in range(classes):
            share = label.get(i, 0.0) if target.ndim == 1 else float(target[n, i])
            total = total - mu * (0.9 * share + 0.1 / classes) * torch.log(w[n][i])
    return total / len(student)


def drawn(count, classes, kind, seed=0):
    """Logits of two networks in float64 and targets."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        (2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    )
    numbers = torch.randint(0, classes, (count,), generator=generator)
    if kind == "numbers":
        return first, second, numbers
    # Mixed with the next image: some images meet their own class.
    hot = F.one_hot(numbers, classes).double()
    return first, second, 0.7 * hot + 0.3 * hot.roll(-1, 0)


GRID = [(1, 2), (3, 2), (4, 3), (5, 7), (2, 11)]


@pytest.mark.parametrize(("count", "classes"), GRID)
@pytest.mark.parametrize("kind", ["numbers", "mixed"])
@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0)])
def test_nkd_is_the_definition(count, classes, kind, gamma, temperature):
    student, teacher, target = drawn(count, classes, kind)
    expected = slow_nkd(student, teacher, target, gamma, temperature)
    got = nkd_loss(student, teacher, target, gamma=gamma, temperature=temperature)
    torch.testing.assert_close(got, expected)
    slopes = torch.autograd.grad(got, [student, teacher], allow_unused=True)
    torch.testing.assert_close(slopes[0], torch.autograd.grad(expected, student)[0])
    assert slopes[1] is None


@pytest.mark.parametrize(("count", "classes"), GRID)
@pytest.mark.parametrize("kind", ["numbers", "mixed"])
@pytest.mark.parametrize(("alpha", "beta", "mu"), [(1.0, 0.1, 0.005), (0.1, 2.0, 0.7)])
def test_uskd_is_the_definition(count, classes, kind, alpha, beta, mu):
    student, weak, target = drawn(count, classes, kind)
    expected = slow_uskd(student, weak, target, alpha, beta, mu)
    got = uskd_loss(student, weak, target, alpha=alpha, beta=beta, mu=mu)
    torch.testing.assert_close(got, expected)
    slopes = torch.autograd.grad(got, [student, weak])
    # The ranks and the smoothed target are constants: the weak classifier learns from its own loss alone.
    for slope, expected_slope in zip(slopes, torch.autograd.grad(expected, [student, weak])):
        torch.testing.assert_close(slope, expected_slope)


def test_the_ranks_follow_both_opinions():
    """By hand: after the target the student leans to class 1 and the weak classifier, more strongly, to class 2."""
    student, weak = torch.tensor([[4.0, 1.0, 0.9, -5.0]]), torch.tensor([[0.0, -3.0, 3.0, -3.0]])
    loss = uskd_loss(student, weak, torch.tensor([0]), alpha=0.0, beta=1.0, mu=0.0)
    normal = student[0, 1:].log_softmax(0)
    # Scores: -0.04 (the target), -2.8, -1.9, -8.3.
    zipf = torch.tensor([1 / 3, 1 / 2, 1 / 4])
    torch.testing.assert_close(loss, -(zipf / zipf.sum() * normal).sum())


@pytest.mark.parametrize("kind", ["numbers", "mixed"])
def test_parts_of_a_batch_average_to_the_whole(kind):
    student, second, target = drawn(6, 5, kind)
    halves = slice(0, 3), slice(3, 6)
    mean = target_squares(student, target).mean(0).detach()

    def losses(part, weak):
        if weak:
            return uskd_loss(student[part], second[part], target[part], mean_square=mean)
        return nkd_loss(student[part], second[part], target[part])

    for weak in (False, True):
        whole = torch.autograd.grad(losses(slice(0, 6), weak), student)[0]
        parts = torch.autograd.grad(sum(losses(part, weak) for part in halves) / 2, student)[0]
        torch.testing.assert_close(parts, whole)
    own = sum(uskd_loss(student[part], second[part], target[part]) for part in halves) / 2
    assert not torch.allclose(torch.autograd.grad(own, student)[0], whole)


def test_a_sure_image_keeps_its_label_as_one_hot_or_as_probabilities():
    student, weak, target = drawn(5, 6, "numbers")
    hot = F.one_hot(target, 6).double()
    torch.testing.assert_close(uskd_loss(student, weak, hot), uskd_loss(student, weak, target))
    torch.testing.assert_close(nkd_loss(student, weak, hot), nkd_loss(student, weak, target))


def test_bf16_logits_lose_no_precision_in_the_losses():
    student, second, target = drawn(5, 6, "numbers")
    rough, other = student.detach().bfloat16(), second.detach().bfloat16()
    for loss in (nkd_loss, uskd_loss):
        assert loss(rough, other, target).dtype == torch.float32
        assert torch.equal(loss(rough, other, target), loss(rough.float(), other.float(), target))


@pytest.mark.parametrize(
    ("student", "other", "target", "words"),
    [
        ((4, 3), (4, 2), (4,), "differ"),
        ((4, 3), (4, 3), (3,), "targets"),
        ((4, 3), (4, 3), (4, 2), "targets"),
        ((4, 1), (4, 1), (4,), "at least 2 classes"),
        ((3,), (3,), (3,), "at least 2 classes"),
    ],
)
@pytest.mark.parametrize("loss", [nkd_loss, uskd_loss])
def test_shapes_that_do_not_fit_are_refused(loss, student, other, target, words):
    with pytest.raises(InputError, match=words):
        loss(torch.zeros(student), torch.zeros(other), torch.zeros(target, dtype=torch.int64))


@pytest.mark.parametrize("loss", [nkd_loss, uskd_loss])
def test_class_numbers_are_integers_of_any_kind(loss):
    student, other, target = drawn(5, 4, "numbers")
    torch.testing.assert_close(loss(student, other, target.to(torch.uint8)), loss(student, other, target))
    with pytest.raises(InputError, match="class numbers are integers"):
        loss(student, other, target.float())


def test_wrong_arguments_of_the_losses_are_refused():
    student, other, target = drawn(5, 4, "numbers")
    with pytest.raises(InputError, match=r"temperature = 0\.0"):
        nkd_loss(student, other, target, temperature=0.0)
    with pytest.raises(InputError, match=r"mean_square \(2,\) is not allowed: give \(1,\)"):
        uskd_loss(student, other, target, mean_square=torch.zeros(2))


# ---- the methods


def nets():
    torch.manual_seed(0)
    return tuple(create_model("small_resnet_nano", num_classes=4, channels=(4, 4, 8, 8)) for _ in range(2))


def batch(count=8, side=16, mixed=False):
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randn(count, 3, side, side, generator=generator) + F.one_hot(target, 4)[:, :3, None, None]
    hot = F.one_hot(target, 4).float()
    return {"image": images, "target": 0.6 * hot + 0.4 * hot.roll(4, 0) if mixed else target}


def test_the_teacher_stays_out_of_everything():
    student, teacher = nets()
    method = NKD(student, teacher).train()
    before = copy.deepcopy(teacher.state_dict())
    assert not teacher.training
    assert student.training
    owned = {id(parameter) for group in param_groups(method, OptimConfig()) for parameter in group["params"]}
    assert owned == {id(parameter) for parameter in student.parameters()}
    assert list(method.state_dict()) == [f"model.{key}" for key in student.state_dict()]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    recorded = []
    teacher.register_forward_hook(lambda _module, _inputs, _output: recorded.append(torch.is_grad_enabled()))
    method(batch())["loss"].backward()
    assert recorded == [False]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    method.to("meta")
    assert {parameter.device.type for parameter in method.teacher.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in method.model.parameters()} == {"meta"}


@pytest.mark.parametrize("mixed", [False, True])
def test_the_methods_add_their_loss_to_the_cross_entropy(mixed):
    student, teacher = nets()
    data = batch(mixed=mixed)
    student.eval()
    logits = student(data["image"])
    expected = F.cross_entropy(logits, data["target"], label_smoothing=0.1)
    terms = NKD(student, teacher, gamma=2.0, temperature=3.0, smoothing=0.1)(data)
    loss = nkd_loss(logits, teacher(data["image"]), data["target"], gamma=2.0, temperature=3.0)
    torch.testing.assert_close(terms["loss"], expected + loss)
    method = USKD(student, alpha=0.4, beta=0.3, mu=0.2, smoothing=0.1)
    feature = student.forward_intermediates(data["image"], indices=[3], intermediates_only=True)[0].mean((2, 3))
    loss = uskd_loss(logits, method.weak(feature), data["target"], alpha=0.4, beta=0.3, mu=0.2)
    terms = method(data)
    torch.testing.assert_close(terms["loss"], expected + loss)
    torch.testing.assert_close(terms["supervised"], expected)
    torch.testing.assert_close(terms["uskd"], loss)


@pytest.mark.parametrize("kind", ["nkd", "uskd"])
def test_the_methods_train(kind):
    student, teacher = nets()
    method = NKD(student, teacher) if kind == "nkd" else USKD(student, mu=0.1)
    optimiser = torch.optim.AdamW(method.parameters(), 1e-2)
    first = None
    for _ in range(20):
        terms = method(batch(24, side=8))
        loss = terms["supervised"].item()
        first = first or loss
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
    assert loss < 0.7 * first
    assert all(parameter.grad is not None for parameter in method.parameters())


FEATURES = [
    ("resnet18", {}, "layer3", 256),
    ("mobilenetv2_100", {}, "blocks.6", 320),
    ("mobilenetv1_100", {}, "blocks.3", 512),
    ("regnetx_016", {}, "s3", 408),
    ("swin_tiny_patch4_window7_224", {}, "layers.2", 384),
    ("deit_tiny_patch16_224", {}, "blocks.5", 192),
    ("deit_tiny_patch16_224", {"depth": 5}, "blocks.1", 192),
]


@pytest.mark.parametrize(("name", "options", "feature", "width"), FEATURES)
def test_the_weak_feature_is_the_published_one(name, options, feature, width):
    with torch.device("meta"):
        method = USKD(timm.create_model(name, num_classes=7, **options))
    assert method.feature == feature
    assert method.weak.weight.shape == (7, width)
    assert method.weak.weight.device.type == "meta"


def test_a_vit_gives_the_class_token_of_its_middle_block():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=4, embed_dim=24).eval()
    method, images = USKD(model), torch.randn(2, 3, 32, 32)
    tokens = model.forward_intermediates(images, indices=[1], intermediates_only=True, return_prefix_tokens=True)
    torch.testing.assert_close(method._forward(images)[1], tokens[0][1][:, 0])
    torch.testing.assert_close(method._forward(images)[0], model(images))
    assert not any(module._forward_hooks for module in model.modules())


def test_features_of_all_layouts_are_averaged_over_places():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1), num_classes=4).eval()
    method, images = USKD(model), torch.randn(2, 3, 64, 64)
    maps = model.forward_intermediates(images, indices=[2], intermediates_only=True)[0]  # (B, C, H, W)
    torch.testing.assert_close(method._forward(images)[1], maps.mean((2, 3)))
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4, embed_dim=24, class_token=False, global_pool="avg"
    ).eval()
    maps = model.forward_intermediates(images[..., :32, :32], indices=[0], intermediates_only=True)[0]
    torch.testing.assert_close(USKD(model)._forward(images[..., :32, :32])[1], maps.mean((2, 3)))


def test_a_layer_that_gives_several_maps_is_refused():
    student, _ = nets()
    method = USKD(student)
    student.layer3.register_forward_hook(lambda _module, _inputs, output: (output, output))
    student.layer4.register_forward_pre_hook(lambda _module, inputs: inputs[0][:1])
    with pytest.raises(InputError, match=r"'layer3' of SmallResNet does not give one map.*method\.options\.level"):
        method(batch())


def test_another_level_can_be_asked_for():
    method = USKD(nets()[0], level=1)
    assert method.feature == "layer1"
    assert method.weak.in_features == 4
    method(batch())["loss"].backward()


def test_the_weak_classifier_does_not_ship():
    student, _ = nets()
    method = USKD(student)
    assert {key for key in method.state_dict() if not key.startswith("model.")} == {"weak.weight", "weak.bias"}
    assert not any("weak" in key for key in student.state_dict())
    owned = [id(parameter) for group in param_groups(method, OptimConfig()) for parameter in group["params"]]
    assert id(method.weak.weight) in owned


def test_processes_share_the_mean_confidence(monkeypatch):
    """Two processes of 3 and 5 images: each computes with the mean over all 8."""
    student, _ = nets()
    method, data = USKD(student.eval()), batch(8)
    parts = [{key: value[part] for key, value in data.items()} for part in (slice(0, 3), slice(3, 8))]
    weights = [3 / 8, 5 / 8]
    whole = torch.autograd.grad(method(data)["loss"], list(method.parameters()))
    squares = [target_squares(student(part["image"]), part["target"]).detach() for part in parts]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    total = [torch.zeros_like(parameter) for parameter in method.parameters()]
    for number, part in enumerate(parts):
        other = squares[1 - number]
        sums = torch.cat([other.sum(0), torch.tensor([float(len(other))])])
        monkeypatch.setattr(dist, "all_reduce", lambda values, sums=sums: values.add_(sums))
        slopes = torch.autograd.grad(method(part)["loss"] * weights[number], list(method.parameters()))
        total = [a + b for a, b in zip(total, slopes)]
    for got, expected in zip(total, whole):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


class Bare(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda s, t: NKD(s), "needs a teacher"),
        (lambda s, t: NKD(s, "runs/a"), "'runs/a'"),
        (lambda s, t: NKD(s, s), "the student itself"),
        (lambda s, t: NKD(s, t, gamma="1"), "gamma = '1'"),
        (lambda s, t: NKD(s, t, temperature="3"), "temperature = '3'"),
        (lambda s, t: USKD(s, smoothing=None), "smoothing = None"),
        (lambda s, t: USKD(s, level="layer3"), "level = 'layer3'"),
        (lambda s, t: NKD(s, t, gamma=-1), "gamma = -1"),
        (lambda s, t: NKD(s, t, temperature=0), "temperature = 0"),
        (lambda s, t: NKD(s, t, smoothing=1), "smoothing = 1"),
        (lambda s, t: NKD(s, t, multilabel=True), "one label per image"),
        (lambda s, t: USKD(s, multilabel=True), "one label per image"),
        (lambda s, t: USKD(s, alpha=-0.1), "alpha = -0.1"),
        (lambda s, t: USKD(s, beta=math.inf), "beta = inf"),
        (lambda s, t: USKD(s, mu=math.nan), "mu = nan"),
        (lambda s, t: USKD(s, level=5), "level = 5"),
        (lambda s, t: USKD(Bare()), "names none in feature_info"),
    ],
)
def test_wrong_options_are_refused(build, words):
    with pytest.raises(InputError, match=words):
        build(*nets())


def test_a_feature_that_checkpointing_skips_is_an_error():
    student, _ = nets()
    student.set_grad_checkpointing(True)
    with pytest.raises(InputError, match=r"train\.grad_checkpointing=false"):
        USKD(student.train())(batch())


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(InputError, match=r"teacher_logits \(8, 6\)"):
        NKD(nets()[0], create_model("small_resnet_nano", num_classes=6))(batch())


def test_the_rivals_are_their_definitions():
    student, teacher, target = drawn(5, 4, "numbers")
    kd = check.kd_loss(student, teacher, temperature=2.0)
    dkd = check.dkd_loss(student, teacher, target, alpha=0.7, beta=3.0, temperature=2.0)
    expected_kd = expected_dkd = 0.0
    for z, y, t in zip(student.tolist(), teacher.tolist(), target.tolist()):
        p, q = (softmax(torch.tensor(v, dtype=torch.float64) / 2.0) for v in (z, y))
        expected_kd -= 4 * sum(b * math.log(a) for a, b in zip(p, q)) / 5
        of_target = q[t] * math.log(q[t] / p[t]) + (1 - q[t]) * math.log((1 - q[t]) / (1 - p[t]))
        others = [i for i in range(4) if i != t]
        of_others = sum(q[i] / (1 - q[t]) * math.log((q[i] / (1 - q[t])) / (p[i] / (1 - p[t]))) for i in others)
        expected_dkd += 4 * (0.7 * of_target + 3.0 * of_others) / 5
    assert kd.item() == pytest.approx(float(expected_kd))
    assert dkd.item() == pytest.approx(float(expected_dkd))
    with pytest.raises(InputError, match="'kd' or 'dkd'"):
        check.Rival(*nets(), form="crd")


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert [set(finding.arms) for finding in verdict.findings] == [
        {"nkd", "plain"},
        {"nkd", "kd"},
        {"nkd", "dkd"},
        {"uskd", "plain"},
        {"uskd", "smoothing"},
    ]
    assert all(0 < row["top1"] <= 1 for row in verdict.tables["accuracy and time of training"])
