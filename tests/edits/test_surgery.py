import pytest
import torch
from torch import nn

from vitrail.edits.surgery import apply_edits, replace_modules
from vitrail.errors import InputError
from vitrail.training.recipe import EditConfig


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))


def test_replaces_every_match_in_place():
    model = net()
    same = replace_modules(model, lambda _, m: isinstance(m, nn.ReLU), lambda _: nn.GELU(), what="activation")
    assert same is model
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert sum(isinstance(m, nn.GELU) for m in model.modules()) == 2


def test_the_rule_sees_the_path():
    model = replace_modules(net(), lambda name, _: name == "2.0", lambda m: nn.Identity(), what="layer")
    assert isinstance(model[2][0], nn.Identity)
    assert isinstance(model[0], nn.Conv2d)


def test_a_replacement_that_contains_what_matches_is_not_replaced_again():
    def wrap(module: nn.Module) -> nn.Module:
        return nn.Sequential(module, nn.Identity())

    model = replace_modules(net(), lambda _, m: isinstance(m, nn.ReLU), wrap, what="activation")
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2


def test_mode_and_device_carry_over():
    model = net().eval().to("meta")
    replace_modules(
        model, lambda _, m: isinstance(m, nn.Conv2d), lambda m: nn.Conv2d(m.in_channels, 4, 1), what="convolution"
    )
    assert all(not m.training for m in model.modules())
    assert all(p.device == torch.device("meta") for p in model.parameters())


def test_no_match_lists_the_candidates():
    with pytest.raises(InputError, match=r"no batch normalisation in Sequential.*Conv2d x2.*ReLU x2"):
        replace_modules(net(), lambda _, m: isinstance(m, nn.BatchNorm2d), nn.Identity, what="batch normalisation")


def test_an_option_that_an_edit_does_not_take_is_named():
    edit = EditConfig(name="triplet_attention", options={"kernel": 3})
    with pytest.raises(InputError, match="unknown option of triplet_attention 'kernel': did you mean 'kernel_size'"):
        apply_edits(net(), [edit])
