import pytest
import timm
import torch
from timm.models.swin_transformer import WindowAttention

from vitrail.edits.swin_mix_shift import swin_mix_shift
from vitrail.errors import InputError
from vitrail.layers.mixed_block import MixedSwinBlock

SMALL = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 10, "depths": (1, 2), "num_heads": (1, 2)}


def swin(**options):
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **{**SMALL, **options})


def test_attention_is_replaced_and_all_else_stays():
    model, plain = swin().eval(), swin().eval()
    assert swin_mix_shift()(model) is model
    assert not any(isinstance(module, WindowAttention) for module in model.modules())
    kept = {key: value for key, value in plain.state_dict().items() if ".attn." not in key}
    own = model.state_dict()
    assert {key for key in own if ".mix." not in key} == set(kept)
    assert all(torch.equal(own[key], value) for key, value in kept.items())
    block, x = model.layers[0].blocks[0], torch.randn(2, 6, 5, 10)
    y = x + block.mix(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_regions_are_those_of_the_stage():
    model = swin_mix_shift()(swin())
    sizes = [[mixer.kernel_size[0] for mixer in block.mix.across] for stage in model.layers for block in stage.blocks]
    assert sizes == [[1, 1, 3, 5, 7], [1, 3, 3, 5, 7], [1, 3, 3, 5, 7]]
    model = swin_mix_shift(mix_sizes=((1, 3),), shifts=(0, 3))(swin())
    for stage in model.layers:
        for block in stage.blocks:
            assert [mixer.kernel_size[0] for mixer in block.mix.down] == [1, 3]
            assert block.mix.shifts == (0, 3)


def test_stochastic_depth_stays_with_its_branch():
    model, plain = swin(drop_path_rate=0.5), swin(drop_path_rate=0.5)
    rate = plain.layers[1].blocks[1].drop_path1.drop_prob
    block = swin_mix_shift()(model).layers[1].blocks[1]
    assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == rate == 0.5


def test_the_model_takes_another_size_afterwards():
    model = swin_mix_shift()(swin()).eval()
    model.set_input_size((44, 36))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 44, 36)).shape == (1, 3)


def test_a_published_net_of_timm_has_places_for_it():
    with torch.device("meta"):
        model = swin_mix_shift()(timm.create_model("swin_s3_tiny_224"))
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert len(blocks) == 12
    assert all(isinstance(block, MixedSwinBlock) for block in blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix_sizes": ()}, r"mix_sizes = \(\) is not allowed"),
        ({"mix_sizes": ((1, 2, 3, 3, 3),)}, "mix_sizes = 2 is not allowed"),
        ({"shifts": (0, 1)}, r"shifts = \(0, 1\) are for 5 and 2 groups"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        swin_mix_shift(**options)


def test_a_model_without_a_place_is_left_as_it_was():
    model = swin(embed_dim=6, num_heads=(1, 2))
    before = str(model)
    with pytest.raises(InputError, match="6 channels cannot be cut into 5 groups"):
        swin_mix_shift()(model)
    assert str(model) == before
    with pytest.raises(InputError, match="found no block of Swin with attention in Sequential"):
        swin_mix_shift()(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="found no block of Swin with attention in SwinTransformer;"):
        swin_mix_shift()(swin_mix_shift()(swin()))
