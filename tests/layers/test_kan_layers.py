import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exact import moved, normal, same
from vitrail.errors import InputError
from vitrail.layers import kan_bases as kb
from vitrail.layers.kan_layers import (
    FORMS,
    BottleneckKANConv,
    BottleneckKANExperts,
    KANConv,
    KANConvExperts,
    KANFocalModulation,
    KANSelfAttention,
    NoiseInjection,
    Router,
    TunedKANConv,
    imbalance,
)


def functions(layer, x, group):
    """The basis functions of (B, C) numbers of a group, (B, C, K), or for wavelets (B, C, out)."""
    kind, basis = layer.kind, layer.basis
    degree = 3
    if kind == "gram":
        return F.silu(kb.gram(x.tanh(), basis.beta))
    if kind == "spline":
        return kb.splines(x, kb.spline_centres(5, 3, -1, 1), 0.4, 3)
    if kind == "rbf":
        return kb.radial(x, torch.linspace(-2, 2, 8).double(), 4 / 7)
    if kind == "relu":
        low, high = (bound.flatten(2).squeeze(2).T for bound in (basis.low, basis.high))
        return kb.relu_bumps(x, low, high, 4 * 25 / 16)
    if kind == "wavelet":
        shift, scale = (value[group].flatten(2).squeeze(2).T for value in (basis.translation, basis.scale))
        return kb.mexican_hat((x.unsqueeze(-1) - shift) / scale)
    tables = {
        "legendre": kb.legendre_table(degree),
        "chebyshev": kb.chebyshev_table(degree),
        "jacobi": kb.jacobi_table(degree, 1, 1),
        "bernstein": kb.bernstein_table(degree),
        "bernoulli": kb.bernoulli_table(degree),
    }
    squash = x.sigmoid() if kind.startswith("bern") else x.tanh() if kind != "legendre" else x
    return kb.polynomials(squash, tables[kind])


def slow_kan_conv(layer, x, stride, padding):
    """The layer without its normalisation and activation: loops over groups, outputs and places of the kernel."""
    groups, inside, outside = layer.groups, layer.in_channels // layer.groups, layer.out_channels // layer.groups
    kind = layer.kind
    activated = {"spline": F.gelu, "gram": F.silu, "rbf": F.silu, "wavelet": F.silu, "relu": F.silu}
    output = []
    for g in range(groups):
        part = x[:, g * inside : (g + 1) * inside]
        scaled = part
        if kind == "legendre":
            low, high = part.flatten(1).min(1).values, part.flatten(1).max(1).values
            scaled = 2 * (part - low.view(-1, 1, 1, 1)) / (high - low).view(-1, 1, 1, 1) - 1
        flat = scaled.movedim(1, -1).reshape(-1, inside)
        basis = functions(layer, flat, g).unflatten(0, (len(x), *x.shape[2:])).permute(0, 3, 4, 1, 2)  # (B, C, K, H, W)
        basis = F.pad(basis, [padding] * 4)
        active = F.pad(activated.get(kind, lambda t: t)(part), [padding] * 4)
        height, width = basis.shape[3:]
        kh, kw = layer.kernel_size
        for o in range(outside):
            number = g * outside + o
            maps = []
            for i in range(0, height - kh + 1, stride):
                for j in range(0, width - kw + 1, stride):
                    window, plain = basis[..., i : i + kh, j : j + kw], active[..., i : i + kh, j : j + kw]
                    if kind == "wavelet":
                        total = (window[:, :, o] * layer.weight[number]).sum((1, 2, 3))
                    else:
                        weight = layer.weight[number].unflatten(0, (-1, inside)).transpose(0, 1)
                        total = (window * weight).sum((1, 2, 3, 4))
                    if kind != "wavelet" and layer.base is not None:
                        total = total + (plain * layer.base.weight[number]).sum((1, 2, 3))
                    maps.append(total)
            side = (height - kh) // stride + 1
            output.append(torch.stack(maps, 1).unflatten(1, (side, -1)))
    y = torch.stack(output, 1)
    if kind == "wavelet":
        mixed = torch.cat(
            [
                torch.einsum("oi,bihw->bohw", weight.flatten(1), part)
                for weight, part in zip(layer.mix.weight.chunk(groups), y.chunk(groups, 1))
            ],
            1,
        )
        y = mixed + layer.base(F.silu(x))
    return y


@pytest.mark.parametrize("basis", FORMS)
@pytest.mark.parametrize(("groups", "kernel", "stride", "size"), [(1, 3, 1, (4, 5)), (2, (2, 3), 2, (5, 3))])
def test_a_layer_is_the_papers_sum(basis, groups, kernel, stride, size):
    torch.manual_seed(0)
    layer = KANConv(4, 6, kernel, stride, 1, groups=groups, basis=basis, norm="none", act=False)
    moved(layer)
    x = normal(2, 4, *size).requires_grad_()
    given = [x, *layer.parameters()]
    same(layer(x), slow_kan_conv(layer, x, stride, 1), given, 1e-6)  # grids are kept in float32


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("basis", ["gram", "wavelet", "relu", "legendre"])
def test_other_axes_are_planes_of_one_line(axes, basis):
    torch.manual_seed(0)
    layer = moved(KANConv(4, 6, 3, 1, 1, groups=2, basis=basis, axes=axes, norm="none"))
    plane = KANConv(4, 6, (1, 3), 1, (0, 1), groups=2, basis=basis, norm="none").double()
    state = {
        key: value.squeeze(-1) if basis in ("wavelet", "relu") and "basis" in key and axes == 3 else value
        for key, value in layer.state_dict().items()
    }
    line = (slice(None), slice(None), *[slice(1, 2)] * (axes - 1))
    fits = plane.state_dict()
    plane.load_state_dict(
        {
            key: (value[line] if value.ndim == axes + 2 and value.shape[-1] == 3 else value).reshape(fits[key].shape)
            for key, value in state.items()
        }
    )
    x = normal(2, 4, 5)
    wide = x.view(2, 4, *[1] * (axes - 1), 5)
    torch.testing.assert_close(layer(wide).flatten(2), plane(x[:, :, None]).flatten(2))


def test_layers_end_as_published():
    ends = {
        "spline": ("instance", nn.PReLU),
        "chebyshev": ("instance", nn.Identity),
        "gram": ("instance", nn.SiLU),
        "wavelet": ("instance", nn.Identity),
    }
    x = normal(2, 4, 5, 5).float()
    for basis, (_, act) in ends.items():
        layer = KANConv(4, 6, 3, basis=basis)
        assert isinstance(layer.act, act)
        bare = KANConv(4, 6, 3, basis=basis, norm="none", act=False)
        bare.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("act")})
        torch.testing.assert_close(layer(x), layer.act(F.instance_norm(bare(x))))
    rbf = KANConv(4, 6, 3, basis="rbf")
    bare = KANConv(4, 6, 3, basis="rbf", norm="none")
    bare.load_state_dict(rbf.state_dict())
    expected = bare.expanded(F.instance_norm(x), bare.basis, bare.weight) + bare.base(F.silu(x))
    torch.testing.assert_close(rbf(x), expected)


@pytest.mark.parametrize(
    ("basis", "deviation"),
    [
        ("gram", 1 / math.sqrt(4 * 9 * 32 * 32)),
        ("legendre", 1 / math.sqrt(4 * 9 * 32 * 32)),
        ("spline", 1 / math.sqrt(8 * 9 * 32)),
        ("rbf", 1 / math.sqrt(8 * 9 * 32)),
        ("wavelet", 1 / math.sqrt(9 * 32)),
        ("chebyshev", 1 / (4 * 9 * 32)),
        ("jacobi", 1 / (4 * 9 * 32)),
    ],
)
def test_weights_begin_as_published(basis, deviation):
    torch.manual_seed(0)
    layer = KANConv(32, 32, 3, basis=basis)
    assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.06)
    if layer.base is not None:
        assert float(layer.base.weight.detach().std()) == pytest.approx(1 / math.sqrt(9 * 32), rel=0.06)
    if basis == "gram":
        many = torch.cat([KANConv(4, 4, 3, degree=12).basis.beta.detach() for _ in range(40)])
        assert float(many.std()) == pytest.approx(1 / (4 * 9 * 13), rel=0.1)
        inside = torch.cat([BottleneckKANConv(64, 8, 3, degree=12).core.basis.beta.detach() for _ in range(40)])
        assert float(inside.std()) == pytest.approx(1 / (64 * 9 * 13), rel=0.1)


@pytest.mark.parametrize(("dims", "width"), [((64, 32), 16), ((256, 64), 64), ((3, 32), 3), ((8, 12), 8)])
def test_a_bottleneck_squeezes_the_basis(dims, width):
    layer = BottleneckKANConv(*dims, 3, padding=1)
    assert layer.core.in_channels == layer.core.out_channels == width
    x = normal(2, dims[0], 5, 4).float()
    inner = layer.core.expanded(layer.inner_proj(x), layer.core.basis, layer.core.weight)
    expected = F.silu(F.instance_norm(layer.out_proj(inner) + layer.base(F.silu(x))))
    torch.testing.assert_close(layer(x), expected)


def test_noise_comes_in_training_alone_and_is_as_large_as_told():
    noise, x = NoiseInjection(0.25, 0.5), 2 * torch.randn(16, 3, 40, 40) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    torch.manual_seed(0)
    added = noise(x) - x
    changed = added != 0
    assert float(changed.float().mean()) == pytest.approx(0.25, abs=0.01)
    for channel, size in enumerate((1.0, 2.0, 3.0)):
        assert float(added[:, channel][changed[:, channel]].std()) == pytest.approx(size, rel=0.05)
    assert noise.eval()(x) is x


@pytest.mark.parametrize(
    ("basis", "place"), [("gram", "poly"), ("jacobi", "degree"), ("chebyshev", "out"), ("relu", "full")]
)
def test_dropout_stands_where_it_was_published(basis, place):
    layer = KANConv(4, 6, 3, basis=basis, dropout=0.5)
    assert layer.placement == place
    seen = []
    layer.drop.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    layer(torch.randn(2, 4, 5, 5))
    assert seen == [{"poly": 4, "degree": 12, "out": 6, "full": 4}[place]]


def test_a_router_gives_images_to_the_best_experts():
    torch.manual_seed(0)
    router = Router(5, 4, 2).eval()
    nn.init.normal_(router.gate)
    x = torch.randn(6, 5, 3, 3)
    gates, load = router(x)
    for image, gate in zip(x, gates):
        shares = (image.mean((1, 2)) @ router.gate).softmax(0)
        best = shares.argsort(descending=True)[:2]
        expected = torch.zeros(4)
        expected[best] = shares[best] / (shares[best].sum() + 1e-6)
        torch.testing.assert_close(gate, expected)
    torch.testing.assert_close(load, (gates > 0).sum(0).float())
    importance = gates.sum(0)
    expected = sum(v.var() / (v.mean() ** 2 + 1e-10) for v in (importance, load))
    torch.testing.assert_close(imbalance(gates, load), expected)


def test_the_load_is_expected_under_the_noise_of_each_expert(monkeypatch):
    router = Router(3, 4, 2).double().train()
    nn.init.normal_(router.gate)
    nn.init.normal_(router.noise)
    x, drawn = normal(5, 3, 2, 2), normal(5, 4, seed=4)
    monkeypatch.setattr(torch, "randn_like", lambda _: drawn)
    _, load = router(x)
    clean, spread = x.mean((2, 3)) @ router.gate, F.softplus(x.mean((2, 3)) @ router.noise) + 0.01
    noisy = clean + spread * drawn
    expected = torch.zeros(4, dtype=torch.float64)
    for b in range(5):
        for e in range(4):
            others = sorted((noisy[b, o].item() for o in range(4) if o != e), reverse=True)
            expected[e] += torch.special.ndtr((clean[b, e] - others[1]) / spread[b, e])
    torch.testing.assert_close(load, expected)
    load.sum().backward()
    assert router.noise.grad.any()


@pytest.mark.parametrize("kind", [KANConvExperts, BottleneckKANExperts])
def test_a_mixture_is_the_sum_of_what_experts_say(kind):
    torch.manual_seed(0)
    layer = kind(6, 8, 3, 1, 1, experts=3, top_k=2, norm="none").eval()
    moved(layer)
    x = normal(4, 6, 5, 4).requires_grad_()
    full = kind is KANConvExperts
    inner = x if full else layer.inner_proj(x)
    gates, _ = layer.router(inner)
    total = sum(gates[:, e, None, None, None] * layer.experts[e](inner) for e in range(3))
    expected = total if full else F.silu(layer.out_proj(total) + layer.base(F.silu(x)))
    same(layer(x), expected, [x, layer.router.gate])


def test_experts_begin_alike_and_may_be_bottlenecks():
    layer = KANConvExperts(4, 4, 3, experts=3, top_k=1, bottleneck=True)
    for expert in layer.experts[1:]:
        for ours, first in zip(expert.parameters(), layer.experts[0].parameters()):
            assert torch.equal(ours, first)


def test_a_mixture_is_the_same_when_exported(monkeypatch):
    layer = BottleneckKANExperts(6, 8, 3, 1, 1, experts=3).eval()
    nn.init.normal_(layer.router.gate)
    x = torch.randn(4, 6, 5, 4)
    expected = layer(x)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("inner", [None, 4])
def test_attention_looks_from_place_to_place(rotary, inner):
    torch.manual_seed(0)
    layer = moved(KANSelfAttention(8, inner, norm="none", rotary=rotary))
    x = normal(2, 8, 3, 2).requires_grad_()
    h = layer.inner_proj(x)
    q, k, v = (proj(h).flatten(2) for proj in (layer.proj_q, layer.proj_k, layer.proj_v))
    rows = []
    for b in range(2):
        for n in range(6):
            scores = []
            for m in range(6):
                key = k[b, :, m]
                if rotary:  # turning both is turning one by the difference of places
                    dy, dx = m // 2 - n // 2, m % 2 - n % 2
                    angle = dx * layer.freqs[0] + dy * layer.freqs[1]
                    one, other = key[0::2], key[1::2]
                    turned = (one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos())
                    key = torch.stack(turned, 1).flatten()
                scores.append(q[b, :, n] @ key)
            share = torch.stack(scores).softmax(0)
            rows.append((v[b] * share).sum(1))
    y = torch.stack(rows).unflatten(0, (2, 6)).transpose(1, 2)
    expected = layer.gamma * x + layer.outer_proj(y.reshape(h.shape))
    same(layer(x), expected, [x, layer.gamma], 1e-7)


@pytest.mark.parametrize(("full", "kind"), [(True, "full"), (False, "bottleneck")])
def test_focal_modulation_multiplies_by_gated_contexts(full, kind):
    torch.manual_seed(0)
    layer = KANFocalModulation(4, full=full, kind=kind, norm="none")
    x = normal(2, 4, 5, 6).float()
    query, context, gates = layer.f(x).split([4, 4, 3], 1)
    first = layer.focal_layers[0](context)
    second = layer.focal_layers[1](first)
    assert [focal.kernel_size for focal in layer.focal_layers] == [(3, 3), (5, 5)]
    total = gates[:, :1] * first + gates[:, 1:2] * second
    total = total + gates[:, 2:] * total.mean((2, 3), keepdim=True)
    torch.testing.assert_close(layer(x), layer.proj(query * layer.h(total / 3)))


def tuned(**options):
    torch.manual_seed(0)
    layer = KANConv(4, 6, 3, padding=1, groups=2, norm="none")
    return layer, TunedKANConv(layer, **options)


def test_a_tuned_layer_begins_as_the_trained_one():
    layer, part = tuned(degrees=(0, 3), extra_degrees=2)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(part(x), layer(x))
    names = {name for name, p in part.named_parameters() if p.requires_grad}
    assert names == {"weight_delta", "weight_extra", "beta_delta", "beta_extra"}
    _, part = tuned(degrees=(1,), extra_degrees=0, base=True)
    assert {name for name, p in part.named_parameters() if p.requires_grad} == {"weight_delta", "layer.base.weight"}


def test_a_tuned_layer_adds_its_degrees():
    layer, part = tuned(degrees=(3, 1), extra_degrees=2)
    moved(part)
    x = normal(2, 4, 4, 3)
    factors = layer.basis.beta.detach().clone()
    factors[2] += part.beta_delta.detach()[0]  # degree 3; degree 1 has no factor
    beta = torch.cat((factors[:3], part.beta_extra.detach(), torch.zeros(1, dtype=torch.float64)))
    output = layer.base(F.silu(x))
    for g in range(2):
        basis = F.silu(kb.gram(x[:, 2 * g : 2 * g + 2].tanh(), beta))  # (B, C, H, W, K)
        rows = slice(3 * g, 3 * g + 3)
        weights = [*layer.weight[rows].split(2, 1), *part.weight_extra[rows].split(2, 1)]
        delta = part.weight_delta[rows].split(2, 1)
        weights[1], weights[3] = weights[1] + delta[0], weights[3] + delta[1]
        for degree, weight in enumerate(weights):
            output[:, rows] += F.conv2d(basis[..., degree], weight, padding=1)
    torch.testing.assert_close(part(x), F.silu(output))
    before = part(x)
    part.reparameterize()
    torch.testing.assert_close(part(x), before)
    torch.testing.assert_close(layer(x), before)
    assert layer.weight.shape[1] == 2 * 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KANConv(4, 6, 3, groups=3), "groups = 3"),
        (lambda: KANConv(4, 6, 3, axes=4), "axes = 4"),
        (lambda: KANConv(4, 6, 3, degree=0), "degree = 0"),
        (lambda: KANConv(4, 6, 3, degree=13), "degree = 13"),
        (lambda: KANConv(4, 6, 3, basis="grams"), "'gram'"),
        (lambda: KANConv(4, 6, 3, norm="layer"), "norm"),
        (lambda: KANConv(4, 6, 3, placement="inside"), "placement"),
        (lambda: KANConv(4, 6, 3, basis="wavelet", wavelet="morle"), "'morlet'"),
        (lambda: KANConv(4, 6, 3, basis="rbf", grid_size=1), "grid_size = 1"),
        (lambda: KANConv(4, 6, 3, basis="rbf", grid_range=(1, -1)), "grid_range"),
        (lambda: KANConv(4, 6, 3, dropout=1.0), "dropout = 1.0"),
        (lambda: KANConv(4, 6, 3)(torch.zeros(2, 3, 5, 5)), "met"),
        (lambda: BottleneckKANConv(4, 6, 3)(torch.zeros(2, 3, 5, 5)), "met"),
        (lambda: BottleneckKANConv(4, 6, 3, reduction=0.5), "reduction = 0.5"),
        (lambda: BottleneckKANConv(4, 6, 3, groups=4), "groups = 4"),
        (lambda: Router(4, 2, 3), "top_k = 3"),
        (lambda: KANSelfAttention(4, kernel_size=2), "kernel_size = 2"),
        (lambda: KANSelfAttention(6, rotary=True), "rotary"),
        (lambda: KANSelfAttention(6, kind="ful"), "'full'"),
        (lambda: KANFocalModulation(4, 2), "focal_window = 2"),
        (lambda: TunedKANConv(KANConv(4, 6, 3, basis="rbf")), "'rbf'"),
        (lambda: TunedKANConv(KANConv(4, 6, 3), (4,)), r"degrees = \(4,\)"),
        (lambda: TunedKANConv(KANConv(4, 6, 3), extra_degrees=0), "extra_degrees = 0"),
    ],
)
def test_what_is_not_allowed_is_said(make, words):
    with pytest.raises(InputError, match=words):
        make()
