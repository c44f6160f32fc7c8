"""Damage that Pillow decodes without a word is found from the file's own structure; whole files of each kind pass."""

import io

import numpy as np
import pytest
from PIL import Image

from fastllava.data.checks import BadRecord
from fastllava.data.damage import check_structure


def encoded(form: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, form, **options)
    return out.getvalue()


WHOLE = {
    "JPEG": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True, restart_marker_blocks=2),
    "PNG": encoded("PNG"),
    "GIF": encoded("GIF"),
    "WEBP": encoded("WEBP", quality=80),
    "lossless": encoded("WEBP", lossless=True),
    "BMP": encoded("BMP"),
}
FORMS = {"progressive": "JPEG", "lossless": "WEBP"}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("tail", [b"", b"\0" * 40, b"something that a camera wrote behind the picture"])
def test_a_whole_file_passes_whatever_follows_it(kind, tail):
    if kind == "GIF" and tail.startswith(b"some"):
        tail = b";" + tail
    check_structure(WHOLE[kind] + tail, FORMS.get(kind, kind))


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_cut_file_is_found(kind, share):
    data = WHOLE[kind]
    with pytest.raises(BadRecord) as found:
        check_structure(data[: int(len(data) * share)], FORMS.get(kind, kind))
    assert found.value.reason == "image_truncated"


def test_each_byte_of_a_png_is_covered_by_its_checksums():
    data = WHOLE["PNG"]
    for at in (20, 30, len(data) // 2, len(data) - 5):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(BadRecord):
            check_structure(bytes(changed), "PNG")


def test_a_png_whose_checksum_alone_is_wrong_is_damaged_though_it_decodes():
    end = WHOLE["PNG"].rindex(b"IEND") - 4
    data = WHOLE["PNG"][: end - 4] + bytes(4) + WHOLE["PNG"][end:]
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(BadRecord, match="image_damaged"):
        check_structure(data, "PNG")


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "WEBP"])
def test_a_tail_of_zeros_in_place_of_the_picture_is_found(kind):
    data = WHOLE[kind]
    kept = len(data) // 2
    with pytest.raises(BadRecord):
        check_structure(data[:kept] + b"\0" * (len(data) - kept), FORMS.get(kind, kind))


def test_a_second_picture_of_a_phone_does_not_matter():
    check_structure(WHOLE["JPEG"] + WHOLE["JPEG"][: len(WHOLE["JPEG"]) // 2], "MPO")
