import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from exact import normal, same
from once import quick_run
from vitrail.checks import gcr as check
from vitrail.edits.grassmann_classes import (
    GrassmannHead,
    GrassmannSGD,
    drift,
    geodesic,
    grassmann_classes,
    horizontal,
    orthonormal,
)
from vitrail.errors import InputError
from vitrail.methods.supervised.supervised import Supervised
from vitrail.models import create_model
from vitrail.training.optim import create_optimizer, param_groups, set_learning_rate
from vitrail.training.recipe import OptimConfig

SIZES = [(1, 3, 2), (2, 5, 3), (3, 7, 1), (4, 4, 2), (8, 33, 2)]
"""k, D and the number of classes."""


def frames(k, features, classes, seed=0):
    return torch.linalg.qr(normal(classes, features, k, seed=seed)).Q.mT.contiguous()


def slow_geodesic(frame, velocity, time):
    """The formula of Edelman, Arias and Smith for one subspace, by a singular value decomposition."""
    columns, direction = frame.T, velocity.T
    left, speed, right = torch.linalg.svd(direction, full_matrices=False)
    out = torch.zeros_like(columns)
    for i in range(columns.shape[1]):
        along = columns @ right[i] * torch.cos(time * speed[i]) + left[:, i] * torch.sin(time * speed[i])
        out += torch.outer(along, right[i])
    return out.T


def slow_gram_schmidt(frame):
    rows = []
    for row in frame:
        for done in rows:
            row = row - (row @ done) * done
        rows.append(row / row.square().sum().sqrt())
    return torch.stack(rows)


def slow_logits(head, x):
    logits = []
    for feature in x:
        feature = feature / feature.square().sum().sqrt()
        logits.append(
            torch.stack([head.gamma * sum((row @ feature) ** 2 for row in rows) ** 0.5 for rows in head.weight])
        )
    return torch.stack(logits)


def same_subspaces(ours, theirs, tolerance):
    torch.testing.assert_close(ours.mT @ ours, theirs.mT @ theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_a_geodesic_is_the_slow_loop(size):
    frame = frames(*size)
    velocity = horizontal(frame, normal(*frame.shape, seed=1))
    for time in (-0.3, 0.0, 2.0):
        ours = geodesic(frame, velocity, time)
        theirs = torch.stack([slow_geodesic(f, v, time) for f, v in zip(frame, velocity)])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert drift(ours) < 1e-13


@pytest.mark.parametrize("size", SIZES)
def test_what_is_horizontal_lies_across_and_the_rest_changes_no_subspace(size):
    frame, gradient = frames(*size), normal(size[2], size[0], size[1], seed=1)
    across = horizontal(frame, gradient)
    torch.testing.assert_close(across @ frame.mT, torch.zeros(size[2], size[0], size[0]).double(), rtol=0, atol=1e-12)
    # What is left is made of the rows themselves.
    along = gradient - across
    torch.testing.assert_close((along @ frame.mT) @ frame, along)


def test_a_step_is_a_retraction_of_first_order():
    frame = frames(3, 9, 2)
    velocity = horizontal(frame, normal(2, 3, 9, seed=1))
    torch.testing.assert_close((geodesic(frame, velocity, 1e-6) - frame) / 1e-6, velocity, rtol=1e-4, atol=1e-5)


def test_rows_are_made_orthonormal_as_gram_and_schmidt_do():
    frame = frames(4, 9, 3) + 0.1 * normal(3, 4, 9, seed=1)
    ours = orthonormal(frame)
    torch.testing.assert_close(ours, torch.stack([slow_gram_schmidt(f) for f in frame]), rtol=0, atol=1e-12)
    assert drift(ours) < 1e-13
    assert drift(frame) > 0.1


@pytest.mark.parametrize(("k", "features", "classes"), SIZES)
def test_logits_are_the_slow_loop(k, features, classes):
    head = GrassmannHead(features, classes, k=k, gamma=7.0).double()
    x = normal(4, features).requires_grad_()
    same(head(x), slow_logits(head, x), [x, head.weight])
    torch.testing.assert_close(head(3 * x), head(x))
    if k == features:
        torch.testing.assert_close(head(x), torch.full((4, classes), 7.0).double(), rtol=1e-6, atol=0)


def test_only_the_subspace_matters():
    head = GrassmannHead(9, 4, k=3).double()
    x = normal(5, 9)
    before = head(x)
    turn = torch.linalg.qr(normal(4, 3, 3)).Q
    head.weight.data = turn @ head.weight.data
    torch.testing.assert_close(head(x), before)


def test_the_axis_of_the_features():
    head = GrassmannHead(6, 3, k=2, axis=1).double()
    x = normal(2, 6, 4, 5)
    by_place = GrassmannHead(6, 3, k=2).double()
    by_place.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(x), by_place(x.movedim(1, -1)).movedim(-1, 1))


def slow_training(weight, gradients, rate, momentum, every):
    """The published algorithm, a class at a time; rows are made orthonormal without turning a sign."""
    buffer = torch.zeros_like(weight)
    for number, gradient in enumerate(gradients):
        buffer = momentum * buffer + gradient
        moved = []
        for frame, whole in zip(weight, buffer):
            across = whole - whole @ frame.T @ frame
            frame = slow_geodesic(frame, across, -rate)
            moved.append(slow_gram_schmidt(frame) if number % every == 0 else frame)
        weight = torch.stack(moved)
    return weight


@pytest.mark.parametrize(("momentum", "every"), [(0.9, 5), (0.0, 1), (0.5, 2)])
def test_the_optimiser_is_the_slow_loop(momentum, every):
    start = frames(3, 8, 4)
    parameter = nn.Parameter(start.clone())
    optimizer = GrassmannSGD([parameter], lr=0.2, momentum=momentum, reorthonormalise=every)
    gradients = [normal(4, 3, 8, seed=number) for number in range(1, 12)]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        assert optimizer.step() is None
    torch.testing.assert_close(
        parameter.data, slow_training(start, gradients, 0.2, momentum, every), rtol=0, atol=1e-10
    )


def test_rounding_is_taken_out_at_the_first_step_and_every_so_many():
    start = frames(2, 5, 3) + 1e-3
    parameter = nn.Parameter(start.clone())
    optimizer = GrassmannSGD([parameter], lr=0.1, reorthonormalise=3)
    drifts = []
    for _ in range(5):
        parameter.data += 1e-3
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        drifts.append(drift(parameter) < 1e-12)
    assert drifts == [True, False, False, True, False]


def test_a_step_goes_down_and_takes_a_closure():
    torch.manual_seed(0)
    head = GrassmannHead(12, 4, k=2)
    x, target = torch.randn(32, 12), torch.arange(32) % 4
    optimizer = GrassmannSGD(head.parameters(), lr=0.05)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), target)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    untouched = nn.Parameter(frames(2, 4, 1))
    optimizer = GrassmannSGD([untouched], lr=1.0)
    before = untouched.detach().clone()
    optimizer.step()  # without a gradient
    assert torch.equal(untouched, before)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_rows_stay_orthonormal_over_hundreds_of_rough_steps(kind):
    torch.manual_seed(0)
    parameter = nn.Parameter(frames(8, 64, 3).to(kind))
    optimizer = GrassmannSGD([parameter], lr=0.3)
    worst = 0.0
    for _ in range(300):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        worst = max(worst, drift(parameter))
    assert worst < 1e-5


def test_half_precision_is_updated_in_single():
    start = frames(4, 32, 2).to(torch.bfloat16)
    parameter, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    for each in (parameter, wide):
        optimizer = GrassmannSGD([each], lr=0.1)
        each.grad = normal(2, 4, 32, seed=2).to(each.dtype)
        wide.grad = None if wide.grad is None else parameter.grad.float()
        optimizer.step()
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter, wide.bfloat16())


def test_what_is_not_finite_reaches_the_parameter_and_not_the_user():
    parameter = nn.Parameter(frames(4, 5, 3))
    optimizer = GrassmannSGD([parameter], lr=0.1)
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert parameter.isnan().all()


def test_a_new_head_is_orthonormal_and_favours_no_direction():
    torch.manual_seed(0)
    head = GrassmannHead(16, 400, k=4)
    assert drift(head.weight) < 1e-5
    mean = (head.weight.mT @ head.weight).mean(0)
    torch.testing.assert_close(mean, torch.eye(16) * 4 / 16, rtol=0, atol=0.06)
    # Along the diagonal, as along any direction.
    assert float(mean.detach().mean() * 16) == pytest.approx(4 / 16, abs=0.05)
    assert not torch.equal(head.weight, GrassmannHead(16, 400, k=4).weight)
    assert head.gamma == 25


def small():
    return create_model("small_resnet_nano", num_classes=2)


def joint(model, lr=0.01):
    method, config = Supervised(model, smoothing=0.0), OptimConfig(lr=lr)
    return method, create_optimizer(param_groups(method, config), config)


def trained(steps, state=None, kind=None):
    torch.manual_seed(0)
    host = create_model("small_resnet_nano", num_classes=4, channels=[8] * 4)
    method, optimizer = joint(grassmann_classes(k=3, lr_scale=10)(host))
    if state is not None:
        method.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    set_learning_rate(optimizer, 0.01)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = {"image": images, "target": torch.arange(8) % 4}
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
            loss = method(batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
    return method, optimizer


def test_the_subspaces_have_their_own_optimiser_and_rate():
    method, optimizer = trained(1)
    head = method.model.get_classifier()
    (group,) = [group for group in optimizer.param_groups if group["params"][0] is head.weight]
    assert (group["lr"], group["lr_scale"], group["momentum"], group["weight_decay"]) == (0.1, 10, 0.9, 0)
    assert [type(part).__name__ for part in optimizer.parts] == ["AdamW", "GrassmannSGD"]


def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    first = trained(3)
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, _ = trained(4, state=state)
    whole, _ = trained(7)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_rows_stay_orthonormal_under_autocast():
    method, _ = trained(12, kind=torch.bfloat16)
    head = method.model.get_classifier()
    assert head.weight.dtype == torch.float32
    assert drift(head.weight) < 1e-5


def test_logits_are_of_single_precision_under_autocast_and_in_half():
    head, x = GrassmannHead(16, 5), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x.bfloat16())
    torch.testing.assert_close(found, head(x.bfloat16().float()))
    half = copy.deepcopy(head).bfloat16()
    assert half(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()), head(x), rtol=0.05, atol=0.3)


def test_a_mean_of_subspaces_is_brought_back():
    torch.manual_seed(0)
    head = GrassmannHead(16, 5, k=4)
    with torch.no_grad():
        head.weight.mul_(0.8).add_(0.2 * GrassmannHead(16, 5, k=4).weight)
    mean = head.weight.detach().double()
    assert drift(head.weight) > 0.1
    head.constrain()
    assert drift(head.weight) < 1e-6
    same_subspaces(head.weight.detach().double(), orthonormal(mean), 1e-5)
    half = head.bfloat16()
    half.constrain()
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small_resnet_nano", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}),
        ("swin_nano", {}),
        ("mobilenetv2_100", {}),
    ],
)
def test_any_backbone_and_the_features_stay(name, options):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    grassmann_classes(k=2)(model)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), before)
    assert isinstance(model.get_classifier(), GrassmannHead)
    assert model.num_classes == model.get_classifier().out_features == 7
    logits = model(x)
    assert logits.shape == (2, 7)
    assert 0 <= logits.min() < logits.max() <= 25
    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert grassmann_classes(k=2)(model)(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), before)


def test_the_published_heads_have_as_many_parameters():
    with torch.device("meta"):
        model = timm.create_model("resnet50d")
    count = sum(p.numel() for p in model.parameters()) - 2048 * 1000 - 1000
    for k in (1, 8, 32):
        with torch.device("meta"):
            model = grassmann_classes(k=k)(timm.create_model("resnet50d"))
        assert sum(p.numel() for p in model.parameters()) == count + 1000 * k * 2048


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grassmann_classes(k=0), "k = 0 .*whole number from 1"),
        (lambda: grassmann_classes(k=2.0), "k = 2.0"),
        (lambda: grassmann_classes(gamma=0), "gamma = 0 .*above 0"),
        (lambda: grassmann_classes(lr_scale=float("inf")), "lr_scale = inf"),
        (lambda: grassmann_classes(k=129)(small()), "k = 129 .*at most 128"),
        (lambda: grassmann_classes()(nn.Sequential(nn.Softsign())), "no linear classifier in Sequential.*Softsign"),
        (lambda: grassmann_classes()(grassmann_classes()(small())), "no linear classifier"),
        (lambda: GrassmannSGD([torch.zeros(1, 2)], lr=-1.0), "lr = -1.0 .*0 or more"),
        (lambda: GrassmannSGD([torch.zeros(1, 2)], lr=1.0, momentum=1), r"momentum = 1 .*\[0, 1\)"),
        (lambda: GrassmannSGD([torch.zeros(1, 2)], lr=1.0, reorthonormalise=0), "reorthonormalise = 0"),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_measures_of_the_check():
    x = torch.tensor([[1.0, 0], [0, 2], [3, 3], [5, 0], [-1, 0]])
    # Of class 0 the angles are 90, 45 and 45 degrees, of class 1 180.
    assert check.angle_within(x, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx((60 + 180) / 2)
    train = (torch.cat([normal(20, 3) + 9, normal(20, 3) - 9]).float(), torch.arange(40) // 20)
    assert check.linear_transfer(train, train) == 1.0
    assert check.linear_transfer(train, (train[0], 1 - train[1])) == 0.0


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert len(verdict.findings) == 7
    rows = {row["arm"]: row for row in verdict.tables["arms"]}
    assert list(rows) == ["softmax", "cosine", "free, k = 8", "k = 1", "k = 8"]
    assert rows["k = 8"]["drift"] < 1e-5
    assert rows["free, k = 8"]["drift"] > 100 * rows["k = 8"]["drift"]
    assert rows["softmax"]["drift"] is None
    assert verdict.findings[-1].outcome == "confirmed"
    costs = {row["arm"]: row["parameters"] for row in verdict.tables["cost of the arms"]}
    assert costs["k = 8"] - costs["k = 1"] == 7 * 5 * 128
