import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitrail.training.cpu as cpu
from vitrail.errors import InputError
from vitrail.layers.processor import keep_memory, preferred_precision
from vitrail.models.factory import create_model
from vitrail.training.cpu import apply_switches, tune_for_cpu

SHAPE = (3, 32, 32)


def lite(layout=torch.channels_last):
    torch.manual_seed(0)
    return create_model("tf_efficientnet_lite0", num_classes=5).to(memory_format=layout)


def vit(**options):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
    return create_model("vit_tiny_patch16_224", num_classes=5, **size, **options)


def slowest(site):
    """Stand in for the measurement: the last form, as if it had been the fastest."""
    forms = cpu._candidates(site)
    return (forms[-1], 2.0) if forms else (None, 1.0)


@pytest.fixture
def every_form(monkeypatch):
    monkeypatch.setattr(cpu, "_fastest", slowest)
    monkeypatch.setattr(cpu, "_compare", lambda *args: (2.0, 1.0))


def step(model, images, precision="fp32"):
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = model(images)
    F.cross_entropy(out.float(), torch.arange(len(images)) % 5).backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("build", "precision"), [(lite, "fp32"), (lite, "bf16"), (vit, "fp32"), (vit, "bf16")])
def test_every_form_gives_the_same_step(build, precision, every_form):
    model, images = build(), torch.randn(6, *SHAPE)
    plain = copy.deepcopy(model)
    report = tune_for_cpu(model, image_shape=SHAPE, batch_size=6, precision=precision, channels_last=build is lite)
    assert report.switches
    out, grads = step(model, images, precision)
    want_out, want = step(plain, images, precision)
    # Gradients of 49 layers in bfloat16 differ by rounding between any two orders of summation.
    limit = 1e-4 if precision == "fp32" else 0.25
    assert torch.allclose(out.float(), want_out.float(), atol=limit)
    largest = max(float(g.norm()) for g in want.values())
    for name, grad in grads.items():
        assert float((grad - want[name]).norm()) <= limit * max(float(want[name].norm()), 0.1 * largest), name


def test_forms_are_used_in_training_alone(every_form, monkeypatch):
    model, images, calls = vit(), torch.randn(2, *SHAPE), []
    tune_for_cpu(model, image_shape=SHAPE, batch_size=2, precision="fp32")
    real = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *args, **options: calls.append(1) or real(*args, **options))
    model.eval()(images)
    with torch.no_grad():
        model.train()(images)
    assert not calls
    model.train()(images)
    assert len(calls) == 2
    copy.deepcopy(model)(images)
    assert len(calls) == 4
    model.set_grad_checkpointing(True)
    model(images).sum().backward()
    assert len(calls) == 8, "forward and its repetition in the backward must take the same form"


def test_model_state_random_numbers_and_pickles_are_left_alone(every_form):
    model = lite()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = tune_for_cpu(model, image_shape=SHAPE, batch_size=4, precision="fp32", channels_last=True)
    assert torch.equal(random, torch.get_rng_state())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pickle.loads(pickle.dumps(model))  # workers and ``copy`` need this
    report.undo()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_switches_of_a_report_can_be_set_again(every_form):
    first, second = vit(), vit()
    report = tune_for_cpu(first, image_shape=SHAPE, batch_size=4, precision="bf16")
    apply_switches(second, report.to_dict()["switches"])
    images = torch.randn(4, *SHAPE)
    a, b = step(first, images, "bf16"), step(second, images, "bf16")
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def test_a_failing_forward_leaves_no_switch_behind(every_form):
    model = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.Conv2d(9, 1, 1))
    apply_switches(model, {"0": {"depthwise": "columns"}})
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 4, 8, 8))
    with pytest.raises(RuntimeError):
        model[0](torch.randn(1, 5, 8, 8))
    assert torch.overrides._get_current_function_mode() is None


def test_measures_and_reports():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.ReLU6(), nn.Conv2d(8, 2, 1))
    report = tune_for_cpu(model, image_shape=SHAPE, batch_size=2, precision="fp32", channels_last=True)
    assert {(c.operator, c.modules) for c in report.choices} == {("depthwise", 1), ("clamp", 1)}
    assert report.images_per_second > 0
    assert f"{report.ratio:.2f}x" in str(report)
    assert all(c.form == "torch" or c.ratio >= 1.05 for c in report.choices)


def test_other_devices_are_left_alone():
    report = tune_for_cpu(nn.Linear(2, 2, device="meta"), image_shape=SHAPE, batch_size=2, precision="fp32")
    assert not report.switches
    assert "another device" in str(report)


def test_unknown_precision_says_what_is_allowed():
    with pytest.raises(InputError, match="precision = 'int4' is not allowed: give one of fp32, bf16, fp16"):
        tune_for_cpu(nn.Linear(2, 2), image_shape=SHAPE, batch_size=2, precision="int4")


def test_keep_memory_and_precision_answer():
    assert keep_memory() in (True, False)
    assert preferred_precision() in ("fp32", "bf16")
