import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import InputError
from vitrail.methods.supervised.lookup_training import LookupTraining
from vitrail.models import create_model
from vitrail.models.lookupvit import LookupViT


def trainer(**options):
    torch.manual_seed(0)
    model = LookupViT(
        num_classes=3, img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, compressed=(1, 1), drop_rate=0.0
    )
    return LookupTraining(model, **options)


def test_each_classifier_learns_for_itself():
    method = trainer(smoothing=0.0)
    images, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])
    terms = method({"image": images, "target": target})
    compressed, lookup = method.model.forward_features(images)
    first = F.cross_entropy(method.model.head(compressed.mean(1)), target)
    second = F.cross_entropy(method.model.head_lookup(lookup.mean(1)), target)
    torch.testing.assert_close(terms["compressed"], first.detach())
    torch.testing.assert_close(terms["lookup"], second.detach())
    torch.testing.assert_close(terms["loss"], (first + second) / 2)
    terms["loss"].backward()
    own = torch.autograd.grad(first / 2, method.model.head.weight, retain_graph=True)[0]
    torch.testing.assert_close(method.model.head.weight.grad, own)  # and none of the mean's


def test_smoothing_and_weights_are_those_of_supervised_training():
    plain, other = trainer(smoothing=0.0), trainer(smoothing=0.2, class_weights=[1.0, 2.0, 3.0])
    batch = {"image": torch.randn(4, 3, 8, 8), "target": torch.tensor([0, 2, 1, 1])}
    logits = plain.model.both(plain.model.forward_features(batch["image"]))[1]
    wanted = F.one_hot(batch["target"], 3) * 0.8 + 0.2 / 3
    slow = -(wanted * torch.tensor([1.0, 2.0, 3.0]) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(other(batch)["lookup"], slow.detach())


def test_several_labels_of_an_image_are_learnt_each():
    method = trainer(smoothing=0.0, multilabel=True)
    images, target = torch.randn(4, 3, 8, 8), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    terms = method({"image": images, "target": target})
    for name, logits in zip(("compressed", "lookup"), method.model.both(method.model.forward_features(images))):
        torch.testing.assert_close(terms[name], F.binary_cross_entropy_with_logits(logits, target).detach())


def test_a_model_of_one_classifier_is_refused():
    with pytest.raises(InputError, match=r"SmallResNet has one classifier: .*lookupvit_nano.*'supervised'"):
        LookupTraining(create_model("small_resnet_nano", num_classes=3))
