import copy

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

from exact import moved, normal
from vitrail.app.build import count_flops, count_parameters
from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.unireplknet import (
    BRANCHES,
    Block,
    DilatedReparamBlock,
    FeedForward,
    GlobalResponseNorm,
    UniRepLKNet,
    checkpoint_filter_fn,
    kernel_plan,
    spread,
)

TINY = {"dim": 8, "depths": (1, 1, 2, 1), "kernel_sizes": ((3,), (7,), (5, 9), (13,)), "stem_stride": 2}


def tiny(**options):
    torch.manual_seed(0)
    return UniRepLKNet(num_classes=3, **{**TINY, **options})


def lived(module):
    """Return it in double precision, every value moved, as after training."""
    module = moved(module)
    for name, value in module.named_buffers():
        if "running_var" in name:
            value.copy_(0.3 + normal(*value.shape, seed=4).abs())
    return module


def batch_norm(layer, x, training):
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if training else (None, None)
    if not training:
        mean, var = layer.running_mean, layer.running_var
    shape = (1, -1, 1, 1)
    out = (x - mean.view(shape)) / (var + 1e-5).sqrt().view(shape)
    return out * layer.weight.view(shape) + layer.bias.view(shape)


def slow_window(x, kernel, dilation):
    """Sum shifted planes, a tap at a time."""
    side, (height, width) = kernel.shape[-1], x.shape[-2:]
    reach = dilation * (side // 2)
    padded, out = F.pad(x, (reach,) * 4), 0
    for i in range(side):
        for j in range(side):
            rows, columns = slice(i * dilation, i * dilation + height), slice(j * dilation, j * dilation + width)
            out = out + kernel[:, 0, i, j].view(1, -1, 1, 1) * padded[:, :, rows, columns]
    return out


def slow_branches(block, x, size, training):
    out = batch_norm(block.large[1], slow_window(x, block.large[0].weight, 1), training)
    for k, r in BRANCHES[size]:
        conv, norm = block.dilated[f"k{k}_{r}"]
        out = out + batch_norm(norm, slow_window(x, conv.weight, r), training)
    return out


def same_gradients(ours, theirs, given):
    weighing = normal(*ours.shape, seed=9)
    for got, wanted in zip(
        torch.autograd.grad((ours * weighing).sum(), given), torch.autograd.grad((theirs * weighing).sum(), given)
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


# ---- the parts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("size", "plane"), [(5, (3, 4)), (9, (4, 6)), (13, (7, 5)), (17, (9, 3))])
def test_branches_are_the_slow_loop_and_become_one_kernel(size, plane, training):
    torch.manual_seed(0)
    block = lived(DilatedReparamBlock(3, size)).train(training)
    x = normal(2, 3, *plane).requires_grad_()
    expected = slow_branches(block, x, size, training)
    buffers = copy.deepcopy(block)(x)
    torch.testing.assert_close(buffers, expected, rtol=1e-9, atol=1e-9)
    same_gradients(block(x), expected, [x, *block.parameters()])
    block.eval()
    expected = block(x)
    block.reparameterize()
    assert [*dict(block.named_parameters())] == ["large.weight", "large.bias"]
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    once = copy.deepcopy(block.state_dict())
    block.reparameterize()
    assert all(torch.equal(value, once[key]) for key, value in block.state_dict().items())


@pytest.mark.parametrize("size", BRANCHES)
def test_branches_reach_no_further_than_the_large_kernel(size):
    for k, r in BRANCHES[size]:
        assert r * (k - 1) + 1 <= size
        window = spread(torch.ones(1, 1, k, k), r, size)[0, 0]
        taps = {(size // 2 + r * (i - k // 2), size // 2 + r * (j - k // 2)) for i in range(k) for j in range(k)}
        assert {tuple(place) for place in window.nonzero().tolist()} == taps


def test_response_norm_is_the_slow_loop_and_is_quiet_about_silence():
    norm = moved(GlobalResponseNorm(3))
    x = normal(2, 4, 5, 3).requires_grad_()
    rows = []
    for image in x:
        lengths = [sum(image[i, j, c] ** 2 for i in range(4) for j in range(5)).sqrt() for c in range(3)]
        mean = sum(lengths) / 3
        scale = torch.stack([1 + norm.gamma[0, 0, 0, c] * lengths[c] / (mean + 1e-6) for c in range(3)])
        rows.append(image * scale + norm.beta[0, 0, 0])
    expected = torch.stack(rows)
    torch.testing.assert_close(norm(x), expected)
    same_gradients(norm(x), expected, [x, *norm.parameters()])
    silent = torch.zeros(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    norm(silent).sum().backward()
    torch.testing.assert_close(silent.grad, torch.ones_like(silent))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("size", "scale"), [(3, 0.5), (7, 0.0), (7, 0.3)])
def test_a_block_is_the_slow_loop_and_folds(size, scale, training):
    torch.manual_seed(0)
    block = lived(Block(8, size, layer_scale=scale)).train(training)
    x = normal(2, 8, 5, 4).requires_grad_()
    inside = slow_branches(block.dwconv, x, 7, training) if size == 7 else slow_window(x, block.dwconv.weight, 1)
    inside = batch_norm(block.norm, inside, training)
    squeezed = F.relu(inside.mean((2, 3)) @ block.se.fc1.weight[:, :, 0, 0].T + block.se.fc1.bias)
    assert squeezed.shape[1] == 2
    gate = torch.sigmoid(squeezed @ block.se.fc2.weight[:, :, 0, 0].T + block.se.fc2.bias)
    inside = (inside * gate[:, :, None, None]).permute(0, 2, 3, 1)
    hidden = inside @ block.ffn.fc1.weight.T + block.ffn.fc1.bias
    assert hidden.shape[-1] == 32
    hidden = block.ffn.grn(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
    out = batch_norm(block.ffn.norm, (hidden @ block.ffn.fc2.weight.T).permute(0, 3, 1, 2), training)
    expected = x + (out * block.ls.gamma.view(-1, 1, 1) if scale else out)
    torch.testing.assert_close(copy.deepcopy(block)(x), expected, rtol=1e-9, atol=1e-9)
    same_gradients(block(x), expected, [x, *block.parameters()])
    block.eval()
    expected = block(x)
    for _ in range(2):
        block.reparameterize()
        torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d | DilatedReparamBlock) for module in block.modules())
    kinds = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    assert kinds == {"dwconv", "se.fc1", "se.fc2", "ffn.fc1", "ffn.grn", "ffn.fc2"}
    assert block.ffn.grn.beta is None


# ---- the net


def test_the_net_is_stem_stages_mean_norm_and_head():
    model = lived(tiny()).eval()
    x = normal(2, 3, 20, 27)

    def layer_norm(layer, x):
        centred = x - x.mean(1, keepdim=True)
        out = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return out * layer.weight.view(shape) + layer.bias.view(shape)

    inside = F.conv2d(x, model.stem[0].weight, model.stem[0].bias, stride=2, padding=1)
    inside = F.gelu(layer_norm(model.stem[1], inside))
    inside = layer_norm(model.stem[4], F.conv2d(inside, model.stem[3].weight, model.stem[3].bias, padding=1))
    for i, stage in enumerate(model.stages):
        if i:
            conv, norm = stage.downsample
            inside = layer_norm(norm, F.conv2d(inside, conv.weight, conv.bias, stride=2, padding=1))
        for block in stage.blocks:
            inside = block(inside)
    pooled = layer_norm(model.norm, inside.mean((2, 3)))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


def test_the_net_becomes_one_without_batch_norm():
    model = tiny(layer_scale=0.1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.2, 2)
            nn.init.normal_(module.running_mean)
    nn.init.normal_(model.stages[1].blocks[0].ffn.grn.beta)
    for x in (torch.randn(2, 3, 28, 28), torch.randn(1, 3, 45, 61)):
        merged = reparameterize_model(model)
        expected = model(x)
        assert (merged(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    half = reparameterize_model(model.bfloat16())
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_kernels_are_placed_as_published():
    assert kernel_plan((2, 2, 6, 2)) == ((3, 3), (13, 13), (13,) * 6, (13, 13))
    assert kernel_plan((2, 2, 8, 2)) == ((3, 3), (13, 13), (13,) * 8, (13, 13))
    assert kernel_plan((3, 3, 18, 3)) == ((3,) * 3, (13,) * 3, (13, 3) * 9, (13,) * 3)
    assert kernel_plan((3, 3, 27, 3), 11) == ((3,) * 3, (11,) * 3, (11, 3, 3) * 9, (11,) * 3)


def test_re_parameterised_variants_have_the_published_sizes():
    # The catalogue's tests count all of them as they are trained.
    published = {"a": (4.4, 0.6, 224), "t": (31, 4.9, 224)}
    for name, (params, flops, side) in published.items():
        with torch.device("meta"):
            model = reparameterize_model(create_model(f"unireplknet_{name}", num_classes=1000).eval(), inplace=True)
            madds = count_flops(model, (side, side)) / 1e9
        assert count_parameters(model) / 1e6 == pytest.approx(params, abs=max(0.01 * params, 0.05))
        assert madds == pytest.approx(flops, abs=max(0.01 * flops, 0.05)), name
        assert model.pretrained_cfg["input_size"] == (3, side, side)


def test_weights_begin_as_published_and_drop_path_rises():
    model = create_model("unireplknet_nano", num_classes=100, dim=32, layer_scale=1e-6, drop_path_rate=0.4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if module.weight.numel() > 1000:
                assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.15)
            assert module.bias is None or not module.bias.any()
    block = model.stages[2].blocks[1]
    assert torch.equal(block.ls.gamma.detach(), torch.full((128,), 1e-6))
    assert torch.equal(tiny().stages[0].blocks[0].ls.gamma.detach(), torch.full((8,), 1e-6))  # unless told otherwise
    assert not block.ffn.grn.gamma.any() and not block.ffn.grn.beta.any()
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def _authors_name(key, merged=False):
    if key.startswith("stem."):
        return f"downsample_layers.0.{key[5:]}"
    if not key.startswith("stages."):
        return key
    _, stage, part, *rest = key.split(".")
    if part == "downsample":
        return ".".join([f"downsample_layers.{stage}", *rest])
    block, name, *rest = rest
    rest = ".".join([name, *rest])
    for ours, theirs in (
        ("dwconv.large.0.", "dwconv.lk_origin."),
        ("dwconv.large.1.", "dwconv.origin_bn."),
        *((f"dwconv.dilated.k{k}_{r}.0.", f"dwconv.dil_conv_k{k}_{r}.") for k in (3, 5, 7, 9) for r in range(1, 8)),
        *((f"dwconv.dilated.k{k}_{r}.1.", f"dwconv.dil_bn_k{k}_{r}.") for k in (3, 5, 7, 9) for r in range(1, 8)),
        *([("dwconv.", "dwconv.lk_origin.")] if merged and (stage, block) not in (("0", "0"), ("2", "0")) else []),
        ("se.fc1.", "se.down."),
        ("se.fc2.", "se.up."),
        ("ffn.fc1.", "pwconv1.1."),
        ("ffn.grn.", "act.1."),
        ("ffn.fc2.", "pwconv2.0."),
        ("ffn.norm.", "pwconv2.2."),
        ("ls.gamma", "gamma"),
    ):
        if rest.startswith(ours):
            rest = theirs + rest[len(ours) :]
            break
    return f"stages.{stage}.{block}.{rest}"


@pytest.mark.parametrize("merged", [False, True])
def test_the_authors_keys_become_ours(merged):
    ours, twin = tiny().eval(), tiny().eval()
    if merged:
        ours, twin = reparameterize_model(ours), reparameterize_model(twin)
    theirs = {_authors_name(key, merged): value + 1 for key, value in ours.state_dict().items()}
    names = {"stages.3.0.dwconv.lk_origin.weight", "stages.0.0.dwconv.weight", "stages.1.0.se.up.bias"}
    names |= {"stages.2.0.act.1.gamma", "downsample_layers.0.4.bias", "downsample_layers.2.0.weight", "norm.weight"}
    own = {"stages.3.0.dwconv.dil_conv_k3_4.weight", "stages.3.0.dwconv.dil_bn_k7_2.running_mean", "stages.1.0.gamma"}
    assert names | ({"stages.3.0.dwconv.lk_origin.bias"} if merged else own) <= set(theirs)
    backbone = {f"backbone.{key}": value for key, value in theirs.items()}
    dense = {"state_dict": backbone | {"backbone.norm2.bias": torch.ones(3), "decode_head.x": torch.ones(1)}}
    for given in (theirs, {"model": theirs, "epoch": 3}, dense):
        twin.load_state_dict(checkpoint_filter_fn(given, twin), strict=True)
        for key, value in twin.state_dict().items():
            assert torch.equal(value, ours.state_dict()[key] + 1), key
    assert checkpoint_filter_fn(ours.state_dict(), twin).keys() == ours.state_dict().keys()


def test_any_size_dense_features_and_pooling():
    features = create_model("unireplknet_nano", num_classes=10, features_only=True, out_indices=(0, 2, 3)).eval()
    maps = features(torch.randn(1, 3, 37, 50))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 19, 25), (64, 5, 7), (128, 3, 4)]
    assert features.feature_info.reduction() == [2, 8, 16]
    model = UniRepLKNet(num_classes=0, global_pool="", **TINY)
    assert model(torch.zeros(1, 3, 17, 33)).shape == (1, 64, 2, 3)
    model.reset_classifier(4, "max")
    assert model(torch.zeros(1, 3, 225, 190)).shape == (1, 4)
    for stride in (1, 2, 4):
        assert tiny(stem_stride=stride).stem(torch.zeros(1, 3, 16, 12)).shape == (1, 8, 16 // stride, 12 // stride)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 10}, "dim = 10 .*multiple of 4"),
        ({"depths": (1, 1, 1)}, r"depths = \(1, 1, 1\).*each of 4 stages"),
        ({"kernel_sizes": ((3,), (7,), (5,), (13,))}, "kernel_sizes = .* do not fit depths"),
        ({"kernel_sizes": ((3,), (7,), (5, 8), (13,))}, r"a kernel of 8 .*\[3, 5, 7, 9"),
        ({"kernel_sizes": None, "large_kernel": 19}, "a kernel of 19 "),
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"global_pool": "median"}, "global_pool = 'median'"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
    with pytest.raises(InputError, match="kernel_size = 3 has no dilated branches"):
        DilatedReparamBlock(4, 3)


def test_a_folded_feed_forward_takes_in_the_beta_of_its_norm():
    ffn = lived(FeedForward(4)).eval()
    x, scale = normal(1, 4, 3, 2), normal(4, seed=5)
    expected = ffn(x) * scale.view(-1, 1, 1)
    with torch.no_grad():
        ffn.fold(scale)
    torch.testing.assert_close(ffn(x), expected)
