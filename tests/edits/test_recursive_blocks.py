import pytest
import timm
import torch

from vitrail.edits.recursive_blocks import RecursiveBlock, SlicedAttention, recursive
from vitrail.errors import InputError
from vitrail.layers.recursion import in_groups
from vitrail.models import create_model


def vit(**options):
    torch.manual_seed(0)
    own = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**own, **options})


def test_each_block_is_passed_through_with_a_projection_behind():
    plain, model = vit().eval(), vit().eval()
    assert recursive(loops=3, projection_ratio=2.0)(model) is model
    assert [len(block.projections) for block in model.blocks] == [3, 3]
    assert model.blocks[1].projections[2].mlp.fc1.out_features == 24
    own = model.state_dict()
    kept = {key.replace("block.", "", 1) if ".block." in key else key for key in own if ".projections." not in key}
    assert kept == set(plain.state_dict())
    block, x = model.blocks[0], torch.randn(2, 17, 12)
    y = x
    for project in block.projections:
        y = project(plain.blocks[0](y))
    torch.testing.assert_close(block(x), y)


def test_passes_attend_in_their_groups_by_turns(monkeypatch):
    import vitrail.edits.recursive_blocks as module

    seen = []

    def note(attend, x, groups, **options):
        seen.append((groups, options["shuffled"], options["training"]))
        return in_groups(attend, x, groups, **options)

    monkeypatch.setattr(module, "in_groups", note)
    model = recursive(loops=3, groups=(4, 2))(vit(depth=1)).eval()
    x = torch.randn(2, 3, 16, 16)
    model(x)
    model.train()(x)
    turns = [(4, False), (2, True), (4, False)]
    assert seen == [(*turn, False) for turn in turns] + [(*turn, True) for turn in turns]
    seen.clear()
    model = recursive(groups=(4, 1))(vit(depth=1)).eval()
    model(x)
    assert seen == [(4, False, False)]  # the whole is attended to as before


def test_slices_are_of_attention_alone():
    model, plain = recursive(loops=2, groups=(3, 2))(vit(depth=1)).eval(), vit(depth=1).eval()
    block, host, x = model.blocks[0], plain.blocks[0], torch.randn(1, 17, 12)
    y = x
    for project, groups, shuffled in zip(block.projections, (3, 2), (False, True)):
        y = y + in_groups(host.attn, host.norm1(y), groups, shuffled=shuffled)
        y = project(y + host.mlp(host.norm2(y)))
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("name", ["cswin_nano", "swin_nano"])
def test_ours_become_recursive_too(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3)
    plain = sum(parameter.numel() for parameter in model.parameters())
    recursive()(model).eval()
    blocks = [module for module in model.modules() if isinstance(module, RecursiveBlock)]
    widths = [block.block.norm1.normalized_shape[0] for block in blocks]
    added = sum(2 * (2 * width * width + 4 * width + 2) for width in widths)
    assert sum(parameter.numel() for parameter in model.parameters()) == plain + added
    assert model(torch.randn(1, 3, 28, 28)).shape == (1, 3)


def test_names_choose_blocks_and_weights_keep_their_kind():
    model = recursive(modules=r"blocks\.1", groups=(2, 2))(vit().bfloat16())
    assert [isinstance(block, RecursiveBlock) for block in model.blocks] == [False, True]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert isinstance(model.blocks[1].block.attn, SlicedAttention)
    assert not any(isinstance(module, SlicedAttention) for module in recursive()(vit()).modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loops": 1}, "loops = 1 .*2 passes or more"),
        ({"loops": 2.5}, "loops = 2.5 .*2 passes or more"),
        ({"projection_ratio": 0}, "projection_ratio = 0 .*more than 0"),
        ({"groups": (2,)}, r"groups = \(2,\) .*two numbers"),
        ({"groups": 2}, "groups = 2 is .*two numbers"),
        ({"groups": (2, 0)}, r"groups = \(2, 0\) .*two numbers"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        recursive(**options)


def test_models_that_do_not_fit_are_explained():
    model = recursive()(vit())
    with pytest.raises(InputError, match="recursive already"):
        recursive()(model)
    with pytest.raises(InputError, match="found no transformer block with norm1 and attn in ResNet"):
        recursive()(timm.create_model("resnet18"))
    with pytest.raises(
        InputError, match=r"groups = \(1, 2\) slices timm's Attention, and this Swin has WindowAttention"
    ):
        recursive(groups=(1, 2))(create_model("swin_nano", num_classes=3))
    model = recursive(groups=(2, 2))(vit())
    with pytest.raises(InputError, match=r"groups = 2 .* without a mask"):
        model.blocks[0](torch.zeros(1, 17, 12), attn_mask=torch.zeros(17, 17))
