import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from exact import normal
from vitrail.data.preprocess import Preprocess
from vitrail.deploy.export import export_onnx
from vitrail.edits.binary_convolution import binary_convolution
from vitrail.errors import InputError
from vitrail.layers import binary
from vitrail.layers.binary import BinaryConv2d, input_scale, load_packed, pack, save_packed
from vitrail.models import create_model


def slow_block(layer, x):
    """The paper's block for one image (C, H, W): normalise, take signs, convolve with alpha sign(W), scale by K."""
    weight, groups = layer.weight, layer.groups
    if layer.norm is not None:
        norm = layer.norm
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    (top, left), (down, across), (far, wide) = layer.padding, layer.stride, layer.dilation
    rows = (x.shape[1] + 2 * top - far * (weight.shape[2] - 1) - 1) // down + 1
    columns = (x.shape[2] + 2 * left - wide * (weight.shape[3] - 1) - 1) // across + 1
    out = x.new_zeros(len(weight), rows, columns)
    size, own = weight.shape[1], len(weight) // groups
    for o in range(len(weight)):
        alpha = sum(abs(w) for w in weight[o].flatten()) / weight[o].numel()
        part = x[o // own * size : (o // own + 1) * size]
        for row in range(rows):
            for column in range(columns):
                total = magnitude = 0.0
                for k in range(weight.shape[2]):
                    for m in range(weight.shape[3]):
                        i, j = row * down - top + k * far, column * across - left + m * wide
                        if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
                            for c in range(size):
                                value = part[c, i, j]
                                sign = 1.0 if value >= 0 else -1.0
                                total = total + (1 if weight[o, c, k, m] >= 0 else -1) * (
                                    sign if layer.inputs else value
                                )
                                magnitude = magnitude + abs(value) / size
                scale = magnitude / (weight.shape[2] * weight.shape[3]) if layer.scaled else 1.0
                out[o, row, column] = alpha * scale * total + (0 if layer.bias is None else layer.bias[o])
    return out


SHAPES = [
    ((3, 4, 3), {"padding": 1}, (4, 5)),
    ((4, 6, (2, 3)), {"stride": 2, "padding": (0, 2), "groups": 2, "bias": False}, (5, 7)),
    ((5, 2, 3), {"dilation": 2, "padding": 2, "stride": (1, 2)}, (5, 3)),
]


def layer(shape, options, **how):
    torch.manual_seed(0)
    made = BinaryConv2d(*shape, **options, **how).double().eval()
    if made.norm is not None:
        made.norm.running_mean.copy_(normal(made.in_channels))
        made.norm.running_var.copy_(normal(made.in_channels, seed=1).abs() + 0.5)
        nn.init.uniform_(made.norm.weight, 0.5, 2)
    return made


@pytest.mark.parametrize(("shape", "options", "size"), SHAPES)
@pytest.mark.parametrize("how", [{}, {"scaled": False}, {"inputs": False}])
def test_it_is_the_papers_block(shape, options, size, how):
    conv = layer(shape, options, **how)
    x = normal(1, shape[0], *size)
    torch.testing.assert_close(conv(x), slow_block(conv, x[0]).detach()[None], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inputs", [True, False])
def test_gradients_of_weights_are_those_of_the_published_code(inputs):
    conv = layer((3, 4, 3), {"padding": 1, "bias": False}, inputs=inputs, scaled=False)
    with torch.no_grad():
        conv.weight.mul_(10)  # some are beyond 1, where the sign is flat
    x = normal(2, 3, 4, 5)
    pull = normal(2, 4, 4, 5, seed=2)
    (conv(x) * pull).sum().backward()
    # Theirs, in their steps: binary weights take the place of the real ones, and their gradient is scaled.
    weight, count = conv.weight.detach(), 27
    mean = weight.abs().sum((1, 2, 3), keepdim=True) / count
    bits = (weight.sign() * mean).requires_grad_()
    seen = conv.norm(x).sign() if inputs else x
    (F.conv2d(seen, bits, padding=1) * pull).sum().backward()
    factor = mean.expand_as(weight).clone()
    factor[weight <= -1] = 0
    factor[weight >= 1] = 0
    expected = bits.grad * (factor + 1 / count) * (1 - 1 / 3) * count
    assert 0.05 < float((weight.abs() >= 1).double().mean()) < 0.95
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_the_sign_of_an_input_passes_gradients_between_minus_one_and_one():
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.5, 1.0, 2.0], requires_grad=True)
    y = binary._SignOfInput.apply(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    (y * torch.arange(1, 8)).sum().backward()
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]


def test_k_is_the_mean_over_channels_and_window_and_has_a_gradient():
    conv = BinaryConv2d(4, 2, (3, 1), stride=2, padding=(1, 0), groups=2, bias=False)
    x = normal(1, 4, 5, 3).float().requires_grad_()
    scale = input_scale(x, conv)
    assert scale.shape == (1, 2, 3, 2)
    torch.testing.assert_close(scale[0, 1, 0, 1], x[0, 2:, :2, 2].abs().sum() / 2 / 3)
    scale.sum().backward()
    assert x.grad.any()


def test_training_centres_and_clamps_the_real_weights_before_each_pass():
    conv = BinaryConv2d(3, 2, 3)
    nn.init.normal_(conv.weight, 1.0, 1.0)
    expected = (conv.weight - conv.weight.mean(1, keepdim=True)).clamp(-1, 1).detach()
    before = conv.weight.detach().clone()
    conv.eval()(torch.randn(1, 3, 4, 4))
    assert torch.equal(conv.weight, before)
    conv.train()(torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(conv.weight.detach(), expected)
    single = BinaryConv2d(2, 2, 3, groups=2)
    nn.init.normal_(single.weight, 0.5)
    expected = single.weight.detach().clamp(-1, 1)
    single.train()(torch.randn(2, 2, 4, 4)).sum().backward()
    assert torch.equal(single.weight, expected)
    assert single.weight.grad.any()


def test_real_weights_are_not_decayed_and_the_block_begins_as_published():
    conv = BinaryConv2d(3, 2, 3)
    (group,) = conv.param_groups()
    assert group["params"][0] is conv.weight
    assert group["weight_decay"] == 0
    assert conv.norm.eps == 1e-4
    assert BinaryConv2d(3, 2, 3, inputs=False).norm is None
    assert not BinaryConv2d(3, 2, 3, inputs=False).scaled


# ---- bits


PACKED = [
    ((256, 9, 3), {"padding": 1}, (14, 13)),
    ((70, 11, 3), {"stride": 2, "padding": 1, "bias": False}, (9, 7)),
    ((130, 6, (5, 2)), {"dilation": (1, 2), "padding": (3, 1), "groups": 2}, (11, 6)),
    ((3, 5, 1), {}, (3, 3)),
    ((64, 3, 4), {"padding": 0}, (4, 4)),
]


@pytest.mark.parametrize(("shape", "options", "size"), PACKED)
def test_counting_bits_gives_the_sums_of_the_float_simulation(shape, options, size):
    for scaled in (False, True):
        conv = layer(shape, options, scaled=scaled).float()
        if not scaled:
            conv.norm = None  # so that zeros stay zeros
        packed = pack(conv)
        x = normal(3, shape[0], *size).float()
        x[:, :, 0, 0] = 0
        with torch.no_grad():
            assert packed.form(x) == "popcount"
            simulated, counted = conv(x), packed(x)
        if scaled:
            torch.testing.assert_close(counted, simulated, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(counted, simulated)


def test_threads_share_out_places_and_images():
    conv = layer((40, 4, 3), {"padding": 1}).float()
    packed = pack(conv)
    x = normal(2, 40, 21, 9).float()
    threads, work = torch.get_num_threads(), binary.SERIAL_WORK
    try:
        torch.set_num_threads(3)
        binary.SERIAL_WORK = 0
        with torch.no_grad():
            torch.testing.assert_close(packed(x), conv(x), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(threads)
        binary.SERIAL_WORK = work


def test_the_float_form_is_taken_where_bits_cannot_be_counted(monkeypatch):
    conv = layer((6, 4, 3), {"padding": 1}).float()
    packed, x = pack(conv), normal(2, 6, 5, 4).float()
    expected = conv(x).detach()
    assert packed.form(x.requires_grad_()) == "float"
    torch.testing.assert_close(packed(x).detach(), expected)
    assert packed.form(x.detach().double()) == "float"
    monkeypatch.setattr(binary, "_has_numba", lambda: False)
    assert packed.form(x.detach()) == "float"
    real = layer((6, 4, 3), {"padding": 1}, inputs=False).float()
    assert pack(real).form(x.detach()) == "float"
    torch.testing.assert_close(pack(real)(x.detach()), real(x.detach()).detach())


def test_words_follow_the_bits():
    first, second = (layer((70, 4, 3), {}).float() for _ in range(2))
    nn.init.normal_(second.weight)
    packed, x = pack(first), normal(1, 70, 5, 4).float()
    with torch.no_grad():
        packed(x)
        packed.load_state_dict(pack(second).state_dict())
        torch.testing.assert_close(packed(x), second(x), rtol=1e-5, atol=1e-5)


def test_bits_are_those_of_the_signs_and_a_32nd_of_the_bytes():
    conv = layer((64, 8, 3), {"bias": False}, inputs=False).float()
    packed = pack(conv)
    assert torch.equal(packed.signs(), torch.where(conv.weight >= 0, 1.0, -1.0))
    bits = np.unpackbits(packed.bits.numpy(), axis=2, bitorder="little")
    assert np.array_equal(bits, (conv.weight >= 0).flatten(2).transpose(1, 2).numpy())
    assert packed.bits.numel() == conv.weight.numel() // 8
    assert packed.alpha.tolist() == conv.weight.detach().abs().mean((1, 2, 3)).tolist()


def test_packed_files_hold_bits_and_come_back(tmp_path):
    torch.manual_seed(0)
    model = binary_convolution()(create_model("small_resnet_nano", num_classes=3)).train()
    model(torch.randn(4, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    packed = pack(model)
    save_packed(model, tmp_path / "a.safetensors")
    save_packed(packed, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert load_file(tmp_path / "a.safetensors")["layer3.0.conv1.bits"].dtype == torch.uint8
    other = binary_convolution()(create_model("small_resnet_nano", num_classes=3))
    loaded = load_packed(other, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
        torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-4, atol=1e-6)
    assert isinstance(other.layer3[0].conv1, BinaryConv2d)
    with pytest.raises(InputError, match="does not fit SmallResNet"):
        load_packed(binary_convolution()(create_model("small_resnet_nano", num_classes=4)), tmp_path / "a.safetensors")


def test_an_onnx_file_of_a_packed_model_holds_the_bits_and_agrees(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 128, 3), BinaryConv2d(128, 128, 3, scaled=True), nn.Flatten(), nn.LazyLinear(2))
    net.eval()(torch.zeros(1, 3, 6, 6))
    for name, model in (("plain", net), ("packed", pack(net))):
        export_onnx(model, Preprocess((6, 6)), tmp_path / name, classes=["a", "b"])
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "packed")]
    assert sizes[0] - sizes[1] > 0.9 * 4 * 128 * 128 * 9
    import onnxruntime

    pixels = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 3), np.uint8)
    answers = []
    for name in ("plain", "packed"):
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        answers.append(session.run(["logits"], {session.get_inputs()[0].name: pixels})[0])
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)


def test_a_model_without_binary_convolutions_is_not_packed():
    with pytest.raises(InputError, match="ResNet has no binary convolutions to pack"):
        pack(create_model("small_resnet_nano", num_classes=3))


def test_a_map_smaller_than_the_filter_is_refused():
    packed = pack(BinaryConv2d(4, 2, 3))
    with pytest.raises(InputError, match="a map of 2 x 5 is smaller"), torch.no_grad():
        packed(torch.randn(1, 4, 2, 5))


def test_other_paddings_are_refused():
    with pytest.raises(InputError, match="cannot pad by 'same'"):
        BinaryConv2d(3, 3, 3, padding="same")
    with pytest.raises(InputError, match="'circular'"):
        BinaryConv2d(3, 3, 3, padding=1, padding_mode="circular")
