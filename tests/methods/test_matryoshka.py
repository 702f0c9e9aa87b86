import pytest
import torch
from torch import nn

from once import quick_run
from vitrail.checks import mrl
from vitrail.edits.nested_head import nested_head
from vitrail.errors import InputError
from vitrail.methods.supervised.matryoshka import MatryoshkaTraining
from vitrail.methods.supervised.supervised import supervised_loss
from vitrail.models import create_model


def net(independent=None, dims=(3,), **options):
    torch.manual_seed(0)
    model = create_model("small_resnet_nano", num_classes=4, channels=(8, 8, 8, 16), **options)
    return model if independent is None else nested_head(dims=dims, independent=independent)(model)


def batch():
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"image": x, "partner": x.flip(-1) + 0.1, "target": torch.tensor([0, 3, 1, 3])}


@pytest.mark.parametrize("independent", [None, False, True])
@pytest.mark.parametrize(("weights", "smoothing"), [(None, 0.1), ((0.5, 2.0), 0.0)])
def test_the_loss_is_the_weighted_sum_over_dimensions(independent, weights, smoothing):
    model = net(independent).eval()
    method = MatryoshkaTraining(
        model, dims=None if independent is not None else (3,), weights=weights, smoothing=smoothing
    )
    found = method(batch())
    embedding = model.forward_head(model.forward_features(batch()["image"]), pre_logits=True)
    total = 0
    for level, dim in enumerate((3, 16)):
        layer = model.fc.smaller[0] if independent and dim == 3 else model.fc
        logits = embedding[:, :dim] @ layer.weight[:, :dim].T + layer.bias
        wanted = torch.full((4, 4), smoothing / 4)
        wanted[range(4), batch()["target"]] += 1 - smoothing
        term = -(wanted * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(found[f"dim_{dim}"], term.detach())
        total = total + (weights or (1.0, 1.0))[level] * term
    torch.testing.assert_close(found["loss"], total)
    ours, slow = (torch.autograd.grad(value, list(model.parameters())) for value in (found["loss"], total))
    for got, wanted in zip(ours, slow):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_classes_are_weighed_and_several_labels_taken():
    model, given = net(True).eval(), batch()
    weighed = MatryoshkaTraining(model, class_weights=[1.0, 2.0, 3.0, 4.0], smoothing=0.0)
    images = model(given["image"])
    wanted = supervised_loss(images, given["target"], class_weights=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(weighed(given)["dim_16"], wanted.detach())
    hot = nn.functional.one_hot(given["target"], 4).float()
    several = MatryoshkaTraining(model, multilabel=True, smoothing=0.0)({**given, "target": hot})
    torch.testing.assert_close(several["dim_16"], supervised_loss(images, hot, multilabel=True).detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MatryoshkaTraining(net(), smoothing=1.0), r"smoothing = 1.0 .*\[0, 1\)"),
        (lambda: MatryoshkaTraining(net(), weights=[1.0]), r"weights = \[1.0\] .*8, 16"),
        (lambda: MatryoshkaTraining(net(True), dims=(5,)), r"dims = \[5, 16\] .*nested in \[3, 16\]"),
        (lambda: MatryoshkaTraining(nn.Linear(2, 2)), "Linear has none, or several"),
    ],
)
def test_what_cannot_be_trained_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_check_runs():
    verdict, _ = quick_run(mrl)
    assert "fewer numbers" in verdict.findings[0].claim
    assert set(verdict.tables) == {"dimensions", "cascade", "retrieval", "time of a search"}
    assert {row["net"] for row in verdict.tables["dimensions"]} == {"MRL", "MRL-E", "fixed 8", "fixed 128"}
