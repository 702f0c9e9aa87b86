import pytest
import torch
from torch import nn

from exact import normal
from vitrail.edits.unit_sphere_classes import unit_sphere_classes
from vitrail.errors import InputError
from vitrail.evaluate.novel_classes import embedded, enrol, nearest, novel_accuracy, prototypes
from vitrail.layers.embedding import embed
from vitrail.models import create_model


def published_prototype(points, scale):
    """The published enrolment of one class: embeddings of length s, their mean, brought to length one."""
    mean = sum(scale * point / point.square().sum() ** 0.5 for point in points) / len(points)
    return mean / mean.square().sum() ** 0.5


def test_prototypes_are_the_published_ones():
    x, targets = normal(9, 4) * torch.arange(1, 10)[:, None], torch.tensor([1, 0, 2, 1, 1, 0, 2, 2, 1])
    ours = prototypes((x, targets))
    for number in range(3):
        torch.testing.assert_close(ours[number], published_prototype(x[targets == number], 10.0))


def test_the_nearest_is_by_angle():
    vectors = torch.tensor([[1.0, 0], [0, 5], [-1, -1]])
    points = torch.tensor([[3.0, 2], [0.1, 0.2], [-1, -0.5]])
    assert nearest(points, vectors).tolist() == [0, 1, 2]


def test_the_scenarios():
    vectors = torch.eye(5)[:3]
    examples = (torch.eye(5)[3:], torch.tensor([0, 1]))
    # Two of the first new class, one of which looks like a trained class, and one of the second.
    queries = (torch.tensor([[0.0, 0, 0, 1, 0], [2, 0, 0, 1, 0], [0, 0, 0, 0, 1]]), torch.tensor([0, 0, 1]))
    trained = (torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 3]]), torch.tensor([0, 1]))
    found = novel_accuracy(examples, queries, vectors, trained)
    assert found.disjoint == 1
    assert found.joint_novel == pytest.approx(2 / 3)
    assert found.joint_trained == 1 / 2
    assert found.joint == 3 / 5


def stream(images, targets, size=3):
    return lambda: iter(list(zip(images.split(size), targets.split(size))))


def sphere(**options):
    torch.manual_seed(0)
    model = create_model("small_resnet_nano", num_classes=3, channels=(8, 8, 8, 8))
    return unit_sphere_classes(embed_dim=6)(model)


IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 1, 0, 1, 0, 1])


def test_a_stream_is_embedded_in_evaluation_mode():
    model = sphere().train()
    embeddings, targets = embedded(model, stream(IMAGES, TARGETS))
    assert model.training
    assert torch.equal(targets, TARGETS)
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, embed(model.eval(), IMAGES))
    assert embeddings.shape == (7, 6)


@pytest.mark.parametrize("joint", [True, False])
def test_an_enrolled_model_answers_as_the_protocol(joint):
    model = sphere().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = enrol(model, stream(IMAGES, TARGETS), joint=joint)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    classes = 5 if joint else 2
    assert grown.num_classes == grown.get_classifier().out_features == classes
    vectors = prototypes(embedded(model, stream(IMAGES, TARGETS)))
    every = torch.cat([model.get_classifier().weight.detach(), vectors]) if joint else vectors
    logits = grown(IMAGES)
    assert logits.shape == (7, classes)
    assert torch.equal(logits.argmax(1), nearest(embed(model, IMAGES), every))
    torch.testing.assert_close(logits[:, -2:], 10 * nn.functional.normalize(embed(model, IMAGES), dim=1) @ vectors.T)
    if joint:
        torch.testing.assert_close(logits[:, :3], model(IMAGES))
    again = enrol(grown, stream(IMAGES, TARGETS))
    assert again(IMAGES).shape == (7, classes + 2)
    assert again.get_classifier().weight.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: enrol(nn.Linear(2, 2), stream(IMAGES, TARGETS)), "that of Linear is NoneType: train with the edit"),
        (
            lambda: enrol(create_model("small_resnet_nano", num_classes=2), stream(IMAGES, TARGETS)),
            "is Linear: train with the edit",
        ),
        (lambda: prototypes((torch.ones(2, 3), torch.tensor([0, 2]))), r"the classes \[1\] have no example"),
        (lambda: embedded(sphere(), lambda: iter(())), "no images to embed"),
    ],
)
def test_what_does_not_fit_is_explained(call, message):
    with pytest.raises(InputError, match=message):
        call()
