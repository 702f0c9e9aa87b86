import pytest
import torch

from exact import moved, normal
from once import quick_run
from vitrail.app.build import count_parameters
from vitrail.checks import ms_mlp as check
from vitrail.edits.swin_mix_shift import swin_mix_shift
from vitrail.errors import InputError
from vitrail.layers.mix_shift import MIX_SIZES, SHIFTS
from vitrail.models import create_model
from vitrail.models.ms_mlp import MSMLP, Block, PatchEmbed, checkpoint_filter_fn

TINY = {"embed_dim": 5, "depths": (1, 2), "mix_sizes": ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7)), "patch_size": 2}


def tiny(**options):
    torch.manual_seed(0)
    return MSMLP(num_classes=3, **{**TINY, **options})


def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def test_a_block_mixes_then_normalises_then_feeds_forward_and_adds():
    block = moved(Block(10, MIX_SIZES[0], SHIFTS, 3.0, drop_path=0, layer_scale=0.5))
    x = 1e-3 * normal(2, 4, 3, 10)  # so that the epsilon counts
    with torch.no_grad():
        for mixer in (*block.mix.across, *block.mix.down):
            mixer.bias.zero_()
    inside = block.mlp.fc1(layer_norm(block.norm, block.mix(x)))
    assert inside.shape[-1] == 30
    inside = inside * 0.5 * (1 + torch.erf(inside / 2**0.5))
    torch.testing.assert_close(block(x), x + block.ls.gamma * block.mlp.fc2(inside), rtol=1e-9, atol=1e-9)
    block = moved(Block(10, MIX_SIZES[0], SHIFTS, 3.0, drop_path=1 - 1e-9, layer_scale=0.5))
    assert torch.equal(block.train()(x), x)  # the branch is left out
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1)])
def test_patches_are_of_the_image_filled_up_with_zeros(height, width):
    embed = moved(PatchEmbed(3, 4, 2))
    x = normal(2, 3, height, width)
    found = embed(x)
    rows, columns = -(-height // 2), -(-width // 2)
    assert found.shape == (2, 4, rows, columns)
    for i in range(rows):
        for j in range(columns):
            seen = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            patch = torch.zeros(2, 3, 2, 2, dtype=x.dtype)
            patch[:, :, : seen.shape[2], : seen.shape[3]] = seen
            vector = torch.einsum("bcij,ocij->bo", patch, embed.proj.weight) + embed.proj.bias
            torch.testing.assert_close(found[:, :, i, j], layer_norm(embed.norm, vector), rtol=1e-9, atol=1e-9)


def test_the_net_is_patches_stages_mean_norm_and_head():
    model = moved(tiny()).eval()
    x = normal(2, 3, 12, 8)
    inside = model.stem(x).permute(0, 2, 3, 1)
    inside = model.stages[0].blocks[0](inside)
    inside = model.stages[1].downsample(inside.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for block in model.stages[1].blocks:
        inside = block(inside)
    torch.testing.assert_close(model.forward_features(x), inside.permute(0, 3, 1, 2))
    pooled = layer_norm(model.norm, inside.mean((1, 2)))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)
    model = moved(tiny(drop_rate=1 - 1e-9))
    torch.testing.assert_close(model(x), model.head.bias.expand(2, -1))


def test_weights_begin_as_published():
    model = create_model("ms_mlp_nano", num_classes=100, layer_scale=1e-6)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert not module.bias.any()
    mixer = model.stages[0].blocks[0].mix.across[4]
    assert float(mixer.weight.detach().abs().max()) == pytest.approx(1 / 7, rel=0.05)  # as torch draws it
    assert torch.equal(model.stages[1].blocks[0].ls.gamma.detach(), torch.full((48,), 1e-6))
    assert not hasattr(tiny(layer_scale=0.0).stages[0].blocks[0].ls, "gamma")
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in tiny(drop_path_rate=0.4).stages for b in s.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4])


def test_variants_are_as_published():
    counts = {"tiny": 28_656_232, "small": 50_303_752, "base": 88_696_792}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(f"ms_mlp_{name}", num_classes=1000)
        assert count_parameters(model) == count
        assert [len(stage.blocks) for stage in model.stages] == [3, 3, 9 if name == "tiny" else 27, 3]
        for stage, sizes in zip(model.stages, MIX_SIZES):
            for block in stage.blocks:
                assert [mixer.kernel_size[0] for mixer in block.mix.across] == list(sizes)
                assert [mixer.kernel_size[1] for mixer in block.mix.down] == list(sizes)
                assert block.mix.shifts == (-2, -1, 0, 1, 2)
                assert block.ls.init_values == 1e-6
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)
        assert model.pretrained_cfg["crop_pct"] == 0.875


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(layer_scale=0.1), tiny(layer_scale=0.2)
    theirs = {prefix + _authors_name(key): value + 1 for key, value in ours.state_dict().items()}
    names = ["patch_embed.norm.weight", "layers.0.downsample.proj.weight", "layers.1.blocks.1.dwconv_td.4.weight"]
    names += ["layers.1.blocks.0.gamma", "layers.0.blocks.0.pwconv2.bias", "layers.0.blocks.0.norm.bias", "norm.bias"]
    assert {prefix + name for name in names} <= set(theirs)
    for given in (theirs, {"model": theirs}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def _authors_name(key):
    head, _, rest = key.partition(".")
    if head == "stem":
        return f"patch_embed.{rest}"
    if head != "stages":
        return key
    stage, part, *rest = rest.split(".")
    if part == "downsample":
        return ".".join([f"layers.{int(stage) - 1}.downsample", *rest])
    number, layer, *rest = rest
    if layer == "mix":
        end = ["dwconv_lr" if rest[0] == "across" else "dwconv_td", *rest[1:]]
    elif layer == "mlp":
        end = [f"pwconv{rest[0][-1]}", rest[1]]
    else:
        end = ["gamma"] if layer == "ls" else [layer, *rest]
    return ".".join([f"layers.{stage}.blocks.{number}", *end])


def test_any_size_dense_features_and_pooling():
    features = create_model("ms_mlp_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 19, 25), (96, 5, 7), (192, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    large = create_model("ms_mlp_nano", num_classes=4, patch_size=4).eval()
    with torch.no_grad():
        assert large(torch.zeros(1, 3, 225, 190)).shape == large(torch.zeros(1, 3, 224, 224)).shape == (1, 4)
    model = MSMLP(num_classes=0, global_pool="", **TINY)
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 10, 5, 9)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, r"mix_sizes has 2 entries and depths = \(1, 1, 1\)"),
        ({"embed_dim": 6}, "6 channels cannot be cut into 5 groups"),
        ({"shifts": (0, 1)}, r"shifts = \(0, 1\) are for 5 and 2 groups"),
        ({"patch_size": 0}, "patch_size = 0 .*1 pixel"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


# ---- the check


def test_arms_of_the_check_are_of_one_size():
    counts = {
        name: count_parameters(create_model("ms_mlp_nano", num_classes=10, **options))
        for name, options in check.ARMS.items()
    }
    assert counts["mix"] == counts["mix-shift"]
    assert counts["shift"] == pytest.approx(counts["mix-shift"], rel=0.01)
    name, options = check.SWIN["model.name"], check.SWIN["model.options"]
    swin = create_model(name, num_classes=10, img_size=28, **options)
    wide = create_model(name, num_classes=10, img_size=28, **{**options, "mlp_ratio": check.SWIN_WIDER})
    assert count_parameters(swin_mix_shift()(wide)) == pytest.approx(count_parameters(swin), rel=0.01)


def test_the_authors_count_is_that_of_their_code():
    # From the lines of their counter, for an image of 8 x 8 pixels: 16 places of 5 channels, then 4 of 10.
    first = 16 * 5 * 3 * 4 + 16 * 5 + 2 * 16 * (1 + 1 + 3 + 5 + 7) + 2 * 16 * 5 + 2 * 16 * 5 * 5 * 4
    merging = 16 * 5 + 16 * 5 * 10 * 4
    block = 2 * 4 * 2 * (1 + 3 + 3 + 5 + 7) + 2 * 4 * 10 + 2 * 4 * 10 * 10 * 4
    assert check.authors_count(tiny(), 8) == first + merging + 2 * block + 10 * 4 // 4 + 10 * 3


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert verdict.outcome == "not seen"  # one seed judges nothing
    assert set(verdict.findings[0].arms) == {"mix-shift", "shift", "mix"}
    assert set(verdict.findings[2].arms) == {"swin", "swin + mix-shift"}
    assert verdict.findings[3].outcome == "confirmed"
    assert len(verdict.tables["cost of the arms"]) == 5
