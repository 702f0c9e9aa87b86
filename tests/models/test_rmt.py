import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from exact import normal
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.rmt import (
    RMT,
    ManhattanSelfAttention,
    SpatialPrior,
    axis_decay,
    checkpoint_filter_fn,
    decomposed_attention,
    head_decays,
    manhattan_attention,
    manhattan_decay,
    rotate,
    rotation,
)

SIZES = [(1, 1), (1, 5), (4, 1), (2, 3), (3, 4)]
TINY = {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 4), "mlp_ratios": (2, 2), "head_width": 24}
TINY |= {"decomposed": (True, False), "first_decays": (2, 2), "decay_spans": (4, 4), "layer_scale": (0, 0.5)}


def tiny(**options):
    torch.manual_seed(0)
    return RMT(num_classes=3, **{**TINY, "stem_stride": 2, **options})


# ---- slow loops, from the paper and the published code


def slow_log_gamma(heads, first, span):
    return [math.log(1 - 2 ** (-first - span * i / heads)) for i in range(heads)]


def slow_softmax(scores):
    top = [torch.exp(score) for score in scores]
    return [value / sum(top) for value in top]


def slow_plane(q, k, v, gammas):
    batch, height, width, heads, dim = q.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    out = torch.zeros_like(v)
    for b in range(batch):
        for n in range(heads):
            for y, x in places:
                weights = slow_softmax(
                    [
                        q[b, y, x, n] @ k[b, r, c, n] / dim**0.5 + (abs(y - r) + abs(x - c)) * gammas[n]
                        for r, c in places
                    ]
                )
                total = sum(weight * v[b, r, c, n] for weight, (r, c) in zip(weights, places))
                out = out.index_put(tuple(torch.tensor(i) for i in (b, y, x, n)), total)
    return out


def slow_axes(q, k, v, gammas):
    """Rows first, then columns of what the rows gave."""
    rows = torch.stack([slow_plane(*(t[:, y : y + 1] for t in (q, k, v)), gammas) for y in range(q.shape[1])], 1)
    rows = rows.squeeze(2)
    columns = [
        slow_plane(q[:, :, x : x + 1], k[:, :, x : x + 1], rows[:, :, x : x + 1], gammas) for x in range(q.shape[2])
    ]
    return torch.cat(columns, 2)


def slow_rotation(x):
    """Turn the pair (2i, 2i + 1) of the place p in reading order by p / 10000^(i / (pairs - 1))."""
    out = x.clone()
    pairs = x.shape[-1] // 2
    for y in range(x.shape[1]):
        for c in range(x.shape[2]):
            for i in range(pairs):
                angle = (y * x.shape[2] + c) / 10000 ** (i / (pairs - 1))
                one, two = x[:, y, c, :, 2 * i], x[:, y, c, :, 2 * i + 1]
                out[:, y, c, :, 2 * i] = one * math.cos(angle) - two * math.sin(angle)
                out[:, y, c, :, 2 * i + 1] = two * math.cos(angle) + one * math.sin(angle)
    return out


def decays(form, height, width, heads=2):
    log_gamma = head_decays(heads, 2, 4).double()
    if form is manhattan_attention:
        return (manhattan_decay(height, width, log_gamma),)
    return axis_decay(height, log_gamma), axis_decay(width, log_gamma)


def test_heads_decay_as_published():
    for heads, first, span in ((1, 2, 4), (4, 2, 4), (10, 2, 6), (5, 1, 3)):
        expected = torch.tensor(slow_log_gamma(heads, first, span))
        torch.testing.assert_close(head_decays(heads, first, span), expected)
    assert head_decays(4, 2, 4)[0].exp() == pytest.approx(0.75)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_plane_decays_with_the_manhattan_distance(height, width):
    log_gamma = head_decays(3, 2, 4)
    plane = manhattan_decay(height, width, log_gamma)
    for i in range(height * width):
        for j in range(height * width):
            distance = abs(i // width - j // width) + abs(i % width - j % width)
            torch.testing.assert_close(plane[:, i, j], distance * log_gamma)


@pytest.mark.parametrize(("form", "slow"), [(manhattan_attention, slow_plane), (decomposed_attention, slow_axes)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_attention_is_the_slow_loop(form, slow, height, width):
    given = [normal(2, height, width, 2, 4, seed=i).requires_grad_() for i in range(3)]
    gammas = head_decays(2, 2, 4).double().tolist()
    ours, theirs = form(*given, *decays(form, height, width)), slow(*given, gammas)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    weight = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), given), torch.autograd.grad((theirs * weight).sum(), given)
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [manhattan_attention, decomposed_attention])
def test_attention_has_its_own_gradient(form):
    given = [normal(1, 2, 3, 2, 2, seed=i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda *qkv: form(*qkv, *decays(form, 2, 3)), given)


def test_the_forms_agree_where_scores_are_a_sum_over_axes():
    height, width = 4, 5

    def by_axis(seed):
        rows = normal(2, height, 1, 2, 2, seed=seed).expand(-1, -1, width, -1, -1)
        return torch.cat((rows, normal(2, 1, width, 2, 2, seed=seed + 1).expand(-1, height, -1, -1, -1)), -1)

    def difference(query, key, value):
        plane = manhattan_attention(query, key, value, *decays(manhattan_attention, *value.shape[1:3]))
        axes = decomposed_attention(query, key, value, *decays(decomposed_attention, *value.shape[1:3]))
        return float((plane - axes).abs().max())

    value = normal(2, height, width, 2, 4, seed=7)
    assert difference(by_axis(1), by_axis(3), value) < 1e-10
    assert difference(torch.zeros_like(value), normal(*value.shape), value) < 1e-10
    line = [normal(2, 1, 6, 2, 4, seed=i) for i in range(3)]
    assert difference(*line) < 1e-10
    assert difference(*(tensor.transpose(1, 2) for tensor in line)) < 1e-10
    assert difference(normal(*value.shape, seed=1), normal(*value.shape, seed=2), value) > 0.1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_queries_and_keys_turn_with_their_place(height, width):
    x = normal(2, height, width, 3, 6)
    cos, sin = rotation(height, width, 6)
    torch.testing.assert_close(rotate(x, cos, sin), slow_rotation(x), rtol=1e-5, atol=1e-5)
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("decomposed", [True, False])
def test_a_layer_of_attention_is_its_formula(decomposed):
    torch.manual_seed(0)
    layer = ManhattanSelfAttention(12, 3, decomposed=decomposed).double()
    prior = SpatialPrior(3, 4, first=2, span=4, decay=True, decomposed=decomposed)
    x = normal(1, 2, 3, 12)
    ours = layer(x, prior(2, 3, x.device))
    value = layer.v_proj(x)
    q, k, v = (t.reshape(1, 2, 3, 3, 4) for t in (layer.q_proj(x), layer.k_proj(x), value))
    mixed = (slow_axes if decomposed else slow_plane)(slow_rotation(q), slow_rotation(k), v, slow_log_gamma(3, 2, 4))
    local = torch.zeros_like(value)  # the 5x5 depth-wise convolution of the values
    for y in range(2):
        for c in range(3):
            for i in range(2):
                for j in range(3):
                    local[:, y, c] += value[:, i, j] * layer.lepe.weight[:, 0, i - y + 2, j - c + 2]
    expected = layer.out_proj(mixed.flatten(-2) + local + layer.lepe.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_block_adds_position_attention_and_feed_forward():
    block = tiny().stages[1].blocks[0].double()
    prior = tiny().stages[1].prior
    x, tables = normal(1, 3, 2, 32), prior(3, 2, torch.device("cpu"))

    def depthwise(conv, x):
        return torch.conv2d(x.movedim(-1, 1), conv.weight, conv.bias, padding=conv.padding, groups=conv.groups).movedim(
            1, -1
        )

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    torch.nn.init.normal_(block.ls1.gamma)
    torch.nn.init.normal_(block.ls2.gamma)
    y = x + depthwise(block.pos, x)
    y = y + block.ls1.gamma * block.attn(norm(block.norm1, y), tables)
    hidden = torch.nn.functional.gelu(block.mlp.fc1(norm(block.norm2, y)))
    y = y + block.ls2.gamma * block.mlp.fc2(hidden + depthwise(block.mlp.dwconv, hidden))
    torch.testing.assert_close(block(x, tables), y, rtol=1e-9, atol=1e-9)


# ---- the net


def test_the_head_projects_normalises_and_then_pools():
    model = tiny(token_head=True).eval()
    for buffer in (model.norm.running_mean, model.norm.running_var):
        buffer.uniform_(0.5, 1.5)
    x = model.forward_features(torch.randn(2, 3, 20, 12))
    tokens = torch.einsum("bchw,oc->bhwo", x, model.proj.weight) + model.proj.bias
    tokens = (tokens - model.norm.running_mean) / (model.norm.running_var + 1e-5).sqrt()
    pooled = (tokens * tokens.sigmoid()).mean((1, 2))
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), pooled)
    places = torch.stack([model.token_head(x[:, :, y, c]) for y in range(x.shape[2]) for c in range(x.shape[3])], 1)
    torch.testing.assert_close(model.token_logits(x), places)
    torch.testing.assert_close(model.forward_head(x), model.head(pooled) + 0.5 * places.max(1).values)


def test_stem_halves_where_it_says_and_drop_path_rises():
    for stride in (1, 2, 4):
        assert tiny(stem_stride=stride).stem(torch.zeros(1, 3, 16, 12)).shape == (1, 16, 16 // stride, 12 // stride)
    model = create_model("rmt_nano", num_classes=2, drop_path_rate=0.4, depths=(1, 2, 1, 1))
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_weights_begin_as_published():
    model = create_model("rmt_nano", num_classes=100, layer_scale=(0, 0, 1e-6, 1e-6))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any()
    assert not hasattr(model.stages[1].blocks[0].ls1, "gamma")
    assert torch.equal(model.stages[2].blocks[1].ls2.gamma.detach(), torch.full((96,), 1e-6))


def test_variants_attend_as_published():
    for name, forms in (("rmt_t", [True, True, False, False]), ("rmt_s", [True, True, True, False])):
        with torch.device("meta"):
            model = create_model(name, num_classes=1000)
        assert [stage.prior.decomposed for stage in model.stages] == forms
        assert [(stage.prior.first, stage.prior.span) for stage in model.stages] == [(2, 4), (2, 4), (2, 6), (2, 6)]
    with torch.device("meta"):
        spans = [[stage.prior.span for stage in create_model(n, num_classes=9).stages] for n in ("rmt_b", "rmt_l")]
    assert spans == [[5, 5, 6, 6], [6, 6, 6, 6]]


def test_without_decay_near_and_far_count_alike():
    value = normal(1, 2, 3, 2, 4)
    for decomposed in (True, False):
        form = decomposed_attention if decomposed else manhattan_attention
        prior = SpatialPrior(2, 4, first=2, span=4, decay=False, decomposed=decomposed)
        tables = prior(2, 3, value.device)
        mixed = form(torch.zeros_like(value), value, value, *tables.decays)
        torch.testing.assert_close(mixed, value.mean((1, 2), keepdim=True).expand_as(value))


def test_tables_are_computed_once_per_stage_and_size(monkeypatch):
    made = []
    compute = SpatialPrior._compute
    monkeypatch.setattr(SpatialPrior, "_compute", lambda self, *key: made.append(key[:2]) or compute(self, *key))
    model = create_model("rmt_nano", num_classes=2, depths=(2, 2, 2, 2)).eval()
    with torch.inference_mode():
        for _ in range(2):
            model(torch.zeros(1, 3, 32, 48))
    assert made == [(16, 24), (8, 12), (4, 6), (2, 3)]
    # What inference kept serves training; another size does not get the tables of the last.
    model.train()(torch.randn(2, 3, 32, 48)).sum().backward()
    assert len(made) == 4
    small = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(small), copy.deepcopy(model)(small))
    model(torch.randn(2, 3, 48, 32))
    assert made[8:] == [(24, 16), (12, 8), (6, 4), (3, 2)]


def test_low_precision_does_not_reach_the_tables():
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        found = model.bfloat16()(x.bfloat16()).float()
    assert all(table.dtype == torch.float32 for table in model.stages[0].prior(32, 32, x.device)[:2])
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_decomposed_attention_is_cheaper_by_the_share_of_an_axis():
    x = torch.zeros(1, 8, 12, 2, 4, device="meta")
    cost = []
    for form in (manhattan_attention, decomposed_attention):
        with FlopCounterMode(display=False) as counter:
            form(x, x, x, *(table.to("meta", x.dtype) for table in decays(form, 8, 12)))
        cost.append(counter.get_total_flops())
    assert cost[1] / cost[0] == (8 + 12) / (8 * 12)


@pytest.mark.parametrize("name", ["rmt_s", "rmt_b_label"])
def test_the_authors_keys_become_ours(name):
    options = {"depths": (1, 2, 1, 1), "num_classes": 7}
    torch.manual_seed(0)
    ours = create_model(name, **options)
    twin = create_model(name, **options)
    theirs = {f"layers.{i}.Relpos.{key}": torch.zeros(3) for i in range(4) for key in ("angle", "decay")}
    for key, value in ours.state_dict().items():
        theirs[_authors_name(key)] = value.reshape(1, 1, 1, -1) if key.endswith("gamma") else value
    assert "layers.0.downsample.reduction.weight" in theirs and "patch_embed.proj.0.weight" in theirs
    twin.load_state_dict(checkpoint_filter_fn({"model": theirs}, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def _authors_name(key):
    head, _, rest = key.partition(".")
    if head == "stem":
        return f"patch_embed.proj.{rest}"
    if head == "token_head":
        return f"aux_head.{rest}"
    if head != "stages":
        return key
    stage, part, *rest = rest.split(".")
    if part == "downsample":
        return f"layers.{int(stage) - 1}.downsample.{'reduction' if rest[0] == '0' else 'norm'}.{rest[1]}"
    number, layer, *rest = rest
    named = {"norm1": "retention_layer_norm", "norm2": "final_layer_norm", "attn": "retention", "mlp": "ffn"}
    inside = [f"{word}.conv" if word in ("lepe", "dwconv") else word for word in rest]
    end = {"ls1": ["gamma_1"], "ls2": ["gamma_2"], "pos": ["pos.conv", *inside]}.get(layer)
    return ".".join([f"layers.{stage}.blocks.{number}", *(end or [named[layer], *inside])])


def test_any_size_dense_features_and_pooling():
    features = create_model("rmt_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 19, 25), (96, 5, 7), (128, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    two = RMT(num_classes=0, global_pool="", **TINY)
    assert two(torch.zeros(1, 3, 17, 33)).shape == (1, 32, 3, 5)
    two.reset_classifier(4, "max")
    assert two(torch.zeros(1, 3, 17, 33)).shape == (1, 4)


def test_tables_of_a_trace_are_not_kept(monkeypatch):
    prior = tiny().stages[0].prior
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    prior(2, 3, torch.device("cpu"))
    assert prior._kept is None


def test_tracing_neither_takes_nor_keeps_tables():
    model, x = tiny().eval(), torch.randn(2, 3, 20, 28)
    torch.export.export(model, (x,))
    assert all(stage.prior._kept is None for stage in model.stages)
    model(torch.zeros(1, 3, 12, 20))
    program = torch.export.export(model, (x,))
    assert [stage.prior._kept[0][:2] for stage in model.stages] == [(6, 10), (3, 5)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, r"depths = \(1,\).*one for each stage"),
        ({"num_heads": (3, 4)}, "embed_dims = 16 with num_heads = 3.*multiple of twice"),
        ({"num_heads": (16, 4)}, "embed_dims = 16 with num_heads = 16"),
        ({"first_decays": (0, 2)}, "first_decays = 0 .*above 0"),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_a_net_without_token_head_says_so():
    with pytest.raises(InputError, match="token_head=True"):
        tiny().token_logits(torch.zeros(1, 32, 2, 2))
