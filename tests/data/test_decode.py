import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vitrail.data import decode as module
from vitrail.data.decode import UnreadableImage, decode, decode_array
from vitrail.errors import VitrailError

FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX", "DDS", "QOI"]


def photo(height=40, width=56, seed=0):
    """Smooth colours, so that lossy formats come close."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(6, 15) + y / rng.uniform(6, 15) + rng.uniform(0, 6)) for _ in range(3)]
    return np.rint(127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def encode(image, kind, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(header, data, *chunks):
    """A PNG written by hand: kinds that Pillow does not write."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    body = b"".join(chunk(name, data) for name, data in chunks)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def pixels(blob, **options):
    image = decode(blob, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def gap(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


RAMP = np.linspace(0, 65535, 32 * 24).astype(np.uint16).reshape(24, 32)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("values", [RAMP, RAMP // 5 + 300], ids=["full", "dark"])
def test_16_bit_grey_is_divided_by_257_neither_clipped_nor_stretched(kind, values):
    assert np.abs(pixels(encode(values, kind)) - values[..., None] / 257).max() <= 0.51


@pytest.mark.parametrize("values", [RAMP, RAMP // 5 + 300], ids=["full", "dark"])
def test_32_bit_integers_in_16_bit_range_are_divided_by_257(values):
    assert np.abs(pixels(encode(values.astype(np.int32), "TIFF")) - values[..., None] / 257).max() <= 0.51


def test_wider_integers_are_stretched():
    values = RAMP.astype(np.int32) * 1000 - 5_000_000
    assert np.abs(pixels(encode(values, "TIFF")) - RAMP[..., None] / 257).max() <= 0.51


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 127.5), (100.0, 100.0)])
def test_floats_within_0_to_1_or_0_to_255_are_not_stretched(factor, expected):
    values = RAMP.astype(np.float32) / 65535 * np.float32(factor)
    assert abs(pixels(encode(values, "TIFF")).max() - expected) <= 0.51


@pytest.mark.parametrize(("scale", "shift"), [(1 / 65535, 0), (255 / 65535, 0), (3.0, -10.0)])
def test_float_ranges(scale, shift):
    values = RAMP.astype(np.float32) * np.float32(scale) + np.float32(shift)
    assert np.abs(pixels(encode(values, "TIFF")) - RAMP[..., None] / 257).max() <= 0.52


def test_floats_that_are_not_finite_become_black():
    values = RAMP.astype(np.float32) / 65535
    values[0, 0], values[5, 5] = np.nan, np.inf
    result = pixels(encode(values, "TIFF"))
    assert (result[0, 0] == 0).all() and (result[5, 5] == 0).all() and result.max() == 255
    assert not pixels(encode(np.full((4, 4), np.nan, np.float32), "TIFF")).any()


def test_cmyk_comes_out_in_its_colours():
    image = photo()
    cmyk = Image.fromarray(image).convert("CMYK")
    assert gap(pixels(encode(cmyk, "TIFF")), image) <= 1
    assert np.abs(pixels(encode(cmyk, "JPEG", quality=95)) - image).mean() < 3  # Pillow writes Adobe's inverted kind


def test_ycck_jpeg():
    # The transform flag of the Adobe segment says that the four components are YCCK: made from a CMYK file whose
    # components are set so that the conversion is known: Y = 128, Cb = Cr = 128 is a mid grey.
    grey = Image.merge("CMYK", [Image.new("L", (16, 16), value) for value in (127, 127, 127, 0)])
    blob = encode(grey, "JPEG", quality=100)
    place = blob.index(b"Adobe") + 11
    assert blob[place] == 0
    ycck = blob[:place] + b"\2" + blob[place + 1 :]
    assert Image.open(io.BytesIO(ycck)).mode == "CMYK"
    assert np.abs(pixels(ycck) - 127).max() <= 3


def test_palette_with_and_without_transparency():
    palette = Image.fromarray(photo()).quantize(32)
    expected = np.asarray(palette.convert("RGB"))
    assert gap(pixels(encode(palette, "PNG")), expected) == 0
    result = pixels(encode(palette, "PNG", transparency=3), background=(1, 2, 3))
    hole = np.asarray(palette) == 3
    assert hole.any() and (result[hole] == (1, 2, 3)).all()
    assert gap(result[~hole], expected[~hole]) == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_the_background(kind):
    image = photo()
    alpha = np.zeros((*image.shape[:2], 1), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 128, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    result = pixels(encode(np.concatenate([image, alpha], 2), kind, **options), background=(200, 100, 0))
    share = alpha / 255
    assert np.abs(result - (image * share + np.array((200, 100, 0)) * (1 - share))).max() <= 1


def test_grey_with_alpha_and_transparent_grey():
    grey = photo()[..., 0]
    alpha = np.where(np.arange(grey.shape[1]) < 20, 0, 255).astype(np.uint8) + np.zeros_like(grey)
    result = pixels(encode(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG"))
    assert (result[:, :20] == 255).all() and gap(result[:, 20:], grey[:, 20:, None]) == 0
    result = pixels(encode(grey, "PNG", transparency=int(grey[3, 3])), background=(9, 8, 7))
    assert (result[grey == grey[3, 3]] == (9, 8, 7)).all()


def test_transparent_colour_of_16_bit_files():
    values = np.array([[0, 30000], [65535, 257]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    grey = png(struct.pack(">IIBBBBB", 2, 2, 16, 0, 0, 0, 0), rows, (b"tRNS", struct.pack(">H", 30000)))
    assert pixels(grey, background=(1, 2, 3)).tolist() == [[[0] * 3, [1, 2, 3]], [[255] * 3, [1] * 3]]
    colours = np.array([[[1000, 2000, 60000], [65535, 65535, 0]]], ">u2")
    rows = b"\0" + colours.tobytes()
    key = struct.pack(">HHH", 1000, 2000, 60000)
    colour = png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), rows, (b"tRNS", key))
    assert pixels(colour, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [255, 255, 0]]]


def test_one_bit_and_grey():
    bits = photo()[..., 0] > 127
    assert gap(pixels(encode(Image.fromarray(bits), "PNG")), bits[..., None] * 255) == 0
    grey = photo()[..., 0]
    assert gap(pixels(encode(grey, "PNG")), grey[..., None]) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind, orientation):
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    blob = encode(image, kind, exif=exif, **lossless)
    # What a viewer shows, written with numpy.
    turned = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(image, 1),
    }[orientation]
    assert pixels(blob).shape == turned.shape
    assert gap(pixels(blob), turned) <= (4 if kind == "JPEG" else 0)
    assert gap(decode_array(blob), pixels(blob)) == 0
    assert gap(ImageOps.exif_transpose(decode(blob)), pixels(blob)) == 0  # no tag is left to turn it again


def test_damaged_exif_does_not_lose_the_image():
    blob = encode(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert pixels(blob).shape == photo().shape


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        blob = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert gap(pixels(blob), frames[0]) <= (40 if kind == "GIF" else 0), kind


def test_colour_profile_is_ignored():
    image = photo()
    assert gap(pixels(encode(image, "PNG", icc_profile=b"not a profile")), image) == 0


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_is_refused(kind):
    blob = encode(photo(), kind)
    decode(blob)
    for share in (0.1, 0.5, 0.8):
        with pytest.raises(UnreadableImage):
            decode(blob[: int(len(blob) * share)])


def test_reasons():
    blob = encode(photo(), "JPEG")
    cases = {
        "truncated": blob[: len(blob) // 2],
        "zero bytes": b"",
        "not an image": b"hello, I am a text file",
    }
    for words, bad in cases.items():
        with pytest.raises(UnreadableImage, match=words) as caught:
            decode(bad)
        assert isinstance(caught.value, VitrailError)
        assert "\n" not in caught.value.reason and len(caught.value.reason) < 160


def test_postscript_is_not_run():
    with pytest.raises(UnreadableImage, match="not an image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_bombs_are_refused_by_the_header():
    # 60,000 x 60,000 in 70 bytes; decoded, it would need 10 GB.
    bomb = png(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"\0")
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode(bomb, max_pixels=10**12)
    large = png(struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0), b"\0")
    with pytest.raises(UnreadableImage, match=r"12000 x 12000 .* data.max_pixels = 100000000"):
        decode(large)
    with pytest.raises(UnreadableImage, match="max_pixels = 100"):
        decode(encode(photo(), "JPEG"), max_pixels=100)
    with pytest.raises(UnreadableImage, match="max_pixels = 100"):
        decode_array(encode(photo(), "JPEG"), max_pixels=100)


@pytest.mark.parametrize(
    "error", [struct.error("x"), SyntaxError(), MemoryError(), RecursionError("deep"), ValueError("a\nb"), KeyError(3)]
)
def test_whatever_a_decoder_raises(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(module.Image, "open", fail)
    with pytest.raises(UnreadableImage) as caught:
        decode(b"anything")
    assert caught.value.reason and "\n" not in caught.value.reason


def test_warnings_are_silent_here_and_untouched_elsewhere(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # 40 x 56 is more: a warning, up to twice that
    blob = encode(photo(), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        threads = [threading.Thread(target=lambda: [decode(blob) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert decode(blob).size == (56, 40)
        assert warnings.filters == before
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(blob))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays(shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    result = pixels(values, background=(0, 0, 0))
    assert result.shape == (5, 7, 3)
    if shape[2:] == (4,):
        expected = values[..., :3] * (values[..., 3:] / 255)
    else:
        expected = values.reshape(5, 7, -1) + np.zeros(3)
    assert np.abs(result - expected).max() <= 1
    assert gap(decode_array(values, background=(0, 0, 0)), result) == 0


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_that_are_no_images(values):
    for function in (decode, decode_array):
        with pytest.raises(UnreadableImage):
            function(values)


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (40, 56), (127, 64)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("subsampling", [0, 1, 2, "grey", "rgb"])
def test_quick_jpeg_has_the_same_pixels(size, options, subsampling):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    if subsampling == "grey":
        blob = encode(image[..., 0], "JPEG", **options)
    elif subsampling == "rgb":
        blob = encode(image, "JPEG", keep_rgb=True, **options)
    else:
        blob = encode(image, "JPEG", subsampling=subsampling, **options)
    assert module._common_jpeg(blob, 10**6) is not None, "the quick way was not taken"
    assert np.array_equal(decode_array(blob), pixels(blob))


VALID = {kind: encode(photo(24, 20), kind) for kind in FORMATS}
VALID["16-bit"] = encode(RAMP, "PNG")
VALID["palette"] = encode(Image.fromarray(photo(24, 20)).quantize(8), "PNG", transparency=1)
VALID["animated"] = encode(
    Image.fromarray(photo()), "GIF", save_all=True, append_images=[Image.fromarray(photo(seed=1))]
)
VALID["exif"] = encode(photo(24, 20), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")


def outcome(function, blob):
    try:
        return np.asarray(function(blob, max_pixels=4_000_000))
    except UnreadableImage as error:
        assert error.reason and "\n" not in error.reason
        return None


@settings(max_examples=600)
@given(data=st.data())
def test_only_unreadable_image_escapes(data):
    blob = bytearray(VALID[data.draw(st.sampled_from(sorted(VALID)))])
    for _ in range(data.draw(st.integers(1, 6))):
        # Headers are short and at the front: half of the changes go there.
        place = data.draw(st.integers(0, min(len(blob), 64) - 1) | st.integers(0, len(blob) - 1))
        blob[place] = data.draw(st.integers(0, 255))
    blob = bytes(blob[: data.draw(st.just(len(blob)) | st.integers(0, len(blob)))])
    slow, quick = outcome(decode, blob), outcome(decode_array, blob)
    assert (slow is None) == (quick is None)
    assert slow is None or np.array_equal(slow, quick)


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_random_bytes(blob):
    assert outcome(decode, blob) is None or blob
