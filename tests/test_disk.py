"""A write that fails is told as what it is, in whatever class a library reports it."""

import errno

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from fastllava.disk import in_words, read_json_object, writing
from fastllava.errors import UserError

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    pa.ArrowException("Error writing bytes to file. Detail: [errno 28] No space left on device"),
    RuntimeError("basic_ios::clear: iostream error: No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_called_one_with_what_is_needed_and_free(error, tmp_path):
    with pytest.raises(OSError, match=r"(No space left on device|Disk quota exceeded) \(84\.0 GB needed, .* free in ") as found, \
            writing(tmp_path, 84 * 10**9):  # fmt: skip
        raise error
    assert found.value.errno in (errno.ENOSPC, errno.EDQUOT)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470"), OSError("512 requested and 0 written")],
    ids=["PyTorch's archive", "numpy.save"],
)
def test_a_failed_write_without_a_reason_is_judged_by_the_room_there_is(error, tmp_path):
    with pytest.raises(OSError, match="No space left"), writing(tmp_path, 10**18):
        raise error
    with pytest.raises(OSError, match="Input/output error"), writing(tmp_path, 1):
        raise error


def test_the_reason_below_is_found(tmp_path):
    def wrapped():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")  # noqa: B904 (as PyTorch does)

    with pytest.raises(OSError, match="No space left"), writing(tmp_path):
        wrapped()


@pytest.mark.parametrize("error", [UserError("x: No space left on device"), ValueError("wrong"), RuntimeError("shapes"), KeyError("k")])
def test_other_errors_pass_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as found, writing(tmp_path):
        raise error
    assert found.value is error


def test_another_failed_write_keeps_its_own_words(tmp_path):
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output error") as found, writing(tmp_path):
        raise error
    assert found.value is error


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, "{", "1", ""])
def test_json_that_is_no_object_is_a_value_error(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"."):
        read_json_object(tmp_path / "x.json")


def test_bytes_in_words():
    assert [in_words(n) for n in (12, 1500, 2 * 10**6, 84 * 10**9)] == ["12 bytes", "1.5 kB", "2.0 MB", "84.0 GB"]
