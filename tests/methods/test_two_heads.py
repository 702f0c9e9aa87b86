import copy

import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.methods.distill.two_heads import TwoHeadDistillation
from vitrail.models import create_model


class TwoHeads(nn.Module):
    """A student as timm's distilled models are."""

    def __init__(self, classes=4):
        super().__init__()
        self.head, self.head_dist = nn.Linear(6, classes), nn.Linear(6, classes)
        self.both = False

    def set_distilled_training(self, enable=True):
        self.both = enable

    def forward(self, x):
        first, second = self.head(x.flatten(1)), self.head_dist(x.flatten(1))
        return (first, second) if self.both and self.training else (first + second) / 2


def parts(**options):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4))
    return TwoHeadDistillation(TwoHeads().double(), teacher.double(), **options).train()


def batch(soft=False, count=5):
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (count,), generator=generator)
    if soft:
        target = 0.7 * nn.functional.one_hot(target, 4).double() + 0.3 * nn.functional.one_hot(target.roll(1), 4)
    image = torch.randn(count, 1, 2, 3, generator=generator, dtype=torch.float64)
    return {"image": image, "target": target}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("alpha", "smoothing"), [(0.5, 0.0), (0.2, 0.1), (0.0, 0.3), (1.0, 0.0)])
def test_each_head_has_its_cross_entropy(alpha, smoothing, soft):
    method, data = parts(alpha=alpha, smoothing=smoothing), batch(soft)
    # In float32, as the method computes its losses.
    first, second = (head(data["image"].flatten(1)).float() for head in (method.model.head, method.model.head_dist))
    answers = method.teacher.eval()(data["image"])
    supervised = distilled = 0.0
    for n in range(5):
        shares = data["target"][n] if soft else nn.functional.one_hot(data["target"][n], 4).double()
        for c in range(4):
            wanted = (1 - smoothing) * float(shares[c]) + smoothing / 4
            supervised = supervised - wanted * torch.log(torch.exp(first[n, c]) / torch.exp(first[n]).sum()) / 5
        named = max(range(4), key=lambda c, n=n: float(answers[n, c]))
        distilled = distilled - torch.log(torch.exp(second[n, named]) / torch.exp(second[n]).sum()) / 5
    terms = method(data)
    torch.testing.assert_close(terms["loss"], (1 - alpha) * supervised + alpha * distilled)
    torch.testing.assert_close(terms["supervised"], supervised)
    torch.testing.assert_close(terms["distilled"], distilled)
    given = list(method.model.parameters())
    ours = torch.autograd.grad(terms["loss"], given, retain_graph=True)
    theirs = torch.autograd.grad((1 - alpha) * supervised + alpha * distilled, given)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_answers_are_met_over_all_classes(temperature):
    method, data = parts(temperature=temperature), batch()
    second = method.model.head_dist(data["image"].flatten(1)).float() / temperature
    answers = method.teacher(data["image"]).float() / temperature
    total = 0.0
    for n in range(5):
        teacher, student = torch.exp(answers[n]), torch.exp(second[n])
        teacher, student = teacher / teacher.sum(), student / student.sum()
        total = total + sum(teacher[c] * torch.log(teacher[c] / student[c]) for c in range(4))
    torch.testing.assert_close(method(data)["distilled"], temperature**2 * total / 20)


def test_others_find_a_model_of_one_output():
    method = parts()
    method(batch())
    assert isinstance(method.model.train()(batch()["image"]), torch.Tensor)
    broken = parts()
    broken.teacher.forward = lambda x: torch.zeros(len(x), 4)
    broken.model.head = nn.Linear(5, 4)
    with pytest.raises(RuntimeError):
        broken(batch())
    assert not broken.model.both


def test_the_teacher_is_frozen_and_asked_without_a_gradient():
    method, data = parts(), batch()
    before, asked = copy.deepcopy(method.teacher.state_dict()), []
    method.teacher.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    method(data)["loss"].backward()
    assert asked == [False]
    assert not method.teacher.training
    assert all(torch.equal(value, before[key]) for key, value in method.teacher.state_dict().items())
    assert {name.partition(".")[0] for name, _ in method.named_parameters()} == {"model"}
    assert {p.device.type for p in method.to("meta").teacher.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s", "groupmamba_nano"])
def test_models_of_two_heads_take_it(name):
    options = {"distilled": True} if name == "groupmamba_nano" else {}
    with torch.device("meta"):
        model = create_model(name, num_classes=4, **options)
        side = model.pretrained_cfg["input_size"][-1]
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, 4))
        method = TwoHeadDistillation(model, teacher).train()
        data = {"image": torch.zeros(2, 3, side, side), "target": torch.zeros(2, dtype=torch.long)}
        assert method(data)["loss"].shape == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: TwoHeadDistillation(s), "TwoHeadDistillation needs a teacher.*supervised"),
        (lambda s, t: TwoHeadDistillation(s, s), "the student itself"),
        (lambda s, t: TwoHeadDistillation(s, t, alpha=1.5), r"alpha = 1.5 .*\[0, 1\]"),
        (lambda s, t: TwoHeadDistillation(s, t, alpha="a"), "alpha = 'a'"),
        (lambda s, t: TwoHeadDistillation(s, t, temperature=0), "temperature = 0 .*above 0"),
        (lambda s, t: TwoHeadDistillation(s, t, smoothing=1.0), r"smoothing = 1.0 .*\[0, 1\)"),
        (lambda s, t: TwoHeadDistillation(s, t, multilabel=True), "one label per image.*supervised"),
        (lambda s, t: TwoHeadDistillation(t, s), "second head, and Sequential has one.*distilled=true"),
        (
            lambda s, t: TwoHeadDistillation(create_model("groupmamba_nano", num_classes=4), t),
            "one classifier.*distilled=True",
        ),
        (lambda s, t: TwoHeadDistillation(s, t).eval()(batch()), "evaluation mode.*train"),
    ],
)
def test_what_does_not_fit_is_explained(make, message):
    with pytest.raises(InputError, match=message):
        make(TwoHeads().double(), nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double())
