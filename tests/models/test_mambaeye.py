import math

import numpy as np
import pytest
import torch
from timm.optim import param_groups_weight_decay

from exact import normal
from once import quick_run
from vitrail.app.build import count_parameters
from vitrail.checks import mambaeye as check
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.mambaeye import (
    WALKS,
    MambaEye,
    checkpoint_filter_fn,
    cut,
    embed_moves,
    moves_between,
    seen_share,
    shuffled,
    spiral,
    tiles,
)

TINY = {"patch_size": 3, "dim": 8, "depth": 3, "move_dim": 4, "states": 2, "head_dim": 4}


def tiny(**options):
    torch.manual_seed(0)
    return MambaEye(num_classes=3, **{**TINY, **options}).eval()


def exact(**options):
    """Return one in double precision, with all that starts at zero or one moved."""
    model = tiny(**options).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * torch.randn(value.shape, dtype=torch.float64, generator=generator)
    return model


def drawn(height, width, patch, *shape, seed=0):
    """Return random positions (*shape, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, side - patch + 1, shape, generator=generator) for side in (height, width)], -1)


# ---- walks


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(6, 9, [0, 3], [0, 3, 6]), (7, 5, [0, 3, 4], [0, 2]), (3, 4, [0], [0, 1]), (2, 1, [0], [0])],
)
def test_tiles_cover_an_image_and_stay_inside(height, width, rows, columns):
    assert tiles(height, width, 3).tolist() == [[row, column] for row in rows for column in columns]


@pytest.mark.parametrize("each", [False, True])
def test_patches_are_cut_channel_by_channel(each):
    images = normal(2, 2, 7, 5)
    positions = drawn(7, 5, 3, *((2, 6) if each else (6,)))
    found = cut(images, positions, 3)
    assert found.shape == (2, 6, 18)
    for number, image in enumerate(images):
        for step, (row, column) in enumerate((positions[number] if each else positions).tolist()):
            assert torch.equal(found[number, step], image[:, row : row + 3, column : column + 3].flatten())


def test_an_image_below_a_patch_is_filled_up_with_zeros():
    image = normal(1, 2, 2, 5)
    assert tiles(2, 5, 3).tolist() == [[0, 0], [0, 2]]
    found = cut(image, tiles(2, 5, 3), 3).view(2, 2, 3, 3)
    assert torch.equal(found[1, :, :2], image[0, :, :, 2:])
    assert not found[:, :, 2].any()


def test_moves_lead_from_patch_to_patch():
    positions = torch.tensor([[4, 1], [4, 3], [0, 0], [0, 0]])
    expected = torch.tensor([[0.0, 0], [0, 2], [-4, -3], [0, 0]])
    assert torch.equal(moves_between(positions), expected)
    assert torch.equal(moves_between(positions.expand(2, 4, 2)), expected.expand(2, 4, 2))


def test_moves_are_described_by_waves():
    moves = torch.tensor([[0.0, 0.0], [5.0, -3.0], [-1536.0, 700.0]])
    found = embed_moves(moves, 6)
    for row, move in zip(found.tolist(), moves.tolist()):
        expected = []
        for axis in move:
            angles = [axis / 10000 ** (2 * k / 6) for k in range(3)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-3)
    assert embed_moves(moves.to(torch.int64), 6).dtype == torch.float32


@pytest.mark.parametrize(("height", "width", "patch"), [(7, 5, 3), (4, 4, 1), (3, 3, 3)])
def test_the_share_seen_counts_each_pixel_once(height, width, patch):
    positions = drawn(height, width, patch, 2, 9)
    found = seen_share(positions, height, width, patch)
    for walk, shares in zip(positions, found):
        seen = torch.zeros(height, width, dtype=torch.bool)
        for (row, column), share in zip(walk.tolist(), shares.tolist()):
            seen[row : row + patch, column : column + patch] = True
            assert share == pytest.approx(float(seen.float().mean()))
        torch.testing.assert_close(seen_share(walk, height, width, patch), shares)
    assert seen_share(tiles(height, width, patch), height, width, patch)[-1] == 1


def test_walks_by_name():
    assert spiral((3, 3)).tolist() == [4, 0, 1, 2, 5, 8, 7, 6, 3]
    assert spiral((1, 4)).tolist() == [1, 2, 0, 3]
    assert WALKS["columns"]((2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert WALKS["reversed"]((2, 3)).tolist() == [5, 4, 3, 2, 1, 0]
    assert WALKS["snake"]((2, 3)).tolist() == [0, 1, 2, 5, 4, 3]
    assert WALKS["raster"]((2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert WALKS["random"] is shuffled
    assert not np.array_equal(shuffled((5, 6)), shuffled((6, 5)))
    for name, walk in WALKS.items():
        for shape in ((1, 1), (4, 7), (6, 3)):
            order = walk(shape)
            assert sorted(order) == list(range(math.prod(shape))), name
            assert np.array_equal(order, walk(shape)), name


@pytest.mark.parametrize("walk", WALKS)
def test_an_image_is_read_along_its_walk(walk):
    model = exact(walk=walk)
    images = normal(2, 3, 8, 13)
    positions = tiles(8, 13, 3)[torch.tensor(np.array(WALKS[walk]((3, 5))))]
    assert torch.equal(model.positions(8, 13), positions)
    torch.testing.assert_close(model(images), model(images, positions))


def test_each_image_may_have_a_walk_of_its_own():
    model, images = exact(), normal(2, 3, 9, 7)
    positions = drawn(9, 7, 3, 2, 6)
    alone = [model(image[None], walk) for image, walk in zip(images, positions)]
    torch.testing.assert_close(model(images, positions), torch.cat(alone))


# ---- the net


def silu(x):
    return x / (1 + torch.exp(-x))


def rms_norm(layer, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight


def test_the_net_is_its_parts():
    model = exact()
    patches, moves = normal(2, 5, 27), torch.randint(-9, 9, (2, 5, 2), generator=torch.Generator().manual_seed(1))
    given = torch.cat((patches, embed_moves(moves, 4).double()), 2)
    x = silu(given @ model.embed.weight.T + model.embed.bias)
    for block in model.blocks:
        x = x + block.mixer(rms_norm(block.norm, x))
    x = rms_norm(model.norm, x)
    logits = x @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model.forward_walk(patches, moves), logits)
    torch.testing.assert_close(model.forward_walk(patches, moves[0])[0], logits[0])


def test_an_image_is_answered_after_its_last_step():
    model, images = exact(), normal(2, 3, 8, 7)
    positions = model.positions(8, 7)
    walked = model.forward_walk(cut(images, positions, 3), moves_between(positions))
    assert walked.shape == (2, 9, 3)
    torch.testing.assert_close(model(images), walked[:, -1])
    torch.testing.assert_close(model.head(model.forward_features(images)), walked)
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model(images), model.head(model.forward_features(images).mean(1)))


def test_no_answer_feels_what_comes_later():
    model = exact()
    patches, moves = normal(1, 6, 27).requires_grad_(), normal(1, 6, 2).float().requires_grad_()
    logits = model.forward_walk(patches, moves)
    for step in range(6):
        felt = torch.autograd.grad(logits[0, step].sum(), (patches, moves), retain_graph=True)
        for grad in felt:
            assert (grad[0].abs().sum(1) > 0).tolist() == [True] * (step + 1) + [False] * (5 - step)
    changed = patches.detach().clone()
    changed[:, 4:] = 9
    assert torch.equal(model.forward_walk(changed, moves)[:, :4], logits[:, :4])


def test_it_knows_moves_and_no_places():
    model = exact()
    images, positions = normal(1, 3, 7, 8), drawn(7, 8, 3, 6)
    canvas = normal(1, 3, 19, 17, seed=5)
    canvas[:, :, 9:16, 4:12] = images
    torch.testing.assert_close(model(canvas, positions + torch.tensor([9, 4])), model(images, positions))
    assert not torch.allclose(model(images, positions.flip(0)), model(images, positions))


@pytest.mark.parametrize("parts", [(1,) * 9, (4, 5), (2, 1, 6)], ids=str)
def test_a_stream_gives_what_the_whole_walk_gives(parts):
    model = exact()
    patches, moves = normal(2, 9, 27), normal(9, 2).float()
    whole, last = model.stream(patches, moves)
    found, memory, sizes = [], None, set()
    for some, led in zip(patches.split(parts, 1), moves.split(parts)):
        logits, memory = model.stream(some, led, memory)
        found.append(logits)
        sizes.add(sum(part.numel() for kept in memory for part in kept))
    torch.testing.assert_close(torch.cat(found, 1), whole)
    torch.testing.assert_close(memory[-1].state, last[-1].state)
    assert sizes == {3 * 2 * (20 * 3 + 16 * 2)}


@pytest.mark.parametrize("size", [(14, 14), (16, 112), (45, 61), (112, 112), (3, 2)])
def test_images_of_any_size(size):
    model = create_model("mambaeye_nano", num_classes=5).eval()
    with torch.no_grad():
        found = model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (2, 5)
    assert found.isfinite().all()


@pytest.mark.parametrize("walk", ["random", "spiral"])
def test_maps_are_the_steps_put_back(walk):
    model, images = exact(walk=walk), normal(2, 3, 7, 11)
    features, maps = model.forward_intermediates(images)
    torch.testing.assert_close(features, model.forward_features(images))
    places = WALKS[walk]((3, 4))
    (last,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert [tuple(found.shape) for found in maps] == [(2, 8, 3, 4)] * 3
    for step, place in enumerate(places.tolist()):
        torch.testing.assert_close(last[:, :, place // 4, place % 4], features[:, step])
    flat = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(flat[0].transpose(1, 2).unflatten(2, (3, 4)), maps[0])
    backbone = create_model("mambaeye_nano", num_classes=5, features_only=True, out_indices=(0, 2))
    assert [tuple(found.shape[1:]) for found in backbone(torch.zeros(1, 3, 21, 8))] == [(96, 6, 2)] * 2
    assert len(backbone.model.blocks) == 3


def test_what_is_added_up_is_kept_in_float32():
    model, seen = tiny().bfloat16(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, found: seen.append(found[0].dtype))
    assert model(torch.zeros(1, 3, 6, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [torch.float32] * 3


def test_weights_begin_as_published():
    model = create_model("mambaeye_nano", num_classes=50)
    for block in model.blocks:
        largest = float(block.mixer.out_proj.weight.detach().abs().max())
        assert largest == pytest.approx(192**-0.5 / 4**0.5, rel=0.01)
    for layer in (model.embed, model.head):
        assert float(layer.weight.detach().abs().max()) == pytest.approx(layer.in_features**-0.5, rel=0.02)


def test_variants_are_as_published():
    for name, depth, count in (("tiny", 12, 5_769_480), ("small", 24, 10_953_768), ("base", 48, 21_322_344)):
        with torch.device("meta"):
            model = create_model(f"mambaeye_{name}", num_classes=1000)
        assert len(model.blocks) == depth
        assert count_parameters(model) == count
        assert model.embed.in_features == 3 * 16 * 16 + 2 * 256
        assert model.pretrained_cfg["mean"] == (0, 0, 0)
        assert model.pretrained_cfg["std"] == (1, 1, 1)


def test_rates_steps_and_skips_are_not_decayed():
    model = tiny()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    kept = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == (parameter.ndim < 2), name
    assert model.no_weight_decay() == {"*.A_log", "*.dt_bias", "*.D"}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_authors_keys_become_ours(prefix):
    ours, twin = tiny(), tiny()
    named = {"embed": "init_fc.0", "blocks": "mamba2_net.layers", "norm": "mamba2_net.norm_f"}
    theirs = {}
    for key, value in ours.state_dict().items():
        first, _, rest = key.partition(".")
        theirs[f"{prefix}{named.get(first, 'classification_head.0')}.{rest}"] = value + 1
    assert f"{prefix}mamba2_net.layers.2.mixer.conv1d.bias" in theirs
    for given in (theirs, {"state_dict": theirs, "epoch": 3}):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: tiny(patch_size=0), "patch_size = 0 .*1 or more"),
        (lambda: tiny(depth=0), "depth = 0"),
        (lambda: tiny(move_dim=3), "move_dim = 3 .*even"),
        (lambda: tiny(move_dim=0), "move_dim = 0 .*even"),
        (lambda: tiny(walk="spirall"), "unknown walk 'spirall'.*'spiral'.*positions"),
        (lambda: tiny(head_dim=3), "head_dim = 3 does not divide 16"),
        (lambda: tiny(global_pool="max"), "global_pool = 'max' .*last or avg"),
        (lambda: tiny(global_pool=""), "global_pool = '' .*num_classes = 0"),
        (lambda: tiny().forward_walk(torch.zeros(1, 2, 26), torch.zeros(2, 2)), r"patches \(1, 2, 26\).*27"),
        (lambda: tiny().forward_walk(torch.zeros(1, 0, 27), torch.zeros(0, 2)), "at least one patch"),
        (lambda: tiny().forward_walk(torch.zeros(1, 2, 27), torch.zeros(3, 2)), r"moves \(3, 2\) do not fit"),
        (lambda: tiny()(torch.zeros(1, 3, 6, 8), torch.zeros(2, 2)), "torch.float32 are not allowed"),
        (lambda: tiny()(torch.zeros(1, 3, 6, 8), torch.zeros(2, 4, 2).long()), r"\(1, L, 2\) for 1 images"),
        (lambda: tiny()(torch.zeros(1, 3, 6, 8), torch.zeros(0, 2).long()), r"positions \(0, 2\)"),
        (lambda: tiny()(torch.zeros(1, 3, 6, 8), torch.tensor([[4, 0]])), "rows from 0 to 3 and columns from 0 to 5"),
        (lambda: tiny()(torch.zeros(1, 3, 6, 8), torch.tensor([[0, 6]])), r"leave an image of \(6, 8\)"),
        (lambda: tiny()(torch.zeros(1, 3, 6, 8), torch.tensor([[0, -1]])), r"from \(0, -1\)"),
        (lambda: tiny().forward_intermediates(torch.zeros(1, 3, 6, 8), output_fmt="NHWC"), "output_fmt = 'NHWC'"),
    ],
)
def test_what_does_not_fit_is_explained(use, message):
    with pytest.raises(InputError, match=message):
        use()


# ---- the check


def test_the_check_runs():
    verdict, _ = quick_run(check)
    assert [finding.outcome for finding in verdict.findings] == ["not seen"] * 3 + ["confirmed"] * 2
    assert [row["pixels"] for row in verdict.tables["accuracy by size"]] == [8, 16, 24]
    assert [row["patches"] for row in verdict.tables["accuracy by patches seen"]] == [1, 2, 4, 8, 16]
    sizes = {row["arm"]: row["parameters"] for row in verdict.tables["cost"]}
    assert sizes["vit"] == pytest.approx(sizes["hardening"], rel=0.02)


def test_the_rival_takes_every_size_of_the_check():
    rival = create_model("vit_tiny_patch16_224", num_classes=2, img_size=28, **{**check.VIT, "depth": 1}).eval()
    with torch.no_grad():
        for side in check.SIDES:
            assert rival(torch.zeros(1, 3, side, side)).shape == (1, 2)
