"""The fused block, in all its forms, against a slow loop written from its equation."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.errors import InputError, MissingExtra
from vitrail.layers import block_fusion
from vitrail.layers.block_fusion import fused_block


def given(batch, channels, height, width, hidden, group=8, side=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    weights = (draw(channels, group, side, side), draw(channels), draw(hidden, channels), draw(hidden))
    return draw(batch, channels, height, width), *weights, draw(channels, hidden), draw(channels)


def slow(x, conv, c, exp, a, prj, b, act):
    """y = x + V act(U z + a) + b, z the grouped convolution: place by place."""
    batch, channels, height, width = x.shape
    group, side = conv.shape[1:3]
    y = torch.empty_like(x)
    for image in range(batch):
        for row in range(height):
            for column in range(width):
                z = c.clone()
                for channel in range(channels):
                    first = channel // group * group
                    for i in range(side):
                        for j in range(side):
                            up, across = row + i - side // 2, column + j - side // 2
                            if 0 <= up < height and 0 <= across < width:
                                z[channel] += x[image, first : first + group, up, across] @ conv[channel, :, i, j]
                h = exp @ z + a
                h = h.clamp(min=0) if act == "relu" else h / (1 + torch.exp(-h))
                y[image, :, row, column] = x[image, :, row, column] + prj @ h + b
    return y


@pytest.mark.parametrize("form", ["layers", "depth_first"])
@pytest.mark.parametrize(
    ("shape", "act"),
    [((3, 4, 5, 3, 6, 2), "relu"), ((1, 6, 1, 4, 5, 3), "silu"), ((2, 3, 2, 2, 1, 1, 5), "relu")],
)
def test_a_fused_block_is_the_slow_loop(monkeypatch, form, shape, act):
    values = given(*shape)
    expected = slow(*values, act)
    monkeypatch.setattr(block_fusion, "CONVOLVED", 2 * 8 * values[0][0].numel())  # two images
    for places in (1, 7, 1000):
        monkeypatch.setattr(block_fusion, "HIDDEN", places * 8 * shape[4])
        before = [value.clone() for value in values]
        torch.testing.assert_close(fused_block(*values, act=act, form=form), expected, rtol=1e-10, atol=1e-10)
        assert all(torch.equal(value, same) for value, same in zip(values, before))


def test_few_hidden_values_are_held_at_a_time(monkeypatch):
    sizes = []
    real = torch.addmm

    def note(bias, left, right, **out):
        sizes.append(out["out"].numel() * 8 if len(right[0]) == 12 else 0)
        return real(bias, left, right, **out)

    monkeypatch.setattr(block_fusion.torch, "addmm", note)
    monkeypatch.setattr(block_fusion, "HIDDEN", 5 * 12 * 8)
    fused_block(*given(2, 4, 3, 7, 12, 2), form="depth_first")
    assert max(sizes) == block_fusion.HIDDEN
    assert sum(sizes) == 2 * 3 * 7 * 12 * 8


def test_other_memory_and_other_types_are_taken():
    x, *weights = given(2, 8, 3, 4, 5, dtype=torch.float32)
    expected = fused_block(x, *weights, form="layers")
    strided = torch.zeros(2, 8, 3, 8)
    strided[..., ::2] = x
    for odd in (x.contiguous(memory_format=torch.channels_last), strided[..., ::2]):
        found = fused_block(odd, *weights, form="depth_first")
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)
    half = fused_block(x.bfloat16(), *weights, form="depth_first")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, fused_block(x.bfloat16().float(), *weights, form="layers"))


def test_the_operator_is_whole_and_its_multiply_adds_are_counted():
    values = given(2, 8, 5, 3, 12, 4)
    counts = []
    for form in ("layers", "depth_first"):
        with FlopCounterMode(display=False) as counter:
            fused_block(*values, form=form)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 5 * 3 * 8 * (4 * 9 + 2 * 12)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vitrail.fused_block.default, (*values, "relu", "depth_first"), test_utils=checks)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("channels", "group", "installed", "expected"),
    [(16, 8, True, "triton"), (16, 8, False, "layers"), (272, 8, True, "layers"), (24, 3, True, "layers")],
)
def test_the_form_follows_the_device_and_the_widths(monkeypatch, channels, group, installed, expected):
    taken = []
    monkeypatch.setattr(block_fusion, "_has_triton", lambda: installed)
    monkeypatch.setattr(block_fusion, "_layers", lambda *rest: taken.append("layers"))
    monkeypatch.setattr(block_fusion, "_fused", lambda *rest: taken.append(rest[-1]))
    x, *weights = given(1, channels, 2, 2, 4, group)
    fused_block(x.as_subclass(OnGpu), *weights)
    fused_block(x, *weights)
    assert taken == [expected, "depth_first"]


INTERPRETED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_block_fusion import given
from vitrail.layers import block_fusion
from vitrail.layers.block_fusion import fused_block

block_fusion.TILE = 4
worst = []
for act, *shape in json.loads(sys.argv[2]):
    values = given(*shape, dtype=torch.float32)
    expected = fused_block(*values, act=act, form="layers")
    found = fused_block(*values, act=act, form="triton")
    worst.append(float((found - expected).abs().max() / expected.abs().max()))
print(json.dumps(worst))
"""

SHAPES = [
    # act; batch, channels, height, width, hidden, channels of a group, side of the kernel
    ("relu", 2, 24, 5, 3, 40, 8, 3),  # tiles, blocks and chunks that are not full; two images
    ("silu", 1, 80, 2, 3, 40, 4, 3),  # chunks of 32
    ("relu", 1, 16, 1, 5, 64, 16, 5),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton: it comes with CUDA")
def test_triton_agrees_with_the_layers_in_its_interpreter():
    # Triton reads the variable when it is imported, which another test may have done here.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(Path(__file__).parent), json.dumps(SHAPES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for shape, share in zip(SHAPES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert share < 1e-5, (shape, share)


def test_without_triton_it_says_where_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vitrail.layers.block_fusion_triton", None)
    block_fusion._kernels.cache_clear()
    with pytest.raises(MissingExtra, match="form = triton needs the package triton"):
        fused_block(*given(1, 8, 2, 2, 4), form="triton")
    block_fusion._kernels.cache_clear()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"act": "gelu"}, "unknown activation 'gelu'.*relu"),
        ({}, {"form": "fast"}, "unknown form .*'fast'.*depth_first"),
        ({0: torch.zeros(1, 7, 2, 2)}, {}, r"8 channels takes x of 8, not 7"),
        ({3: torch.zeros(4, 7)}, {}, r"takes exp of \(4, 8\), not \(4, 7\)"),
        ({5: torch.zeros(8, 5)}, {}, r"takes prj of \(8, 4\), not \(8, 5\)"),
        ({1: torch.zeros(8, 4, 2, 2)}, {}, r"weights \(8, 4, 2, 2\).*odd square"),
        ({1: torch.zeros(8, 3, 3, 3)}, {}, "width divides the channels"),
        ({1: torch.zeros(8, 4, 3, 5)}, {}, "odd square"),
    ],
)
def test_what_does_not_fit_is_explained(change, options, message):
    values = list(given(1, 8, 2, 2, 4))
    for place, value in change.items():
        values[place] = value
    with pytest.raises(InputError, match=message):
        fused_block(*values, **options)


@pytest.mark.parametrize(
    ("channels", "group", "message"), [(264, 8, "at most 256 channels, not 264"), (24, 24, "groups of 1.*not 24")]
)
def test_triton_refuses_what_it_cannot_hold(channels, group, message):
    with pytest.raises(InputError, match=message):
        fused_block(*given(1, channels, 1, 1, 2, group), form="triton")
