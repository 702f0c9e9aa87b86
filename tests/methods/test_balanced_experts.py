import pytest
import torch
import torch.nn.functional as F

from vitrail.app.build import build_method
from vitrail.errors import InputError
from vitrail.methods.supervised.balanced_experts import BalancedExperts
from vitrail.models import create_model
from vitrail.models.widenet import WideNet
from vitrail.training.recipe import Recipe


def net():
    torch.manual_seed(0)
    return WideNet(num_classes=3, img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, hidden=8)


def batch():
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"image": images, "target": torch.tensor([0, 2, 1, 1])}


def test_the_loss_is_of_labels_and_of_the_balance():
    method = BalancedExperts(net(), balance=0.3, smoothing=0.0)
    torch.manual_seed(5)
    terms = method(batch())
    torch.manual_seed(5)
    logits, unbalanced = method.model.forward_balanced(batch()["image"])
    supervised = F.cross_entropy(logits, batch()["target"])
    torch.testing.assert_close(terms["supervised"], supervised.detach())
    torch.testing.assert_close(terms["unbalanced"], unbalanced.detach())
    torch.testing.assert_close(terms["loss"], supervised + 0.3 * unbalanced)
    found = torch.autograd.grad(terms["loss"], method.model.experts.router.weight)[0]
    wanted = torch.autograd.grad(supervised + 0.3 * unbalanced, method.model.experts.router.weight)[0]
    torch.testing.assert_close(found, wanted)


def test_smoothing_and_weights_are_those_of_supervised_training():
    method = BalancedExperts(net().eval(), smoothing=0.2, class_weights=[1.0, 2.0, 3.0])
    logits = method.model(batch()["image"])
    wanted = F.one_hot(batch()["target"], 3) * 0.8 + 0.2 / 3
    slow = -(wanted * torch.tensor([1.0, 2.0, 3.0]) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(method(batch())["supervised"], slow.detach())


def test_the_balance_weighs_as_published_and_labels_may_be_several():
    assert BalancedExperts(net()).balance == 0.01
    method = BalancedExperts(net().eval(), smoothing=0.0, multilabel=True)
    target = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    logits = method.model(batch()["image"])
    found = method({**batch(), "target": target})["supervised"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, target).detach())


def test_training_by_it_evens_the_load():
    method = BalancedExperts(net(), balance=1.0)
    for block in method.model.blocks:
        block.norm2.bias.data.fill_(1)
    method.model.experts.router.weight.data[0] += 0.4  # which all tokens are given to

    def unbalanced():
        return float(method.model.eval().forward_balanced(batch()["image"])[1].detach())

    before = unbalanced()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.03)
    method.model.train()
    torch.manual_seed(1)
    for _ in range(20):
        optimizer.zero_grad()
        method(batch())["loss"].backward()
        optimizer.step()
    assert unbalanced() < before - 0.1


def test_a_recipe_names_it():
    recipe = Recipe.from_dict({"method": {"name": "widenet:BalancedExperts", "options": {"balance": 0.2}}}, "a test")

    class Facts:
        classes = ("a", "b", "c")
        multilabel = False

    method = build_method(recipe, net(), Facts())
    assert isinstance(method, BalancedExperts)
    assert method.balance == 0.2


def test_bad_input_is_explained():
    with pytest.raises(InputError, match=r"balance = -1 .*0 or more"):
        BalancedExperts(net(), balance=-1)
    with pytest.raises(InputError, match=r"needs a model with experts, and SmallResNet has none: .*widenet_nano"):
        BalancedExperts(create_model("small_resnet_nano", num_classes=3))
