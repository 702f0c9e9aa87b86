import pytest
import torch
from timm.models.xcit import XCA, Xcit

from exact import moved, normal
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.xcit import XCiT, checkpoint_filter_fn

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 3, "tokens_norm": True}


def slow(attention, x):
    """Attend channel by channel: x (N, C)."""
    tokens, width = x.shape
    size = width // attention.num_heads
    rows = x @ attention.qkv.weight.T + attention.qkv.bias
    columns = []
    for head in range(attention.num_heads):
        query, key, value = (rows[:, part * width + head * size :][:, :size] for part in range(3))
        for i in range(size):
            scores = []
            for j in range(size):
                product = sum(query[n, i] * key[n, j] for n in range(tokens))
                scores.append(product / query[:, i].norm() / key[:, j].norm() * attention.temperature[head, 0, 0])
            weights = torch.stack(scores).softmax(0)
            columns.append(sum(weight * value[:, j] for j, weight in enumerate(weights)))
    return torch.stack(columns, 1) @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_is_between_channels(tokens):
    attention = moved(XCA(6, num_heads=2, qkv_bias=True))
    x = normal(2, tokens, 6).requires_grad_()
    ours, theirs = attention(x), torch.stack([slow(attention, one) for one in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight, given = normal(*ours.shape, seed=1), [x, *attention.parameters()]
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((theirs * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("patch", [8, 16])
def test_with_published_patches_it_is_timms_net(patch):
    ours = moved(XCiT(img_size=28, patch_size=patch, **SMALL)).eval()
    theirs = Xcit(img_size=32, patch_size=patch, **SMALL).double().eval()
    theirs.load_state_dict(ours.state_dict())
    for size in ((32, 32), (28, 45)):
        x = normal(2, 3, *size)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(28, 28), (45, 61), (2, 5), (225, 190)])
def test_the_nano_takes_images_of_any_size(size):
    model = create_model("xcit_nano", num_classes=3, img_size=28).eval()
    height, width = (-(-side // 4) for side in size)
    with torch.no_grad():
        last, maps = model.forward_intermediates(torch.zeros(1, 3, *size))
    assert last.shape == (1, 1 + height * width, 64)
    assert [tuple(one.shape) for one in maps] == [(1, 64, height, width)] * 3
    assert [info["reduction"] for info in model.feature_info] == [4, 4, 4]
    assert model.patch_embed.patch_size == 4


def test_the_nano_is_built_as_the_published_tiny():
    torch.manual_seed(0)
    model, tiny = create_model("xcit_nano", num_classes=3), create_model("xcit_tiny_12_p8_224", num_classes=3, depth=1)
    assert [block.tokens_norm for block in (*model.cls_attn_blocks, *tiny.cls_attn_blocks)] == [True] * 3
    assert (model.blocks[2].gamma1 == 1).all()
    assert model.blocks[0].norm1.eps == tiny.blocks[0].norm1.eps == 1e-6
    assert (model.blocks[0].attn.num_heads, tiny.blocks[0].attn.num_heads) == (4, 4)
    assert model.blocks[0].mlp.fc1.out_features == 192
    assert float(model.blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert [
        isinstance(module, torch.nn.BatchNorm2d)
        for module in (model.patch_embed.proj[0][1], model.blocks[0].local_mp.bn)
    ]


def test_patches_of_four_pixels_see_their_neighbours():
    torch.manual_seed(0)
    embed = create_model("xcit_nano", num_classes=3, act_layer=torch.nn.SiLU).patch_embed.eval()
    x = torch.randn(2, 3, 32, 32)
    below = x.clone()
    below[:, :, 4:] += 1
    with torch.no_grad():
        (tokens, grid), (others, _) = embed(x), embed(below)
    assert grid == (8, 8)
    torch.testing.assert_close(others[:, :8], tokens[:, :8])
    assert not torch.equal(others[:, 8], tokens[:, 8])
    assert isinstance(embed.proj[1], torch.nn.SiLU)
    assert [embed.proj[place][0].out_channels for place in (0, 2)] == [32, 64]


def authors_names(state):
    """Return the weights under the names, and with the joined queries, of the authors' code."""
    found = {}
    for key, value in state.items():
        if ".attn.k." in key or ".attn.v." in key:
            continue
        if "cls_attn_blocks" in key and ".attn.q." in key:
            parts = [state[key.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            key, value = key.replace(".attn.q.", ".attn.qkv."), torch.cat(parts)
        found[key.replace("pos_embed.", "pos_embeder.")] = value
    return found


@pytest.mark.parametrize("training", [False, True])
def test_the_authors_checkpoints_are_mapped(training):
    model = XCiT(**SMALL)
    state = moved(model).state_dict()
    given = {"model": authors_names(state)}
    if training:
        teacher = {f"module.backbone.{key}": value for key, value in given["model"].items()}
        given = {"student": {}, "teacher": {**teacher, "module.head.mlp.0.weight": torch.zeros(1)}}
    names = list(given.get("model", given.get("teacher")))
    found = checkpoint_filter_fn(given, model)
    assert set(found) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(found[key], value)
    assert names == list(given.get("model", given.get("teacher")))
    assert set(checkpoint_filter_fn(state, model)) == set(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 7}, "patch_size = 7 is not allowed: give 4, 8 or 16"),
        ({"embed_dim": 6, "num_heads": 2}, "embed_dim = 6 is not allowed: give 8 or more"),
        ({"depth": 0}, "depth = 0 is not allowed: give 1 or more"),
        ({"cls_attn_layers": 0}, "cls_attn_layers = 0 is not allowed: give 1 or more"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio = 0\.0 .*hidden width"),
        ({"img_size": 0}, "img_size = 0 is not allowed: give 1 or more"),
        ({"num_heads": 3}, "num_heads = 3 does not divide embed_dim = 16"),
        ({"global_pool": ""}, "global_pool = '' is not allowed"),
        ({"global_pool": "max"}, "global_pool = 'max' is not allowed"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        XCiT(**{**SMALL, **options})


def test_a_classifier_needs_pooling_and_maps_a_format():
    model = XCiT(**{**SMALL, "num_classes": 0, "global_pool": ""}).eval()
    with pytest.raises(InputError, match="global_pool = ''"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    x = torch.zeros(1, 3, 16, 16)
    assert model(x).shape == (1, 3)
    with pytest.raises(InputError, match="output_fmt = 'NHWC' is not allowed: give one of NCHW, NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    maps = model.forward_intermediates(x, 1, output_fmt="NLC", intermediates_only=True)
    assert [tuple(one.shape) for one in maps] == [(1, 1, 16)]
