import pytest
import torch
from torch import nn

from exact import normal, same
from once import quick_run
from vitrail.app.artefact import Artefact, save
from vitrail.app.build import build_method
from vitrail.checks import knowledge_concentration
from vitrail.data.preprocess import Preprocess
from vitrail.edits.structural_head import structural_head
from vitrail.errors import InputError
from vitrail.methods.distill.knowledge_concentration import (
    KnowledgeConcentration,
    TreeTraining,
    own_entropy,
    specialist_targets,
)
from vitrail.models import create_model
from vitrail.runs import RunFolder
from vitrail.training.recipe import Recipe

GROUPS = [[3, 0], [1, 4, 2]]


def net(classes, seed=0, **options):
    torch.manual_seed(seed)
    return create_model("small_resnet_nano", num_classes=classes, channels=(8, 8, 8, 16), **options).eval()


def teachers(classes=(2, 3)):
    found = [net(count, seed=5 + count) for count in classes]
    with torch.no_grad():
        for model in found:
            model.fc.weight.mul_(30)
    return found


def batch():
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"image": x, "target": torch.tensor([4, 0, 2, 3, 1])}


def slow(student, specialists, given, top, form):
    """Add up the loss over images and classes, less the entropy of the targets."""
    total = 0
    for image, label in zip(given["image"], given["target"].tolist()):
        v = next(v for v, group in enumerate(GROUPS) if label in group)
        said = specialists[v](image[None])[0].detach()
        said = said.sigmoid() if form == "sigmoid" else said.softmax(0)
        kept = sorted(range(len(GROUPS[v])), key=lambda k: -float(said[k]))[:top]
        target = torch.zeros(5)
        for k in kept:
            target[GROUPS[v][k]] = said[k]
        logits = student(image[None])[0]
        if form == "softmax":
            target = target / target.sum()
            probabilities = logits.softmax(0)
            total = total + sum(z * (z.log() - p.log()) for z, p in zip(target, probabilities) if z > 0)
        else:
            for z, p in zip(target, logits.sigmoid()):
                total = total - z * p.log() - (1 - z) * (1 - p).log()
                total = total + sum(q * q.log() for q in (z, 1 - z) if q > 0)
    return total / 5


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top", [1, 2, 100])
def test_each_image_is_taught_by_the_specialist_of_its_label(form, top):
    student, specialists = net(5), teachers()
    wanted = slow(student, specialists, batch(), top, form)
    slopes = torch.autograd.grad(wanted, list(student.parameters()))
    for output in ("full", "sharded"):
        method = KnowledgeConcentration(student, specialists, groups=GROUPS, top=top, form=form, output=output, shard=2)
        found = method(batch())["loss"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        for got, expected in zip(torch.autograd.grad(found, list(student.parameters())), slopes):
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_targets_are_the_likeliest_classes_of_the_specialist(form):
    logits = normal(3, 4).float()
    places, shares = specialist_targets(logits, torch.tensor([7, 2, 9, 4]), 2, form)
    for i in range(3):
        order = sorted(range(4), key=lambda j: -float(logits[i, j]))[:2]
        assert places[i].tolist() == [(7, 2, 9, 4)[j] for j in order]
        said = logits[i].sigmoid() if form == "sigmoid" else logits[i].softmax(0)
        said = said[order] if form == "sigmoid" else said[order] / said[order].sum()
        torch.testing.assert_close(shares[i], said)


def test_the_entropy_is_that_of_the_form():
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    half = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    torch.testing.assert_close(own_entropy(shares, "softmax"), torch.tensor([half, 0.0], dtype=torch.float64))
    torch.testing.assert_close(own_entropy(shares, "sigmoid"), torch.tensor([2 * half, 0.0], dtype=torch.float64))


def test_a_connected_head_is_sharded_by_its_groups():
    student, specialists = structural_head(groups=[[0, 4], [1, 2, 3]], s1=6, s2=4)(net(5)), teachers()
    found = []
    for output in ("full", "sharded"):
        method = KnowledgeConcentration(student, specialists, groups=GROUPS, output=output)
        loss = method(batch())["loss"]
        found.append([loss.detach(), *torch.autograd.grad(loss, list(student.parameters()))])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_sample_of_very_many_is_near_the_whole():
    student, specialists = net(5), teachers()
    whole = KnowledgeConcentration(student, specialists, groups=GROUPS)(batch())["loss"]
    sampled = KnowledgeConcentration(student, specialists, groups=GROUPS, output="sampled", samples=20_000)
    torch.testing.assert_close(sampled(batch())["loss"], whole, rtol=0.02, atol=0.02)
    fewer = KnowledgeConcentration(student, specialists, groups=GROUPS, output="sampled", samples=1)
    assert len({float(fewer(batch())["loss"].detach()) for _ in range(9)}) > 1


def test_of_several_labels_most_choose_the_teacher():
    method = KnowledgeConcentration(net(5), teachers(), groups=GROUPS, multilabel=True)
    hot = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).float()
    assert method._verticals(hot).tolist() == [1, 0, 1]
    assert method._verticals(torch.tensor([3, 2, 0])).tolist() == [0, 1, 0]


def test_specialists_are_found_by_the_names_of_their_classes(tmp_path):
    names = ("ant", "bee", "cat", "dog", "eel")
    folders, specialists = [], teachers()
    for v, group in enumerate(GROUPS):
        folder = RunFolder(tmp_path / str(v))
        folder.create()
        options = {"num_classes": len(group), "channels": [8, 8, 8, 16]}
        own = [names[label] for label in group]
        save(folder, specialists[v], Artefact("small_resnet_nano", options, [], own, False, Preprocess((16, 16))))
        folders.append(str(folder.path))

    class Data:
        classes, multilabel = names, False

        def counts(self, split):
            return torch.ones(5).numpy()

    name = "knowledge_concentration:KnowledgeConcentration"
    recipe = Recipe.from_dict({"method": {"name": name, "options": {"teacher": folders}}})
    method = build_method(recipe, net(5), Data())
    assert method.groups == GROUPS
    named = KnowledgeConcentration(net(5), specialists, groups=GROUPS)
    torch.testing.assert_close(method(batch())["loss"], named(batch())["loss"])
    with pytest.raises(InputError, match="knows the class 'ant'"):
        KnowledgeConcentration(net(4), [method.teacher[0]], class_names=("bee", "cat", "dog", "eel"))


def test_the_tree_says_what_an_image_is_besides():
    model, given = net(5), batch()
    names = ("bird", "car", "bird/owl", "car/van", "bird/owl/barn owl")
    wanted = torch.zeros(5, 5)
    for i, label in enumerate(given["target"].tolist()):
        for j, name in enumerate(names):
            wanted[i, j] = float(names[label] == name or names[label].startswith(f"{name}/"))
    logits = model(given["image"]).double()
    slow = 0
    for row, z in zip(logits, wanted):
        for x, is_one in zip(row, z):
            slow = slow - (torch.sigmoid(x) if is_one else 1 - torch.sigmoid(x)).log() / 5
    loss = TreeTraining(model, class_names=names)(given)["loss"]
    same(loss.double()[None], slow[None], [model.fc.weight], tolerance=1e-5)
    plain = TreeTraining(model)(given)["loss"]
    flat = nn.functional.one_hot(given["target"], 5).double()
    torch.testing.assert_close(
        plain.double(), nn.functional.binary_cross_entropy_with_logits(logits, flat, reduction="sum") / 5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "needs a teacher and got None"),
        ({"teacher": [net(2), None]}, "needs a teacher"),
        ({"top": 0}, "top = 0"),
        ({"shard": 0}, "shard = 0"),
        ({"samples": 1.5}, "samples = 1.5"),
        ({"form": "hinge"}, "form = 'hinge' .*sigmoid, softmax"),
        ({"output": "some"}, "output = 'some' .*full, sharded, sampled"),
        ({"groups": None}, "does not know the classes of its 2 teachers"),
        ({"groups": [[0, 1], [2, 3]]}, "5 classes"),
        ({"groups": [[0, 1, 2, 3, 4]]}, "2 teachers and 1 groups"),
    ],
)
def test_what_cannot_teach_is_explained(options, message):
    with pytest.raises(InputError, match=message):
        KnowledgeConcentration(net(5), **{"teacher": teachers(), "groups": GROUPS, **options})


def test_a_student_cannot_teach_itself_nor_sample_a_connected_head():
    student = net(5)
    with pytest.raises(InputError, match="the student itself"):
        KnowledgeConcentration(student, [student, net(5)], groups=GROUPS)
    with pytest.raises(InputError, match=r"output = 'sampled': the classifier .* StructuralHead"):
        KnowledgeConcentration(structural_head(s1=2, s2=2)(student), teachers(), groups=GROUPS, output="sampled")


def test_the_check_runs():
    verdict, _ = quick_run(knowledge_concentration)
    assert "generalist" in verdict.findings[0].claim
    assert {row["output"] for row in verdict.tables["cost of an output"]} == {
        "full",
        "sharded in 10",
        "sampled, a tenth",
        "connected by 20 groups, sharded",
    }
    assert all(finding.outcome == "confirmed" for finding in verdict.findings[-2:])
