"""From the bytes of a file, whatever they are, to an RGB image, or to one short reason why not."""

from __future__ import annotations

import io
import threading
import warnings
from types import TracebackType

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vitrail.errors import VitrailError

# Raster formats that Pillow decodes itself. EPS, WMF and the like are left out: they start other programs.
FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "WEBP",
    "AVIF",
    "TIFF",
    "BMP",
    "DIB",
    "JPEG2000",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "DDS",
    "QOI",
)
_NAMES = "jpg jpeg jpe jfif png apng bmp dib gif webp avif tif tiff ppm pgm pbm pnm pfm jp2 j2k ico tga pcx dds qoi"
IMAGE_EXTENSIONS = frozenset(f".{name}" for name in _NAMES.split())
"""How files of these formats are called."""
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(VitrailError):
    """An image that cannot be decoded; ``reason`` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Quiet:
    """Silences Pillow's warnings while at least one thread is inside.

    ``warnings.catch_warnings`` alone is not safe here: threads that leave in another order than they came would
    restore each other's filters for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._context: warnings.catch_warnings

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._context = warnings.catch_warnings()
                self._context.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._inside += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._context.__exit__(kind, error, trace)


_QUIET = _Quiet()


def decode(
    blob: bytes | np.ndarray,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = 100_000_000,
) -> Image.Image:
    """Return an upright RGB image of 8 bits per channel; safe to call from several threads.

    Grey, palette, CMYK and YCCK are converted by Pillow; a colour profile is ignored. 16-bit grey is divided by 257,
    and so are 32-bit integers within 0 to 65535. Floats are taken as 0 to 1 if all lie there, else as 0 to 255 if all
    lie there. Other integers and floats are stretched from their least to their greatest value; what is not finite
    becomes black. Of an animation the first frame is taken.

    Args:
        blob: an encoded file, or uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        background: RGB colour put behind transparent pixels, 0 to 255.
        max_pixels: an image with more pixels is refused by its header; Pillow's own limit holds as well.

    Raises:
        UnreadableImage: whatever is wrong with the image. A truncated file is refused, not decoded in part.
    """
    if isinstance(blob, np.ndarray):
        return _from_array(blob, background, max_pixels)
    if not blob:
        raise UnreadableImage("the file is empty (zero bytes)")
    try:
        with _QUIET, Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_pixels)
            image.load()
            _check_size(image.width, image.height, max_pixels)  # the picture inside an icon has a header of its own
            result = _to_rgb(image, background)
            if (orientation := _orientation(image)) in UPRIGHT:
                result = result.transpose(UPRIGHT[orientation])
    except UnreadableImage:
        raise
    except Exception as error:  # noqa: BLE001 - decoders fail in every way there is; none may stop a run
        raise UnreadableImage(_reason(error)) from None
    result.info = {}  # a second reader must not turn the image again, or apply its profile
    return result


def decode_array(
    blob: bytes | np.ndarray,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = 100_000_000,
) -> np.ndarray:
    """Return the pixels of ``decode`` as uint8 (H, W, 3), quicker for common JPEG files.

    The same libjpeg-turbo decodes either way, so the pixels are the same; what the quick way cannot do or refuses is
    left to ``decode``, which also finds the reason. The array may be read-only.

    Args:
        blob, background, max_pixels: as for ``decode``.

    Raises:
        UnreadableImage: as ``decode`` does.
    """
    if isinstance(blob, np.ndarray) and blob.dtype == np.uint8 and blob.ndim in (2, 3) and blob.shape[2:] in ((), (3,)):
        _check_size(blob.shape[1], blob.shape[0], max_pixels)
        return blob if blob.ndim == 3 else np.repeat(blob[..., None], 3, 2)
    if isinstance(blob, bytes) and blob.startswith(b"\xff\xd8\xff"):
        pixels = _common_jpeg(blob, max_pixels)
        if pixels is not None:
            return pixels
    return np.asarray(decode(blob, background=background, max_pixels=max_pixels))


def _common_jpeg(blob: bytes, max_pixels: int) -> np.ndarray | None:
    """Decode a sound, upright JPEG in colour or grey; None for any other."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(blob)
        if colours not in ("YCbCr", "RGB", "Gray") or not 0 < height * width <= max_pixels:
            return None
        if b"Exif\0" in blob or b"tiff:Orientation" in blob:  # the second is XMP, which Pillow reads as well
            with _QUIET, Image.open(io.BytesIO(blob), formats=("JPEG",)) as header:
                if _orientation(header) in UPRIGHT:
                    return None
        return simplejpeg.decode_jpeg(blob)
    except Exception:  # noqa: BLE001 - as in ``decode``, which is tried next and gives the reason
        return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UnreadableImage(f"the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels are more than data.max_pixels = {max_pixels}")


def _from_array(pixels: np.ndarray, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))):
        raise UnreadableImage(
            f"an array of {pixels.dtype} {pixels.shape} is no image; give uint8 (H, W) or (H, W, 1, 3 or 4)"
        )
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels)), background)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert from any mode; transparent pixels show the background."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = Image.fromarray(_to_bytes(values))
        transparent = image.info.get("transparency")
        if transparent is None:
            return grey.convert("RGB")
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        image = grey
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # The key colour of a 16-bit file, whose pixels Pillow has cut to their upper 8 bits.
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit, 32-bit and float grey to uint8 as ``decode`` states."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[finite].min()), float(values[finite].max())
    if values.dtype.kind == "f":
        bounds = (0.0, 1.0) if low >= 0 and high <= 1 else (0.0, 255.0)
    else:
        bounds = (0.0, 65535.0)
    if low < bounds[0] or high > bounds[1]:
        bounds = (low, high)
    scaled = (np.where(finite, values, bounds[0]).astype(np.float64) - bounds[0]) * (255 / (bounds[1] - bounds[0]))
    return np.rint(scaled).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - a damaged tag is no reason to lose the pixels
        return 1


def _reason(error: Exception) -> str:
    """Say in one short line what a decoder's exception means."""
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format, or its header is damaged"
    if isinstance(error, Image.DecompressionBombError):
        return f"refused as a decompression bomb: {text}"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if "truncated" in text.lower() or text == "not enough image data":
        return "the file is truncated"
    return f"damaged ({type(error).__name__}: {text[:100]})" if text else f"damaged ({type(error).__name__})"
