"""The layer-wise shuffle: what it draws, what it restores, and that it is nothing in evaluation."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from vitrail.checks import shufflemamba as check
from vitrail.edits.layer_shuffle import LayerShuffle, shufflemamba
from vitrail.errors import InputError
from vitrail.layers.mamba import BidirectionalMamba, Mamba, MambaBlock
from vitrail.models import create_model


class Places(nn.Module):
    """A block that adds to each token the number of the place at which it is read, and its residual."""

    def forward(self, x, residual=None):
        """Return tokens, and the residual if it came."""
        numbers = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1)
        return x + numbers if residual is None else (x + numbers, residual + x)


class Net(nn.Module):
    """Blocks in a list, one after the other."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        """Return tokens."""
        for block in self.blocks:
            x = block(x)
        return x


def orders(model, x, times=200):
    """Return what one block has added to its tokens, at each of many passes."""
    return [tuple((model(x) - x)[0, :, 0].int().tolist()) for _ in range(times)]


def test_tokens_are_read_in_random_orders_and_put_back():
    torch.manual_seed(0)
    model = shufflemamba(rate=1.0)(Net(nn.Identity(), Places()))
    x = torch.randn(2, 4, 3)
    found = orders(model, x)
    assert all(sorted(order) == [0, 1, 2, 3] for order in found)
    assert len(set(found)) == 24  # also the first token moves
    read = model(x) - x
    torch.testing.assert_close(read[0], read[1])  # one order for the whole batch
    assert set(orders(model.eval(), x, 20)) == {(0, 1, 2, 3)}


def test_the_order_is_undone_and_not_done_twice():
    block = Places()
    LayerShuffle(1.0).attach(block)
    torch.manual_seed(0)
    x = torch.randn(1, 7, 2)
    found = block.train()(x) - x
    torch.manual_seed(0)
    torch.randn(1, 7, 2)
    torch.rand(())
    order = torch.randperm(7)
    expected = torch.empty(7)
    expected[order] = torch.arange(7.0)  # the place at which each token was read
    torch.testing.assert_close(found[0, :, 0], expected)


def test_a_residual_that_is_given_apart_goes_with_its_tokens():
    block = Places()
    LayerShuffle(1.0).attach(block)
    torch.manual_seed(1)
    x, residual = torch.randn(1, 6, 2), torch.randn(1, 6, 2)
    y, rest = block.train()(x, residual)
    assert sorted((y - x)[0, :, 0].round().int().tolist()) == list(range(6))
    torch.testing.assert_close(rest, residual + x)


def test_the_rate_rises_from_none_to_that_of_the_last_block():
    model = shufflemamba(rate=0.6)(Net(*(Places() for _ in range(4))))
    rates = [block.layer_shuffle.rate for block in model.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6])
    torch.manual_seed(0)
    x = torch.randn(1, 9, 1)
    for block, rate in zip(model.blocks, rates, strict=True):
        moved = sum(order != tuple(range(9)) for order in orders(block, x, 400)) / 400
        assert moved == pytest.approx(rate, abs=0.08)


@pytest.mark.parametrize("mixer", [Mamba, BidirectionalMamba])
def test_gradients_are_those_of_tokens_moved_by_hand(mixer):
    torch.manual_seed(0)
    block = MambaBlock(mixer(6, states=3), nn.LayerNorm(6)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.manual_seed(3)
    torch.rand(())
    order = torch.randperm(5)
    by_hand = torch.zeros_like(x).index_copy(1, order, block(x[:, order]))
    expected = torch.autograd.grad((by_hand * weight).sum(), [x, *block.parameters()])
    LayerShuffle(1.0).attach(block)
    torch.manual_seed(3)
    shuffled = block.train()(x)
    torch.testing.assert_close(shuffled, by_hand)
    found = torch.autograd.grad((shuffled * weight).sum(), [x, *block.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["vim_nano", "shufflemamba_nano"])
def test_evaluation_and_weights_are_those_of_the_plain_model(name):
    torch.manual_seed(0)
    plain = create_model(name, num_classes=3, img_size=32)
    model = shufflemamba(rate=1.0)(copy.deepcopy(plain).eval())
    assert not any(module.training for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
        assert not torch.allclose(model.train()(x), plain.train()(x))


def test_transformers_have_no_order_to_lose():
    torch.manual_seed(0)
    plain = create_model("test_vit", num_classes=3, img_size=160).train()
    model = shufflemamba(rate=1.0)(copy.deepcopy(plain))
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_shuffled_by_itself(twin):
    model = shufflemamba(rate=1.0)(Net(Places(), Places()))
    other = twin(model)
    x = torch.randn(1, 8, 1)
    torch.manual_seed(0)
    first = model(x)
    torch.manual_seed(0)
    assert torch.equal(other(x), first)
    other.blocks[1].layer_shuffle.rate = 0.0
    assert len(set(orders(other, x, 10))) == 1
    assert len(set(orders(model, x, 10))) > 1


def test_a_checkpointed_block_draws_the_same_again():
    torch.manual_seed(0)
    model = shufflemamba(rate=1.0)(create_model("vim_nano", num_classes=3, depth=3)).train()
    x = torch.randn(2, 3, 16, 16)
    found = []
    for frugal in (False, True):
        model.set_grad_checkpointing(frugal)
        model.zero_grad()
        torch.manual_seed(5)
        model(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_blocks_can_be_named_and_the_outer_ones_count():
    model = nn.ModuleDict({"trunk": Net(Places(), Net(Places(), Places()))})
    shufflemamba(rate=1.0)(model)
    shuffled = [name for name, module in model.named_modules() if isinstance(module, LayerShuffle)]
    assert shuffled == ["trunk.blocks.0.layer_shuffle", "trunk.blocks.1.layer_shuffle"]
    model = nn.ModuleDict({"stem": Places(), "body": Places(), "bodyguard": Places()})
    shufflemamba(rate=1.0, modules="stem|body")(model)
    shuffled = [name for name, module in model.named_modules() if isinstance(module, LayerShuffle)]
    assert shuffled == ["stem.layer_shuffle", "body.layer_shuffle"]


def test_what_cannot_be_shuffled_is_explained():
    for rate in (0.0, 1.2, "much"):
        with pytest.raises(InputError, match="rate = "):
            shufflemamba(rate=rate)
    with pytest.raises(InputError, match=r"no blocks in Sequential.*Softsign"):
        shufflemamba()(nn.Sequential(nn.Softsign()))
    with pytest.raises(InputError, match="already"):
        shufflemamba()(shufflemamba()(Net(Places())))
    model = shufflemamba(rate=1.0, modules=r"layer\d")(timm.create_model("test_resnet"))
    with pytest.raises(InputError, match=r"tokens \(B, L, C\).*modules="):
        model.train()(torch.randn(2, 3, 32, 32))


def test_arms_of_the_check_are_one_net():
    assert set(check.ARMS) == {"none", "shuffle", "stochastic depth"}
    assert (
        check.ARMS["shuffle"]["model.edits"][0]["options"]["rate"]
        == check.ARMS["stochastic depth"]["model.drop_path_rate"]
    )
    costs = check.step_costs(quick=True)
    assert [row["arm"] for row in costs] == ["none", "shuffle"]
    assert costs[0]["over_none"] == 1
