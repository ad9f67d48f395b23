"""Pictures, as opposed to videos. Pillow decodes them."""

import base64
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base.find.media import Modality, NotOfModality, Shown
from trainer.errors import DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Generator

    from trainer.config.data import Data

_MOST_PIXELS = 2**27
_MOST_KEPT = 2**28  # more than a compilation takes
# Pillow reads more formats, some of which it gives to other programs, such as EPS to Ghostscript.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF"),
    *("WEBP",),
)
_DEEP_COLOURS = ("I", "F")


class Size(NamedTuple):
    """Height and width in pixels, after a picture was turned as its EXIF says."""

    height: int
    width: int

    @property
    def modality(self) -> Modality:
        return STILL


class Still:
    """Pictures, as `Modality`."""

    number = 0
    noun = "picture"
    kind = "image"
    fields: tuple[str, ...] = ("images", "image")
    parts: tuple[str, ...] = ("image", "image_url")
    endings: tuple[str, ...] = (
        *("jpg", "jpeg", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "avif", "ico"),
        *("jp2", "j2k", "jpx", "pcx", "qoi", "sgi", "tga", "mpo"),
    )
    tag = "<image>"
    smaller_by: tuple[str, ...] = ("data.images.max_pixels",)
    held: tuple[str, ...] = ("bytes", "base64", "image", "path", "url", "image_url")
    usual = Size(1024, 1024)
    small = Size(64, 96)
    tried: Sequence[tuple[Any, ...]] = ((Size(64, 96),), (Size(112, 64), Size(96, 160)), ())

    def check(self, content: bytes) -> None:
        size_of(content)

    def shape_of(self, content: bytes, data: "Data", processor: Any) -> Size:
        return Size(*data.images.limited(size_of(content)))

    def made(self, given: Mapping[str, Any]) -> None:
        return None

    def joined(self, pictures: Iterable[bytes]) -> None:
        return None

    def numbers(self, shape: Size) -> tuple[int, int]:
        return shape.height, shape.width

    def kept(self, first: int, second: int) -> Size:
        if not 0 < first * second <= _MOST_KEPT:
            raise ValueError(f"{second} x {first} pixels")
        return Size(first, second)

    def length(self, shape: Size) -> None:
        return None

    def shown(self, content: bytes, kept: Size, processor: Any) -> Shown:
        return Shown(kept, decoded(content, kept))

    def blank(self, shape: Size) -> Shown:
        from PIL import Image

        return Shown(shape, Image.new("RGB", (shape.width, shape.height)))

    def noise(self, shape: Size, draw: "Generator") -> Shown:
        import torch
        from PIL import Image

        pixels = torch.randint(0, 256, (*shape, 3), generator=draw, dtype=torch.uint8)
        return Shown(shape, Image.fromarray(pixels.numpy()))

    def example(self, shape: Size, processor: Any) -> bytes:
        buffer = io.BytesIO()
        photo(*shape).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def arguments(self, contents: Sequence[Any], processor: Any) -> dict[str, Any]:
        return {"images": list(contents)}

    def preview(self, content: bytes) -> "Image":
        return decoded(content)

    def browsed(self, content: bytes) -> Sequence[tuple[str, bytes]]:
        return [("image", content)]  # browsers find out what it is

    def title(self, kept: Size) -> str:
        return f"picture of {kept.width} x {kept.height} pixels"

    def part(self, file: Shown) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_of(file.content)}"}}

    def beside_parts(self, files: Sequence[Shown]) -> dict[str, Any]:
        return {}


STILL = Still()
MODALITIES: dict[str, Modality] = {"image": STILL}


def png_of(picture: "Image") -> str:
    """A picture as a PNG file, in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def photo(height: int, width: int) -> "Image":
    """A picture as a camera makes it: soft shapes, and some noise."""
    import torch
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    soft = torch.randint(0, 256, (max(1, height // 32), max(1, width // 32), 3), generator=draw, dtype=torch.uint8)
    made = Image.fromarray(soft.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    noise = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    return Image.blend(made, Image.fromarray(noise.numpy()), 0.1)


def size_of(content: bytes) -> tuple[int, int]:
    """Height and width of a picture after it was turned. Decodes the whole file, because a truncated picture begins
    like a whole one.

    Raises `DataError`, with a clause, if the picture is damaged or animated, has too many pixels, or has only one row
    or column.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
                width, height = picture.size
                if width * height > _MOST_PIXELS:
                    raise DataError(f"has {width} x {height} pixels, more than the {_MOST_PIXELS:,} allowed")
                # Phones write a second picture, for a screen, into the file of a photo.
                if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
                    raise DataError(f"has {picture.n_frames} frames. Give one of them as a picture")  # type: ignore[attr-defined]
                if min(width, height) < 2:
                    raise DataError(f"has {width} x {height} pixels, in which nothing can be seen")
                if picture.mode.startswith(_DEEP_COLOURS):
                    raise DataError(
                        "has grey values of more than 8 bits, and all values above 255 would become"
                        " white. Save it with 8 bits"
                    )
                turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                picture.draft(None, (width // 8, height // 8))  # a JPEG is read whole, and decoded in part
                picture.load()
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"has too many pixels ({first_line(error)})") from error
    except UnidentifiedImageError as error:
        raise NotOfModality("is no picture that can be read") from error
    except Exception as error:  # decoders raise errors of any kind for damaged files
        raise DataError(f"is damaged ({first_line(error)})") from error
    return (width, height) if turned else (height, width)


def decoded(content: bytes, size: tuple[int, int] | None = None) -> "Image":
    """The picture as transformers' own loader gives it: turned as its EXIF says, and in red, green and blue.

    If its height and width differ from `size`, it is scaled to `size`."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            turned = ImageOps.exif_transpose(picture).convert("RGB")
    if size is None or turned.size == (size[1], size[0]):
        return turned
    return turned.resize((size[1], size[0]), Image.Resampling.BICUBIC)
