import math

import pytest
import timm
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.evaluate.attention_rank import rank_plot, ranks, run
from vitrail.models import create_model


def batches(count=2, side=16, batch=3):
    def start():
        for number in range(count):
            yield torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(number)), None

    return start


def test_ranks_of_matrices_whose_singular_values_are_known():
    left = torch.linalg.qr(torch.randn(4, 7, 7))[0][..., :5]
    right = torch.linalg.qr(torch.randn(4, 5, 5))[0]
    values = torch.tensor([[1, 1, 1, 1, 1], [4, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0.5, 0.25, 1e-3, 0.0]])
    rank, effective = ranks(left @ torch.diag_embed(values) @ right)
    assert rank.tolist() == [5, 1, 2, 4]
    shares = [1 / 1.751, 0.5 / 1.751, 0.25 / 1.751, 0.001 / 1.751]
    entropy = -sum(share * math.log(share) for share in shares)
    torch.testing.assert_close(effective, torch.tensor([5, 1, 2, math.exp(entropy)]), rtol=1e-3, atol=1e-3)
    assert ranks(1e-8 * left @ torch.diag_embed(values) @ right)[0].tolist() == [5, 1, 2, 4]
    assert ranks(left @ torch.diag_embed(values) @ right, 0.3)[0].tolist() == [5, 1, 2, 2]
    zero = ranks(torch.zeros(2, 3, 4))
    assert zero[0].tolist() == zero[1].tolist() == [0, 0]


def test_the_rule_of_numpy_counts_by_the_longer_side():
    values = torch.tensor([1.0, 3e-6])
    for places, expected in ((4, 2), (400, 1)):
        wide = torch.zeros(places, 2)
        wide[0, 0], wide[1, 1] = values
        assert ranks(wide)[0] == expected == torch.linalg.matrix_rank(wide)


class Spread(nn.Module):
    """Attention of two heads that gives the rank it is told."""

    def __init__(self, rank):
        super().__init__()
        self.num_heads, self.rank = 2, rank
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        heads = torch.zeros(len(x), 9, 2, 4)
        for i in range(self.rank):
            heads[:, i, :, i] = 1.0
        return self.proj(heads.flatten(2))


def test_any_layer_with_heads_and_a_projection_is_probed():
    model = nn.Sequential(nn.Flatten(2), Spread(1), Spread(3)).train()
    model[2].register_forward_pre_hook(lambda layer, _: setattr(layer, "rank", 4 if layer.training else 3))
    table = run(model, batches(side=3)).table
    assert [(row["layer"], row["kind"]) for row in table] == [("1", "Spread"), ("2", "Spread")]
    assert [(row["heads"], row["places"], row["channels"], row["full"]) for row in table] == [(2, 9, 4, 4)] * 2
    assert [row["rank"] for row in table] == [1, 3]
    assert [row["effective"] for row in table] == pytest.approx([1, 3])
    assert [row["kv_rank"] for row in table] == [None, None]
    assert model.training
    assert not model[1].proj._forward_pre_hooks


class Asked(nn.Module):
    """Attention that says itself what it gives: of rank 2 with a buffer of rank 1, for images of ones."""

    form = "asked"

    def forward(self, x, *, weight):
        return x * weight

    def attention_features(self, x, *, weight):
        features = torch.zeros(len(x), 1, 6, 3)
        features[:, :, 0, 0] = features[:, :, 1, 1] = weight
        return torch.ones(len(x), 1, 3, 3), features


class Host(nn.Module):
    def __init__(self, value=1.0):
        super().__init__()
        self.layer, self.bias = Asked(), nn.Parameter(torch.zeros(1))
        self.value = value

    def forward(self, x):
        return self.layer(x, weight=self.value)


def test_a_layer_that_knows_its_features_is_asked():
    row = run(Host(), batches(1)).table[0]
    assert row["kind"] == "asked"
    assert (row["heads"], row["places"], row["channels"], row["full"]) == (1, 6, 3, 3)
    assert (row["rank"], row["kv_rank"]) == (2, 1)
    assert (row["effective"], row["kv_effective"]) == pytest.approx((2, 1), rel=1e-5)


def test_the_layers_of_ravlt_report_buffer_and_features():
    torch.manual_seed(0)
    model = create_model("ravlt_nano", num_classes=3).eval()
    result = run(model, batches(1))
    kinds = {row["layer"]: row["kind"] for row in result.table}
    assert list(kinds.values()) == ["rala", "rala", "softmax", "softmax", "softmax"]
    for row in result.table:
        assert 1 <= row["effective"] <= row["rank"] <= row["full"]
        assert (row["kv_rank"] is None) == (row["kind"] == "softmax")
    first = result.table[0]
    assert (first["places"], first["channels"], first["heads"]) == (64, 32, 1)
    with torch.no_grad():
        layer, kept = model.stages[0].blocks[0].attn, []
        layer.register_forward_pre_hook(lambda module, args: kept.append(module.attention_features(*args)))
        model(next(batches(1)())[0])
    for wanted, name in zip(kept[0], ("kv_rank", "rank")):
        assert first[name] == pytest.approx(torch.linalg.matrix_rank(wanted).float().mean().item())
    assert "KV buffer" in next(iter(result.figures.values()))


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_transformers_of_timm_are_probed(name):
    options = {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16}
    model = timm.create_model(name, num_classes=3, **(options if name.startswith("swin") else {"img_size": 32}))
    result = run(model, batches(1, side=32))
    assert all(row["rank"] <= row["full"] for row in result.table)
    assert result.table[0]["kind"] in ("Attention", "WindowAttention")
    assert "KV buffer" not in next(iter(result.figures.values()))


def test_bad_input_is_explained():
    model = Host()
    with pytest.raises(InputError, match=r"tolerance = 1.5 is not allowed"):
        run(model, batches(1), tolerance=1.5)
    with pytest.raises(InputError, match=r"Flatten has no attention layer.*such as ravlt_t"):
        run(nn.Flatten(), batches(1))
    with pytest.raises(InputError, match="no images"):
        run(model, batches(0))
    with pytest.raises(InputError, match="the attention of layer gives is not finite"):
        run(Host(math.nan), batches(1))
    assert not model.layer._forward_pre_hooks


def test_a_chart_of_nothing_is_empty():
    assert rank_plot([], []) == ""
