"""LBVim and the head for bags, block by block; the scan has tests of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.app.build import count_flops, count_parameters
from vitrail.checks import lbmamba as check
from vitrail.errors import InputError
from vitrail.layers.scan.local import local_scan
from vitrail.models import create_model
from vitrail.models.lbvim import LatentPool, LBVim, MambaMIL, checkpoint_filter_fn

TINY = {"img_size": 12, "patch_size": 4, "num_classes": 3, "embed_dim": 8, "depth": 3, "states": 2}


def stirred(module):
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def mixed(mixer, x, window):
    """Mamba's mixer for x (B, L, C), with the scan by its definition."""
    inside, gate = (x @ mixer.in_proj.weight.T).chunk(2, 2)
    taps, length = mixer.conv1d.weight.shape[2], x.shape[1]
    padded = F.pad(inside, (0, 0, taps - 1, 0))
    seen = sum(mixer.conv1d.weight[:, 0, tap] * padded[:, tap : tap + length] for tap in range(taps))
    seen = F.silu(seen + mixer.conv1d.bias)
    delta, enter, leave = (seen @ mixer.x_proj.weight.T).split((mixer.rank, mixer.states, mixer.states), 2)
    step = F.softplus(delta @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    given = [value.transpose(1, 2) for value in (seen, step, enter, leave)]
    y, _ = local_scan(given[0], given[1], -mixer.A_log.exp(), *given[2:], window=window, form="reference")
    y = y.transpose(1, 2) + mixer.D * seen
    return (y * F.silu(gate)) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("window", [None, 2])
def test_blocks_read_from_either_end_in_turn(window):
    torch.manual_seed(0)
    model = stirred(LBVim(**TINY, window=window))
    assert model.cls_token is None
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    places = model.patch_embed(x).flatten(2).transpose(1, 2) + model.pos_embed
    for index, layer in enumerate(model.layers):
        normed = F.rms_norm(places, (8,), layer.norm.weight, 1e-5)
        if index == 1:
            places = places + mixed(layer.mixer, normed.flip(1), window or 4).flip(1)
        else:
            places = places + mixed(layer.mixer, normed, window or 4)
    places = F.rms_norm(places, (8,), model.norm_f.weight, 1e-5)
    torch.testing.assert_close(model.forward_features(x), places)
    torch.testing.assert_close(model(x), places.mean(1) @ model.head.weight.T + model.head.bias)


def test_two_blocks_see_all_patches():
    torch.manual_seed(0)
    model = LBVim(**{**TINY, "depth": 2, "img_size": 24}).double()  # 36 patches
    embedded = torch.randn(1, 36, 8, dtype=torch.float64, requires_grad=True)
    y = embedded
    for layer in model.layers:
        y = layer(y)
    for place in (0, 17, 35):
        assert torch.autograd.grad(y[0, place].sum(), embedded, retain_graph=True)[0].abs().sum(2).min() > 0


def test_a_query_pools_by_attention():
    torch.manual_seed(0)
    pool = stirred(LatentPool(12, 3))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    keys, values = (x @ pool.kv.weight.T + pool.kv.bias).chunk(2, 2)
    parts = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = (keys[..., part] @ pool.latent[0, 0, part]) / 2
        parts.append((scores.softmax(1)[..., None] * values[..., part]).sum(1))
    expected = F.layer_norm(torch.cat(parts, 1), (12,), pool.post_norm.weight, pool.post_norm.bias)
    torch.testing.assert_close(pool(x), expected)
    fresh = LatentPool(400, 4)
    assert float(fresh.latent.detach().std()) == pytest.approx(400**-0.5, rel=0.2)
    assert float(fresh.kv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not fresh.kv.bias.any()


def test_variants_are_as_published():
    # Counted from the authors' nets; they have none as wide as the last.
    counts = {"tiny": 6_419_560, "300": 14_897_200, "small": 23_897_320, "528": 44_823_448, "base": 92_030_440}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create_model(f"lbvim_{name}", num_classes=1000)
        assert count_parameters(model) == count
        assert [layer.mixer.reverse for layer in model.layers] == [False, True] * 12
        assert (model.attn_pool is not None) == (name == "528")
    assert create_model("lbvim_528", num_classes=2, embed_dim=12, depth=1).attn_pool.num_heads == 6


def test_the_authors_keys_become_ours():
    ours, twin = (LBVim(**TINY, pool_heads=2) for _ in range(2))
    names = {"attn_pool.": "head.0.", "head.": "head.1."}
    theirs = {}
    for key, value in ours.state_dict().items():
        head = next((new for new in names if key.startswith(new)), None)
        theirs[key if head is None else names[head] + key.removeprefix(head)] = value + 1
    assert {"head.0.latent", "head.0.post_norm.bias", "head.1.weight", "layers.2.mixer.A_log"} <= set(theirs)
    twin.load_state_dict(checkpoint_filter_fn({"model": theirs}, twin), strict=True)
    for key, value in twin.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key] + 1), key
    plain = LBVim(**TINY)
    assert checkpoint_filter_fn(plain.state_dict(), plain).keys() == plain.state_dict().keys()


def test_pooling_can_be_left_out():
    model = LBVim(**TINY, pool_heads=2)
    x = torch.randn(1, 3, 12, 12)
    assert model(x).shape == (1, 3)
    model.reset_classifier(0)
    assert model(x).shape == (1, 8)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 9, 8)


# ---- bags


def test_a_bag_is_embedded_scanned_and_pooled_by_attention():
    torch.manual_seed(0)
    net = stirred(MambaMIL(6, 3, dim=8, window=4))
    bag = torch.randn(2, 11, 6, dtype=torch.float64)
    x = F.relu(bag @ net.embed[0].weight.T + net.embed[0].bias)
    assert len(net.layers) == 2
    for layer in net.layers:
        x = x + mixed(layer.mixer, F.layer_norm(x, (8,), layer.norm.weight, layer.norm.bias), 4)
    x = F.layer_norm(x, (8,), net.norm.weight, net.norm.bias)
    first, last = net.attention[0], net.attention[2]
    scores = torch.tanh(x @ first.weight.T + first.bias) @ last.weight[0] + last.bias
    weights = scores.exp() / scores.exp().sum(1, keepdim=True)
    pooled = (weights[..., None] * x).sum(1)
    found, counted = net.forward_features(bag)
    torch.testing.assert_close(found, pooled)
    torch.testing.assert_close(counted, weights)
    torch.testing.assert_close(net(bag), pooled @ net.classifier.weight.T + net.classifier.bias)
    torch.testing.assert_close(net(bag[1]), net(bag)[1:])


def test_the_head_for_bags_begins_as_published():
    torch.manual_seed(0)
    net = MambaMIL(64, 2)
    assert net.embed[2].p == 0.25
    assert net.classifier.in_features == 512
    for module in net.modules():
        if isinstance(module, nn.Linear):
            spread = (2 / (module.in_features + module.out_features)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(spread, rel=0.15)
            assert module.bias is None or not module.bias.any()


def test_what_does_not_fit_is_explained():
    with pytest.raises(InputError, match=r"pool_heads = 3 .*width of 8"):
        LBVim(**TINY, pool_heads=3)
    with pytest.raises(InputError, match="depth = 0"):
        MambaMIL(4, 2, depth=0)
    for shape in ((3, 5), (1, 0, 4), (4,)):
        with pytest.raises(InputError, match=r"a bag \(.*must be \(B, N, 4\)"):
            MambaMIL(4, 2, dim=8)(torch.zeros(shape))


def test_arms_of_the_check_have_equal_multiply_adds():
    counts = []
    for net, options in check.ARMS.values():
        with torch.device("meta"):
            counts.append(count_flops(create_model(net, num_classes=10, **options), (28, 28)))
    assert counts[1] == counts[2] == pytest.approx(counts[0], rel=0.01)
    assert check.departure(9, 4) < check.EXACT
    assert set(check.scan_times(check.QUICK_SHAPE, 1, 0)) == set(check.ARMS)
