import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.optim import Lamb

from exact import moved, normal
from once import quick_run
from vitrail.checks import deit3 as check
from vitrail.errors import InputError
from vitrail.models import create_model, load_pretrained
from vitrail.models.deit3 import SIZES, DeiT3, checkpoint_filter_fn
from vitrail.training.optim import create_optimizer, param_groups
from vitrail.training.recipe import Recipe

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 3}


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def slow_attention(attention, tokens):
    """Image by image, head by head and query by query."""
    out = []
    for one in tokens:
        q, k, v = attention.qkv(one).chunk(3, -1)
        deep, heads = one.shape[1] // attention.num_heads, []
        for head in range(attention.num_heads):
            part = slice(head * deep, (head + 1) * deep)
            rows = []
            for query in q:
                scores = torch.stack([query[part] @ key[part] for key in k]) * deep**-0.5
                rows.append((scores.exp() / scores.exp().sum()) @ v[:, part])
            heads.append(torch.stack(rows))
        out.append(attention.proj(torch.cat(heads, 1)))
    return torch.stack(out)


def slow_net(model, images, grid):
    """The paper's net, with positions that somebody else has put on ``grid`` (1, h, w, C)."""
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    side, rows = weight.shape[-1], []
    for down in range(grid.shape[1]):
        for right in range(grid.shape[2]):
            patch = images[:, :, down * side : (down + 1) * side, right * side : (right + 1) * side]
            rows.append((patch[:, None] * weight).sum((2, 3, 4)) + bias + grid[0, down, right])
    x = torch.stack([model.cls_token[0, 0].expand(len(images), -1), *rows], 1)
    for block in model.blocks:
        x = x + block.ls1.gamma * slow_attention(block.attn, norm(x, block.norm1))
        hidden = F.gelu(block.mlp.fc1(norm(x, block.norm2)))
        x = x + block.ls2.gamma * block.mlp.fc2(hidden)
    return model.head(norm(x[:, 0], model.norm))


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (12, 8), (13, 4)])
def test_the_net_is_the_papers_at_any_size(size):
    model = moved(DeiT3(**TINY)).train()
    x = normal(2, 3, *size).requires_grad_()
    rows, columns = (-(-side // 4) for side in size)
    filled = torch.zeros(2, 3, 4 * rows, 4 * columns, dtype=torch.float64)
    filled[:, :, : size[0], : size[1]] = x
    own = model.pos_embed.reshape(1, 2, 2, 8)
    grid = own
    if (rows, columns) != (2, 2):
        grid = F.interpolate(own.permute(0, 3, 1, 2).float(), (rows, columns), mode="bicubic").permute(0, 2, 3, 1)
    found, wanted = model(x), slow_net(model, filled, grid.double())
    torch.testing.assert_close(found, wanted)
    leaves, weight = [x, *model.parameters()], normal(2, 3, seed=1)
    ours, slow = (torch.autograd.grad((y * weight).sum(), leaves) for y in (found, wanted))
    for one, other in zip(ours, slow):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)  # positions are interpolated in float32


def test_it_begins_as_published():
    torch.manual_seed(0)
    model = create_model("deit3_nano", num_classes=10)
    assert all((scale == 1e-4).all() for name, scale in model.named_parameters() if name.endswith("gamma"))
    assert sum(name.endswith("gamma") for name, _ in model.named_parameters()) == 2 * len(model.blocks)
    for value in (model.cls_token, model.pos_embed, model.blocks[1].attn.qkv.weight, model.head.weight):
        assert float(value.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not any(bias.any() for name, bias in model.named_parameters() if name.endswith("fc1.bias"))
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert model.pos_embed.shape == (1, 64, 96)  # the class token has none
    assert (model.norm.eps, model.blocks[0].norm1.eps) == (1e-6, 1e-6)


def test_every_block_is_dropped_as_often():
    model = DeiT3(**TINY, drop_path_rate=0.3)
    for block in model.blocks:
        for drop in (block.drop_path1, block.drop_path2):
            assert isinstance(drop, DropPath) and drop.drop_prob == 0.3
    assert not any(isinstance(module, DropPath) for module in DeiT3(**TINY).modules())
    rates = {
        block.drop_path1.drop_prob for block in create_model("deit3_nano", num_classes=2, drop_path_rate=0.2).blocks
    }
    assert rates == {0.2}


def test_timms_nets_are_the_same_function():
    torch.manual_seed(0)
    ours = create_model("deit3_small", num_classes=5, img_size=32, depth=2).eval()
    theirs = create_model("deit3_small_patch16_224", num_classes=5, img_size=32, depth=2).eval()
    with torch.no_grad():
        for block in ours.blocks:
            block.ls1.gamma += 0.3
            block.ls2.gamma += 0.3
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [size for size in SIZES if size != "nano"])
def test_widths_are_timms(size):
    patch = SIZES[size].get("patch_size", 16)
    name = "deit_tiny_patch16_224" if size == "tiny" else f"deit3_{size}_patch{patch}_224"
    with torch.device("meta"):
        ours, theirs = (create_model(each, num_classes=7, depth=1) for each in (f"deit3_{size}", name))
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.patch_embed.proj.weight.shape == theirs.patch_embed.proj.weight.shape
    assert ours.blocks[0].mlp.fc1.weight.shape == theirs.blocks[0].mlp.fc1.weight.shape


def test_depths_are_the_published():
    depths = {"tiny": 12, "small": 12, "medium": 12, "base": 12, "large": 24, "huge": 32}
    assert {size: values["depth"] for size, values in SIZES.items() if size != "nano"} == depths


def test_features_are_maps_of_patches():
    model = DeiT3(**TINY).eval()
    x = torch.randn(2, 3, 13, 8)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x, norm=True)
        assert [tuple(found.shape) for found in maps] == [(2, 8, 4, 2)] * 2
        torch.testing.assert_close(maps[-1].flatten(2).mT, last[:, 1:])
        features = create_model("deit3_nano", num_classes=0, features_only=True, out_indices=(1, 3))
        assert [tuple(found.shape) for found in features(torch.randn(1, 3, 45, 61))] == [(1, 96, 12, 16)] * 2


def authors(model):
    """Return its state under the names of the authors' code."""
    names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value.clone()
    return state


def test_the_authors_checkpoints_load():
    model = moved(DeiT3(**TINY))
    own, theirs = model.state_dict(), authors(model)
    assert "blocks.1.gamma_2" in theirs
    for given in (theirs, {"model": theirs}, own):
        found = checkpoint_filter_fn(given, model)
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], own[key]) for key in own)


def test_weights_of_a_run_at_low_resolution_go_on_at_full_resolution(tmp_path):
    low, full = DeiT3(**TINY), create_model("deit3_nano", **{**TINY, "img_size": 20, "num_classes": 7})
    torch.save({"model": authors(low)}, tmp_path / "low.pth")
    load_pretrained(full, "deit3_nano", str(tmp_path / "low.pth"))
    grid = low.pos_embed.reshape(1, 2, 2, 8).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (5, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(full.pos_embed.detach(), wanted.detach())
    assert torch.equal(full.blocks[1].mlp.fc1.weight, low.blocks[1].mlp.fc1.weight)
    assert full.head.weight.shape == (7, 8)
    # Loaded so, or interpolated as the images come: one function.
    x = torch.randn(1, 3, 20, 20)
    torch.testing.assert_close(full.forward_features(x), low.forward_features(x))


def test_positions_of_no_square_are_explained():
    state = DeiT3(**TINY).state_dict()
    state["pos_embed"] = torch.zeros(1, 5, 8)
    with pytest.raises(InputError, match=r"5 positions, .* square images"):
        checkpoint_filter_fn(state, DeiT3(**{**TINY, "img_size": 12}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_embed_class": False}, "no_embed_class is fixed here"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate = 1\.0 .*\[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate = -0\.1"),
        ({"img_size": 0}, "img_size = 0, .*1 pixel and block"),
        ({"patch_size": 0}, "patch_size = 0 and .*1 pixel"),
        ({"depth": 0}, "depth = 0 are not allowed"),
        ({"num_heads": 3}, "num_heads = 3 does not divide embed_dim = 8"),
        ({"global_pool": "map"}, "global_pool = 'map' .*avg, avgmax"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        DeiT3(**{**TINY, **options})


def test_a_pooling_without_classifier_is_refused_later_too():
    model = DeiT3(**TINY)
    with pytest.raises(InputError, match=r"global_pool = '' .*num_classes = 0"):
        model.reset_classifier(2, "")
    model.reset_classifier(0, "")
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 8)


# ---- the recipes


def test_the_recipe_is_the_published_command():
    recipe = Recipe.load("deit3")
    augment, train = recipe.augment, recipe.train
    assert (recipe.model.name, recipe.model.img_size, recipe.model.drop_path_rate) == ("deit3_base", 192, 0.2)
    assert recipe.method.options == {"binary": True, "smoothing": 0.0}
    assert (augment.policy, augment.scale, augment.flip, augment.rand_augment) == ("crop", (0.08, 1.0), 0.5, 0)
    assert (augment.three_augment, augment.color_jitter, augment.erase) == (True, 0.3, 0.0)
    assert (augment.mixup, augment.cutmix) == (0.8, 1.0)
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == ("lamb", 3e-3, 0.05)
    assert (train.batch_size, train.epochs) == (2048, 800)
    assert (train.epochs * train.warmup, recipe.optim.lr * train.min_lr) == pytest.approx((5, 1e-5), rel=0.01)


def test_more_images_need_less_against_overfitting():
    recipe = Recipe.load("deit3_large_data")
    augment, train = recipe.augment, recipe.train
    assert (augment.policy, augment.three_augment, augment.mixup, augment.cutmix) == ("simple", True, 0.0, 1.0)
    assert recipe.method.options == {"smoothing": 0.1}
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == ("lamb", 1e-3, 0.02)
    assert (train.epochs * train.warmup, recipe.optim.lr * train.min_lr) == pytest.approx((5, 1e-5), rel=0.01)
    assert (train.batch_size, train.epochs, recipe.model.drop_path_rate) == (2048, 240, 0.1)


def test_finetuning_begins_with_the_weights_of_low_resolution():
    recipe = Recipe.load("deit3_finetune")
    assert (recipe.model.name, recipe.model.img_size) == ("deit3_base", 224)
    assert recipe.model.pretrained == "runs/low/model.safetensors"
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == ("adamw", 1e-5, 0.1)
    assert (recipe.train.epochs * recipe.train.warmup, recipe.train.min_lr) == (5, 1.0)
    assert (recipe.train.batch_size, recipe.augment.rand_augment, recipe.augment.three_augment) == (512, 9, False)


def slow_lamb(weight, gradients, lr, decay):
    """You et al., "Large Batch Optimization for Deep Learning" (2020), algorithm 2, of one matrix."""
    first = second = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-6) + decay * weight
        trust = weight.norm() / update.norm() if decay else 1.0  # vectors are not decayed, and step as in Adam
        weight = weight - lr * trust * update
    return weight


def test_the_recipes_optimiser_is_lamb():
    torch.manual_seed(0)
    recipe = Recipe.load("deit3")
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    method = torch.nn.Module()
    method.model, method.param_groups = model, lambda: None
    optimizer = create_optimizer(param_groups(method, recipe.optim), recipe.optim)
    assert isinstance(optimizer, Lamb)
    begun = copy.deepcopy(model)
    gradients = [(0.1 * normal(2, 3, seed=seed), 0.1 * normal(2, seed=9 + seed)) for seed in range(3)]
    for one in gradients:
        model.weight.grad, model.bias.grad = (value.clone() for value in one)
        optimizer.step()
    weights, biases = zip(*gradients)
    torch.testing.assert_close(model.weight, slow_lamb(begun.weight, weights, 3e-3, 0.05), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.bias, slow_lamb(begun.bias, biases, 3e-3, 0.0), rtol=1e-6, atol=1e-8)


def test_arms_of_the_check_are_those_of_the_shipped_recipe():
    settings = check.published_settings()
    assert settings["method.options"] == {"binary": True, "smoothing": 0.0}
    assert settings["augment.three_augment"] and settings["augment.cutmix"] == 1.0


def test_the_quick_check_runs():
    verdict, _ = quick_run(check)
    assert [finding.outcome for finding in verdict.findings][-1] == "confirmed"
    (row,) = verdict.tables["compute of the resolutions"]
    together = row["passes_at_low"] * row["madds_of_low"] + row["passes_at_full"]
    assert together == pytest.approx(32, rel=0.05)
