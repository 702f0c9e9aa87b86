import pytest
import torch
from torch import nn

from exact import normal, same
from vitrail.edits.nested_head import nested_head
from vitrail.errors import InputError
from vitrail.layers.nested import nested_loss
from vitrail.methods.selfsup.matryoshka_contrastive import MatryoshkaContrastive, info_nce
from vitrail.methods.supervised.supervised import supervised_loss
from vitrail.models import create_model


def net(independent=None, dims=(3,), **options):
    torch.manual_seed(0)
    model = create_model("small_resnet_nano", num_classes=4, channels=(8, 8, 8, 16), **options)
    return model if independent is None else nested_head(dims=dims, independent=independent)(model)


def batch():
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"image": x, "partner": x.flip(-1) + 0.1, "target": torch.tensor([0, 3, 1, 3])}


@pytest.mark.parametrize("temperature", [0.1, torch.tensor(0.5)])
def test_partners_are_found_in_both_directions(temperature):
    first, second = (normal(3, 4, seed=seed).requires_grad_() for seed in (0, 1))
    slow = 0
    for a, b in ((first, second), (second, first)):
        for i in range(3):
            scores = [torch.exp((a[i] * b[j]).sum() / temperature) for j in range(3)]
            slow = slow - (scores[i] / sum(scores)).log() / 6
    same(info_nce(first, second, temperature)[None], slow[None], [first, second])


@pytest.mark.parametrize("independent", [None, False, True])
def test_two_views_are_contrasted_at_every_dimension_and_labels_only_probe(independent):
    model, given = net(independent).eval(), batch()
    method = MatryoshkaContrastive(model, dims=(3,), weights=(2.0, 0.5), temperature=0.2)
    found = method(given)
    views = [model.forward_head(model.forward_features(given[name]), pre_logits=True) for name in ("image", "partner")]
    contrast = nested_loss(lambda a, b: info_nce(a, b, 0.2), *views, dims=(3,), weights=(2.0, 0.5))
    torch.testing.assert_close(found["contrast"], contrast.detach())
    embedding, target = torch.cat(views), torch.cat([given["target"]] * 2)
    answers = [model.fc.logits(embedding, dim) for dim in (3, 16)] if independent is not None else [model.fc(embedding)]
    probe = sum(supervised_loss(logits, target) for logits in answers)
    torch.testing.assert_close(found["probe"], probe.detach())
    torch.testing.assert_close(found["loss"], contrast + probe)
    (of_backbone,) = torch.autograd.grad(found["loss"], [model.conv1.weight], retain_graph=True)
    (of_contrast,) = torch.autograd.grad(contrast, [model.conv1.weight])
    torch.testing.assert_close(of_backbone, of_contrast, rtol=1e-3, atol=1e-5)
    found["loss"].backward()
    assert model.fc.weight.grad.any()


def test_the_two_views_are_drawn_apart():
    assert MatryoshkaContrastive.views == {"image": "train", "partner": "train"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MatryoshkaContrastive(nn.Linear(2, 2)), "Linear has none, or several"),
        (lambda: MatryoshkaContrastive(net(), temperature=0), "temperature = 0 .*above 0"),
        (lambda: MatryoshkaContrastive(net(), dims=(99,)), r"dims = \[99\]"),
        (
            lambda: MatryoshkaContrastive(net())({name: value[:1] for name, value in batch().items()}),
            "got one: give 2 or more",
        ),
    ],
)
def test_what_cannot_be_contrasted_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
