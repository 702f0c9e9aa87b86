"""The kernel of ``block_fusion``: a program takes a tile of places of one image through the whole block.

Channels lie in blocks of 16, the least depth of a tensor core's product, which hold whole groups of the convolution;
its taps are block-diagonal matrices of 16 x 16. Checked in Triton's interpreter, and compiled for NVIDIA's
architecture 90; never run or measured on a GPU.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def fused_block(
    x, out, conv, conv_bias, exp, exp_bias, prj, prj_bias, height, width, channels, hidden,
    INSIDE: tl.constexpr, SIDE: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
    SILU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write x + V act(U conv(x) + a) + b, all images (B, H, W, C) in memory."""
    kind: tl.constexpr = x.dtype.element_ty
    place = tl.arange(0, TILE * TILE)
    row, column = tl.program_id(1) * TILE + place // TILE, tl.program_id(0) * TILE + place % TILE
    image = tl.program_id(2).to(tl.int64)  # images may hold more than 2^31 values together
    block, inner = tl.arange(0, BLOCKS)[:, None, None], tl.arange(0, 16)
    taken, given = inner[None, :, None], inner[None, None, :]  # channels of a block that a tap takes and gives
    source, target = block * 16 + given, block * 16 + given
    same = (taken // INSIDE == given // INSIDE) & (target < channels)
    z = tl.zeros((BLOCKS, TILE * TILE, 16), tl.float32)
    for tap in range(SIDE * SIDE):
        y, across = row + tap // SIDE - SIDE // 2, column + tap % SIDE - SIDE // 2
        real = ((y >= 0) & (y < height) & (across >= 0) & (across < width))[None, :, None] & (source < channels)
        pixels = tl.load(x + ((image * height + y) * width + across)[None, :, None] * channels + source, real, 0.0)
        taps = tl.load(conv + (target * INSIDE + taken % INSIDE) * SIDE * SIDE + tap, same, 0.0)
        z += tl.dot(pixels, taps, input_precision=PRECISION)
    channel = tl.arange(0, BLOCKS * 16)
    wide = channel < channels
    z = tl.reshape(tl.permute(z, (1, 0, 2)), (TILE * TILE, BLOCKS * 16))
    z = (z + tl.load(conv_bias + channel, wide, 0.0)[None, :]).to(kind)
    total = tl.zeros((TILE * TILE, BLOCKS * 16), tl.float32)
    for start in range(0, hidden, CHUNK):
        unit = start + tl.arange(0, CHUNK)
        deep = unit < hidden
        up = tl.load(exp + unit[None, :] * channels + channel[:, None], deep[None, :] & wide[:, None], 0.0)
        h = tl.dot(z, up, input_precision=PRECISION) + tl.load(exp_bias + unit, deep, 0.0)[None, :]
        h = h * tl.sigmoid(h.to(tl.float32)) if SILU else tl.maximum(h, 0.0)
        down = tl.load(prj + channel[None, :] * hidden + unit[:, None], deep[:, None] & wide[None, :], 0.0)
        total += tl.dot(h.to(kind), down, input_precision=PRECISION)
    inside = ((row < height) & (column < width))[:, None] & wide[None, :]
    cells = ((image * height + row) * width + column)[:, None] * channels + channel[None, :]
    total += tl.load(prj_bias + channel, wide, 0.0)[None, :] + tl.load(x + cells, inside, 0.0)
    tl.store(out + cells, total.to(kind), inside)
