import copy
import math

import numpy as np
import pytest
import torch

from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.nasnet import NASNET_A, OPERATIONS, read_genotype
from vitrail.search.cell_space import CellSpace

SMALL = {"filters": 4, "stem_width": 4}


def test_the_space_is_the_papers():
    space = CellSpace()
    assert len(space.choices) == 2 * 5 * 5
    assert space.choices[:10] == (2, 2, 13, 13, 2, 3, 3, 13, 13, 2)
    assert space.choices[20:27] == (6, 6, 13, 13, 2, 2, 2)
    assert math.prod(space.choices) == (math.factorial(6) ** 2 * (13 * 13 * 2) ** 5) ** 2


def test_a_code_is_a_genotype_and_back():
    space = CellSpace(blocks=2, operations=("sep_3x3", "identity"), combinations=("concat", "add"))
    code = (0, 1, 0, 1, 0, 2, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 2, 1, 1, 0)
    genotype = space.decode(code)
    assert genotype == {
        "normal": {"blocks": [[0, 1, "sep_3x3", "identity", "concat"], [2, 1, "identity", "sep_3x3", "add"]]},
        "reduction": {"blocks": [[1, 1, "sep_3x3", "sep_3x3", "add"], [0, 2, "identity", "identity", "concat"]]},
    }
    assert space.encode(genotype) == code
    rng = np.random.default_rng(0)
    whole = CellSpace()
    for _ in range(5):
        genotype = whole.sample(rng)
        assert whole.decode(whole.encode(genotype)) == genotype
    closest = {kind: {"blocks": NASNET_A[kind]["blocks"]} for kind in NASNET_A}
    assert whole.decode(whole.encode(closest)) == closest


def test_every_operation_and_state_is_drawn():
    rng = np.random.default_rng(0)
    drawn = [read_genotype(CellSpace().sample(rng)) for _ in range(40)]
    blocks = [block for genotype in drawn for plan in genotype.values() for block in plan.blocks]
    assert {name for block in blocks for name in (block.left_op, block.right_op)} == set(OPERATIONS)
    assert {state for block in blocks for state in (block.left, block.right)} == set(range(6))
    assert {block.combine for block in blocks} == {"add", "concat"}


def test_a_mutation_differs_in_one_decision():
    space, rng = CellSpace(blocks=2, combinations=("add",)), np.random.default_rng(0)
    genotype = space.sample(rng)
    kept, code = copy.deepcopy(genotype), space.encode(genotype)
    places = set()
    for _ in range(150):
        other = space.encode(space.mutate(genotype, rng))
        (place,) = [number for number, (old, new) in enumerate(zip(code, other)) if old != new]
        places.add(place)
    assert places == {number for number, count in enumerate(space.choices) if count > 1}
    assert genotype == kept


def test_what_was_found_is_a_plain_model_small_and_large():
    space = CellSpace(blocks=2, options=SMALL)
    genotype = space.sample(np.random.default_rng(1))
    torch.manual_seed(0)
    small = space.build(genotype, num_classes=3)
    torch.manual_seed(0)
    plain = create_model("nasnet_nano", num_classes=3, genotype=genotype, **SMALL)
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(small.eval()(x), plain.eval()(x))
    large = space.build(genotype, num_classes=3, filters=8, cells=2)
    assert [len(stage.blocks) for stage in large.stages] == [2, 3, 3]
    assert large.num_features == 2 * small.num_features
    assert large.stages[0].blocks[0].blocks == small.stages[0].blocks[0].blocks
    genotype["normal"]["blocks"].clear()  # the model keeps nothing of the caller's
    assert len(small.stages[0].blocks[0].blocks) == 2


def test_cost_counts_parameters_and_multiply_adds():
    space = CellSpace(blocks=1, operations=("conv_1x1", "identity"), combinations=("add",), options=SMALL)
    conv, nothing = (space.cost(space.decode((0, 1, at, 1, 0) * 2), img_size=16) for at in (0, 1))
    # Three normal cells of 4, 8 and 16 filters at 8, 4 and 2 places a side; in a reduction the identity is a 1x1
    # convolution, too.
    sides = {4: 8, 8: 4, 16: 2}
    assert conv.madds - nothing.madds == sum(width**2 * side**2 for width, side in sides.items())
    assert conv.params - nothing.params == sum(width**2 + 2 * width for width in sides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks = 0 .*1 or more"),
        ({"operations": ("sep_9x9",)}, r"operations = \['sep_9x9'\] .*sep_7x7, each once"),
        ({"operations": ("identity", "identity")}, "operations = .*each once"),
        ({"operations": ()}, r"operations = \[\]"),
        ({"combinations": ("mul",)}, r"combinations = \['mul'\] .*add, concat"),
    ],
)
def test_a_space_of_what_there_is_not_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        CellSpace(**options)


def test_what_is_not_of_the_space_is_refused():
    with pytest.raises(InputError, match=r"genotype.normal is not of this space.*5 blocks.*no output that a block"):
        CellSpace().encode(NASNET_A)
    genotype = CellSpace(blocks=1).decode((0, 1, 12, 0, 1) * 2)
    for space in (
        CellSpace(),
        CellSpace(blocks=1, combinations=("add",)),
        CellSpace(blocks=1, operations=("sep_7x7",)),
    ):
        with pytest.raises(InputError, match="not of this space"):
            space.encode(genotype)
    for code in ((0, 1, 12, 0, 1), (0, 2, 0, 0, 0) * 2, (0, -1, 0, 0, 0) * 2):
        with pytest.raises(InputError, match=r"the code .* is not allowed: give 10 numbers"):
            CellSpace(blocks=1).decode(code)
