"""Images: pixels as the original's, files that are refused from their header, paths that lead nowhere else."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.images import ImageError, check_image, load_image, resolve_image

MakeData = Callable[..., DataConfig]


@pytest.fixture
def limits(make_data: MakeData) -> DataConfig:
    return make_data([])


def png(width: int, height: int, bits: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    """A PNG whose header says this size; `data` None: no pixels at all."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = b"" if data is None else chunk(b"IDAT", zlib.compress(data))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("policy", ["square", "pad"])
def test_pixels_are_the_originals(each_golden: Path, golden_pixels: dict[str, np.ndarray], limits: DataConfig, policy: str) -> None:
    expected = {key: value for key, value in golden_pixels.items() if f"/{policy}/" in key}
    assert len(expected) >= 16
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    as_column = [np.array(values, np.float32)[:, None, None] for values in (mean, std)]
    for key, value in expected.items():
        size, _, name = key.split("/")
        pixels = load_image(each_golden / "pixels" / "images" / name, policy, ImageSpec(int(size), 1, mean, std), limits)
        assert (pixels.dtype, pixels.shape) == (np.uint8, (3, int(size), int(size)))
        normalised = (pixels.astype(np.float32) / np.float32(255) - as_column[0]) / as_column[1]
        assert np.abs(normalised - value).max() == 0.0, key


def test_all_golden_images_pass_the_check(each_golden: Path, limits: DataConfig) -> None:
    assert [check_image(path, limits) for path in sorted((each_golden / "pixels" / "images").iterdir())] == [None] * 16


def one_colour(path: Path, limits: DataConfig) -> tuple[int, ...]:
    spec = ImageSpec(8, 1, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    assert check_image(path, limits) is None
    pixels = load_image(path, "square", spec, limits)
    values = {tuple(int(v) for v in pixels[:, y, x]) for y in range(8) for x in range(8)}
    assert len(values) == 1
    return values.pop()


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def palette_with_transparency() -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return saved(image, "PNG", transparency=b"\x00\x80")


VALUES = {
    "grey": (saved(Image.new("L", (8, 8), 77), "PNG"), (77, 77, 77)),
    "one bit": (saved(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
    "grey with alpha": (saved(Image.new("LA", (8, 8), (77, 0)), "PNG"), (77, 77, 77)),
    "transparent red": (saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), (255, 0, 0)),
    "palette with transparency": (palette_with_transparency(), (10, 20, 30)),
    "16-bit grey, half": (saved(Image.new("I;16", (8, 8), 0x8000), "PNG"), (128, 128, 128)),
    "16-bit grey, dark": (saved(Image.new("I;16", (8, 8), 0x01FF), "PNG"), (1, 1, 1)),
    "16-bit grey, white": (saved(Image.new("I;16", (8, 8), 0xFFFF), "PNG"), (255, 255, 255)),
    "16-bit colour": (png(8, 8, 16, 2, (b"\0" + b"\x80\xff\x40\x00\x01\x02" * 8) * 8), (128, 64, 1)),
    "CMYK": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "animation": (animation(), (255, 0, 0)),
    "webp": (saved(Image.new("RGB", (8, 8), (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3)),
    "bmp": (saved(Image.new("RGB", (8, 8), (1, 2, 3)), "BMP"), (1, 2, 3)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", VALUES)
def test_the_table_of_values(tmp_path: Path, limits: DataConfig, name: str) -> None:
    data, colour = VALUES[name]
    path = tmp_path / "image"
    path.write_bytes(data)
    assert one_colour(path, limits) == colour


def test_rotation_in_exif_is_not_applied(tmp_path: Path, limits: DataConfig, spec: ImageSpec) -> None:
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.png").write_bytes(saved(image, "PNG", exif=exif))
    (tmp_path / "plain.png").write_bytes(saved(image, "PNG"))
    turned, plain = (load_image(tmp_path / name, "pad", spec, limits) for name in ("turned.png", "plain.png"))
    assert (turned == plain).all()
    assert (int(plain[0, 28, 0]), int(plain[0, 28, 55]), int(plain[0, 0, 0])) == (255, 0, 122)


BAD = {
    "empty": (b"", "image_bytes"),
    "HTML": (b"<!DOCTYPE html><html>404</html>", "image_format"),
    "TIFF of floats": (saved(Image.new("F", (8, 8), 0.5), "TIFF"), "image_format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_format"),
    "half a header": (b"\x89PNG\r\n\x1a\n\x00\x00", "image_unreadable"),
    "1 x 1": (png(1, 1, data=b"\0\0"), "image_side"),
    "3 x 3": (png(3, 3, data=b"\0\0\0\0" * 3), "image_side"),
    "20000 x 1": (png(20000, 1, data=b"\0" * 20001), "image_side"),
    "1 x 20000": (png(1, 20000, data=b"\0\0" * 20000), "image_side"),
    "20000 x 4": (png(20000, 4), "image_aspect"),
    "9000 x 9000 in a few bytes": (png(9000, 9000, 1), "image_pixels"),
    "13000 x 13000": (png(13000, 13000, 1), "image_pixels"),
    "2 thousand million pixels": (png(50000, 50000, 1), "image_pixels"),
    "a PNG cut off": (saved(Image.effect_noise((64, 64), 50), "PNG")[:-600], "image_truncated"),
    "a JPEG cut off": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:-600], "image_truncated"),
    "a BMP cut off": (saved(Image.new("RGB", (64, 64)), "BMP")[:-600], "image_truncated"),
    "a WebP cut off": (saved(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")[:-600], "image_unreadable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(tmp_path: Path, limits: DataConfig, spec: ImageSpec, name: str) -> None:
    data, reason = BAD[name]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    problem = check_image(path, limits)
    assert problem is not None
    assert problem.reason == reason
    with pytest.raises(ImageError) as error:
        load_image(path, "pad", spec, limits)
    assert error.value.reason == reason
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert (str(again), again.reason) == (str(error.value), reason)


def test_a_file_with_bytes_after_its_end_is_fine(tmp_path: Path, limits: DataConfig) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(Image.new("RGB", (8, 8)), "JPEG") + b"written by some camera")
    assert check_image(tmp_path / "a.jpg", limits) is None


def test_the_limits_are_the_settings(tmp_path: Path, make_data: MakeData) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(Image.effect_noise((40, 20), 50), "PNG"))
    tight = {"max_image_bytes": 100, "max_image_pixels": 799, "min_image_side": 21, "max_image_aspect": 1.9}
    for key, value in tight.items():
        problem = check_image(path, make_data([], **{key: value}))
        assert problem is not None, key
        assert f"data.{key}" in problem.detail


def test_no_memory_is_spent_on_bombs(tmp_path: Path) -> None:
    """The peak memory of a process that checks them grows by at most 32 MiB. The 20000 x 1 pixels would pad to 1.2 GB."""
    (tmp_path / "bomb.png").write_bytes(png(20000, 20000, 1, data=b"\0" * 2501 * 20000))
    (tmp_path / "thin.png").write_bytes(png(20000, 1, data=b"\0" * 20001))
    webp = bytearray(saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    # Width and height less one, 14 bits each, after the signature of the lossless stream.
    webp[21:25] = struct.pack("<I", 15999 | 11999 << 14)
    (tmp_path / "bomb.webp").write_bytes(webp)
    code = """
import resource, sys
from pathlib import Path
from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.images import ImageError, check_image, load_image
data = DataConfig(records=Path("r"), image_policy="pad", template="v1", group_by_modality=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    print(check_image(path, data).reason)
    try:
        load_image(path, "pad", ImageSpec(336, 576, (0.5,) * 3, (0.5,) * 3), data)
    except ImageError as error:
        print(error.reason)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    paths = [str(tmp_path / name) for name in ("bomb.png", "thin.png", "bomb.webp")]
    out = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout.split()
    assert out[:6] == ["image_pixels"] * 2 + ["image_side"] * 2 + ["image_pixels"] * 2
    assert int(out[6]) < 32 * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    data = saved(Image.new("RGB", (8, 8)), "PNG")
    (folder / "sub" / "a.png").write_bytes(data)
    (tmp_path / "images-secret").mkdir()
    (tmp_path / "images-secret" / "a.png").write_bytes(data)
    (folder / "out.png").symlink_to(tmp_path / "images-secret" / "a.png")
    (folder / "outside").symlink_to(tmp_path / "images-secret")
    (folder / "inside.png").symlink_to(folder / "sub" / "a.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    return folder.resolve()


@pytest.mark.parametrize("path", ["sub/a.png", "inside.png", "sub/../sub/a.png", "./sub//a.png"])
def test_paths_inside_are_followed(root: Path, path: str) -> None:
    assert resolve_image(root, path) == root / "sub" / "a.png"


@pytest.mark.parametrize(
    "path",
    [
        "",
        " ",
        "/etc/passwd",
        "../images-secret/a.png",
        "sub/../../images-secret/a.png",
        "out.png",
        "outside/a.png",
        "a\0.png",
        "\ud800.png",
        "..",
    ],
)
def test_paths_that_lead_out_are_refused(root: Path, path: str) -> None:
    with pytest.raises(BadRecord) as problem:
        resolve_image(root, path)
    assert problem.value.reason == "image_path"


@pytest.mark.parametrize("path", ["out.png", "outside/a.png"])
def test_links_out_are_followed_when_the_user_says_so(root: Path, path: str) -> None:
    assert resolve_image(root, path, follow_links=True) == root.parent / "images-secret" / "a.png"
    with pytest.raises(BadRecord, match=r"data\.follow_links=true"):
        resolve_image(root, path)


@pytest.mark.parametrize("path", ["../images-secret/a.png", "outside/../images-secret/a.png", "/etc/passwd"])
def test_no_path_climbs_out_even_so(root: Path, path: str) -> None:
    with pytest.raises(BadRecord):
        resolve_image(root, path, follow_links=True)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.png", "image_not_found"),
        ("sub/a.png/b.png", "image_not_found"),
        ("sub", "image_not_a_file"),
        ("pipe.png", "image_not_a_file"),
        ("loop.png", "image_not_a_file"),
        ("x" * 300, "image_not_a_file"),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(root: Path, limits: DataConfig, path: str, reason: str) -> None:
    problem = check_image(resolve_image(root, path), limits)
    assert problem is not None
    assert problem.reason == reason


def test_a_device_is_no_file(limits: DataConfig) -> None:
    problem = check_image(Path("/dev/zero"), limits)
    assert problem is not None
    assert problem.reason == "image_not_a_file"
