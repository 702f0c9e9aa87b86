import copy

import pytest
from torch import nn

from once import quick_run
from vitrail.checks import skan as check
from vitrail.data.synthetic.function_fits import FUNCTIONS
from vitrail.edits.skan import skan
from vitrail.errors import InputError
from vitrail.layers.selectable_kan import SelectableKAN
from vitrail.models import create_model


def test_the_edit_changes_plain_convolutions_alone():
    plain = create_model("small_resnet_nano", num_classes=3)
    model = skan(spaces=["fourier"], size=3)(copy.deepcopy(plain))
    convs = {name: m for name, m in plain.named_modules() if type(m) is nn.Conv2d}
    found = {name: m for name, m in model.named_modules() if isinstance(m, SelectableKAN)}
    assert convs.keys() == found.keys()
    for name, conv in convs.items():
        assert found[name].where["stride"] == conv.stride
        assert found[name].where["padding"] == conv.padding
        assert found[name].base.weight.shape == conv.weight.shape
    with pytest.raises(InputError, match="plain 2-D convolution"):
        skan()(model)
    assert len([m for m in skan(modules="conv1")(plain).modules() if isinstance(m, SelectableKAN)]) == 1
    biased = skan()(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)))
    assert biased[0].groups == 4
    assert biased[0].base.bias is not None


def test_an_option_that_is_not_allowed_is_refused():
    for options, words in (({"size": 13}, "size = 13"), ({"modules": "("}, "no regular expression")):
        with pytest.raises(InputError, match=words):
            skan(**options)


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert {row["function"] for row in verdict.tables["chosen"]} == set(FUNCTIONS)
    for name in FUNCTIONS:
        sizes = {row["arm"]: row["parameters"] for row in verdict.tables["errors"] if row["function"] == name}
        assert len({size for arm, size in sizes.items() if arm != "mlp"}) == 1
        assert sizes["mlp"] <= sizes["s-kan"]
