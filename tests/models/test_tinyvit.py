import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.tiny_vit import TinyVit

from exact import moved, normal, same
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.tinyvit import Attention, TinyViT, checkpoint_filter_fn

SMALL = {
    "embed_dims": (4, 8, 8),
    "depths": (1, 1, 2),
    "num_heads": (1, 2, 4),
    "window_sizes": (2, 2, 3),
    "mlp_ratio": 2.0,
    "mbconv_expand_ratio": 2.0,
    "num_classes": 3,
}


def slow(attention, x):
    """Attend place by place in a window: x (N, C), in rows."""
    tall, wide = attention.resolution
    heads, size = attention.num_heads, attention.key_dim
    normed = F.layer_norm(x, x.shape[-1:], attention.norm.weight, attention.norm.bias)
    rows = normed @ attention.qkv.weight.T + attention.qkv.bias
    # Biases are counted by the distances of two places, in the order in which they come up.
    numbers = {}
    for i in range(tall * wide):
        for j in range(tall * wide):
            numbers.setdefault((abs(i // wide - j // wide), abs(i % wide - j % wide)), len(numbers))
    out = []
    for i in range(tall * wide):
        parts = []
        for head in range(heads):
            query, key, value = (slice(3 * head * size + k * size, 3 * head * size + (k + 1) * size) for k in range(3))
            scores = torch.stack(
                [
                    rows[i, query] @ rows[j, key] / size**0.5
                    + attention.attention_biases[head, numbers[abs(i // wide - j // wide), abs(i % wide - j % wide)]]
                    for j in range(tall * wide)
                ]
            )
            parts.append(scores.softmax(0) @ rows[:, value])
        out.append(attention.proj.weight @ torch.cat(parts) + attention.proj.bias)
    return torch.stack(out)


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 3), (2, 3)])
def test_attention_is_the_slow_loop(window):
    attention = moved(Attention(8, 4, 2, 1, window))
    x = normal(2, window[0] * window[1], 8).requires_grad_()
    same(attention(x), torch.stack([slow(attention, one) for one in x]), [x, *attention.parameters()])


def test_with_the_published_stem_it_is_timms_net():
    ours = moved(TinyViT(**SMALL)).eval()
    theirs = TinyVit(**SMALL).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = normal(2, 3, 40, 28)
    torch.testing.assert_close(ours(x), theirs(x))
    assert [info["reduction"] for info in ours.feature_info] == [4, 8, 16]


@pytest.mark.parametrize("size", [(28, 28), (45, 61), (2, 5), (225, 190)])
def test_the_nano_takes_images_of_any_size(size):
    model = create_model("tinyvit_nano", num_classes=3).eval()
    height, width = (-(-side // 8) for side in size)
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, *size)).shape == (1, 96, height, width)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8]
    assert not any(isinstance(module, DropPath) for module in model.modules())


def test_weights_that_are_loaded_count_and_a_graph_is_never_kept():
    model, other = (moved(TinyViT(**SMALL)).eval() for _ in range(2))
    with torch.no_grad():
        other.stages[1].blocks[0].attn.attention_biases += 1.0 * normal(2, 4, seed=5)
    x = normal(1, 3, 32, 32)
    before, wanted = model(x), other(x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), wanted)
    assert not torch.equal(before, wanted)
    for _ in range(2):
        model(x).sum().backward()
    copy.deepcopy(model)


def test_it_begins_as_the_authors_code():
    torch.manual_seed(0)
    model = TinyViT(**{**SMALL, "embed_dims": (32, 64, 64)}, drop_path_rate=0.3)
    block = model.stages[2].blocks[0]
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not layer.bias.any()
    assert not block.attn.attention_biases.any()
    assert not model.stages[0].blocks[0].conv3.bn.weight.any()
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.stages[1:] for block in stage.blocks]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert model.no_weight_decay() == {name for name in model.state_dict() if "attention_biases" in name}


def authors_names(state):
    """Return the weights under the names of the authors' code."""
    found = {}
    for key, value in state.items():
        name = key.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace(
            "patch_embed.conv2.", "patch_embed.seq.2."
        )
        for number in (1, 2):
            name = name.replace(f"stages.{number}.downsample.", f"layers.{number - 1}.downsample.")
        name = name.replace("stages.", "layers.").replace(".conv.weight", ".c.weight")
        found[name.replace("head.norm.", "norm_head.").replace("head.fc.", "head.")] = value
    return {**found, "layers.1.blocks.0.attn.attention_bias_idxs": torch.zeros(4, 4)}


def test_the_authors_checkpoints_are_mapped():
    model = TinyViT(**SMALL)
    state = moved(model).state_dict()
    found = checkpoint_filter_fn({"model": authors_names(state)}, model)
    assert set(found) == set(state)
    for key, value in state.items():
        torch.testing.assert_close(found[key], value)
    wider = TinyViT(**{**SMALL, "window_sizes": (2, 4, 3)})
    wider.load_state_dict(checkpoint_filter_fn(state, wider))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_stride": 3}, "stem_stride = 3 is not allowed: give 2 or 4"),
        ({"depths": (1,)}, r"depths = \(1,\), .*one of each for every stage"),
        ({"depths": (1, 0, 1)}, r"depths = \(1, 0, 1\) .*one block"),
        ({"window_sizes": (2, 0, 2)}, r"window_sizes = \(2, 0, 2\) .*one place or more"),
        ({"num_heads": (1, 2, 3)}, "num_heads = 3 does not divide a width of 8"),
        ({"mlp_ratio": 0}, "mlp_ratio = 0 leaves no hidden channels"),
        ({"mbconv_expand_ratio": 0.1}, "mbconv_expand_ratio = 0.1 leaves no hidden channels"),
        ({"global_pool": ""}, "global_pool = '' is not allowed"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        TinyViT(**{**SMALL, **options})


def test_a_classifier_needs_pooling():
    model = TinyViT(**{**SMALL, "num_classes": 0}, global_pool="").eval()
    with pytest.raises(InputError, match="global_pool = ''"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
