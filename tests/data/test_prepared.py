"""Prepared sets: what a row holds, when a set is used again, when it is made anew, and when it is refused."""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.config import DataConfig
from fastllava.data import prepared as module
from fastllava.data.checks import check_record
from fastllava.data.conversation import encode_record, template
from fastllava.data.prepared import PreparedSet, prepare
from fastllava.data.prepared_set import checksum_of, file_sha256
from fastllava.data.rows import fit
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

MakeData = Callable[..., DataConfig]


def record(number: int, image: bool | str = True, answer: str = "A dog.", **keys: Any) -> dict[str, Any]:
    question = "<image>\nWhat is this?" if image else "What is this?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number, "conversations": turns, **({"image": "good.png" if image is True else image} if image else {}), **keys}


class Said(list[str]):
    """A reporter that keeps what it is told."""

    def __call__(self, line: str) -> None:
        self.append(line)

    @property
    def reused(self) -> bool:
        return any("used again" in line for line in self)


def test_rows_are_the_records(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    values = [record(i, image=i % 3 > 0, answer="dog " * (i + 1)) for i in range(20)]
    data = make_data(values)
    prepared = prepare(data, tokenizer, spec, Said())
    assert len(prepared) == 20
    for i, value in enumerate(values):
        row = prepared.row(i)
        encoded = encode_record(check_record(value, i), template("v1"), tokenizer, 2048)
        assert row.ids.tolist() == encoded.ids
        assert row.supervised.tolist() == [list(span) for span in encoded.supervised]
        assert (row.id, row.shows) == (str(i), value.get("image"))
        has_image = i % 3 > 0
        assert prepared.n_images[i] == has_image
        assert prepared.n_tokens[i] == len(encoded.ids) + (15 if has_image else 0)
        assert prepared.n_supervised[i] == sum(end - begin for begin, end in encoded.supervised)
        words = 3 + has_image + i + 1
        assert prepared.length_key[i] == (words if has_image else -words)
    dtypes = [prepared.n_tokens.dtype, prepared.n_supervised.dtype, prepared.n_images.dtype, prepared.length_key.dtype, row.ids.dtype]
    assert dtypes == [np.int32, np.int32, np.int8, np.int32, np.int32]
    assert prepared.images_root == data.images
    assert prepared.manifest["image_policy"] == "pad"
    assert prepared.manifest["image_spec"] == {"size": 56, "patches": 16, "mean": list(spec.mean), "std": list(spec.std)}
    with pytest.raises(IndexError):
        prepared.row(20)


@pytest.mark.parametrize("max_tokens", [*range(30, 62), 2000])
def test_the_cut_is_that_of_the_expanded_sequence(tokenizer: Tokenizer, max_tokens: int) -> None:
    """The expansion is written out here: a list of labels in which the image takes 16 places."""
    encoded = encode_record(
        check_record(record(0, answer="a red dog near the blue house"), 0), template("mistral_instruct"), tokenizer, 2048
    )
    labels = [False] * len(encoded.ids)
    for begin, end in encoded.supervised:
        labels[begin:end] = [True] * (end - begin)
    at = encoded.ids.index(IMAGE_ID)
    whole = [*labels[:at], *[False] * 16, *labels[at + 1 :]][:max_tokens]
    fitted = fit(encoded, 16, max_tokens)
    assert fitted.n_tokens == len(whole)
    assert fitted.n_supervised == sum(whole[1:])
    assert fitted.n_images == 1
    assert fitted.truncated == (len(encoded.ids) + 15 > max_tokens)
    assert fitted.encoded.ids == encoded.ids[: len(fitted.encoded.ids)]
    assert len(fitted.encoded.ids) == max(at + 1, min(len(encoded.ids), max_tokens - 15))


def test_an_image_beyond_the_cut_is_no_image(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    value = record(0, image=False, answer="dog " * 100)
    value["conversations"] += record(0)["conversations"]
    prepared = prepare(make_data([{**value, "image": "good.png"}], max_tokens=200), tokenizer, spec, Said())
    row = prepared.row(0)
    assert (row.shows, len(row.ids), prepared.n_images[0], prepared.n_tokens[0]) == (None, 200, 0, 200)
    assert prepared.length_key[0] > 0
    assert IMAGE_ID not in row.ids
    assert prepared.manifest["truncated"] == 1


def test_supervised_tokens_that_the_image_pushes_out_are_not_counted(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    value = record(0)
    encoded = encode_record(check_record(value, 0), template("v1"), tokenizer, 2048)
    ((begin, end),) = encoded.supervised
    prepared = prepare(make_data([value], max_tokens=end + 15 - 1), tokenizer, spec, Said())
    assert prepared.n_supervised[0] == end - begin - 1
    with pytest.raises(UserError, match="nothing_supervised 1"):
        prepare(make_data([value], max_tokens=begin + 15), tokenizer, spec, Said())


def test_used_again_when_nothing_has_changed(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    first, second = Said(), Said()
    made = prepare(make_data([record(0)]), tokenizer, spec, first)
    found = prepare(make_data([record(0)]), tokenizer, spec, second)
    assert (first.reused, second.reused) == (False, True)
    assert (found.folder, found.digest) == (made.folder, made.digest)


CHANGES: dict[str, dict[str, Any]] = {
    "records": {"records": [record(0), record(1)]},
    "template": {"template": "llava_v1"},
    "policy": {"image_policy": "square"},
    "max_tokens": {"max_tokens": 1024},
    "max_image_bytes": {"max_image_bytes": 10_000},
    "max_image_pixels": {"max_image_pixels": 10_000},
    "min_image_side": {"min_image_side": 8},
    "max_image_aspect": {"max_image_aspect": 9.0},
    "legacy": {"tokenizer": True},
    "vision tower": {"spec": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_made_anew_when_something_has_changed(
    make_data: MakeData, tokenizer: Tokenizer, model_file: Path, spec: ImageSpec, name: str
) -> None:
    made = prepare(make_data([record(0)]), tokenizer, spec, Said())
    change = dict(CHANGES[name])
    other_tokenizer = Tokenizer.load(model_file, True) if change.pop("tokenizer", False) else tokenizer
    other_spec = ImageSpec(56, 4, spec.mean, spec.std) if change.pop("spec", False) else spec
    said = Said()
    anew = prepare(make_data(change.pop("records", [record(0)]), **change), other_tokenizer, other_spec, said)
    assert not said.reused
    assert anew.folder != made.folder
    assert anew.digest != made.digest


def test_workers_share_and_report_settings_change_nothing(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    made = prepare(make_data([record(0)]), tokenizer, spec, Said())
    said = Said()
    assert prepare(make_data([record(0)], workers=3, max_quarantined_share=0.5), tokenizer, spec, said).digest == made.digest
    assert said.reused


def test_the_digest_stays_when_the_files_move(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, tmp_path: Path) -> None:
    data = make_data([record(0)])
    made = prepare(data, tokenizer, spec, Said())
    assert data.images is not None
    data.images.rename(tmp_path / "elsewhere")
    moved = make_data([record(0)], images=tmp_path / "elsewhere", prepared_dir=tmp_path / "other")
    anew = prepare(moved, tokenizer, spec, Said())
    assert (anew.digest, anew.images_root) == (made.digest, tmp_path / "elsewhere")


def test_an_image_that_was_mended_is_taken_in(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = make_data([record(0), record(1, image="late.png")])
    assert len(prepare(data, tokenizer, spec, Said())) == 1
    said = Said()
    assert len(prepare(data, tokenizer, spec, said)) == 1
    assert said.reused
    assert data.images is not None
    Image.new("RGB", (9, 9)).save(data.images / "late.png")
    said = Said()
    again = prepare(data, tokenizer, spec, said)
    assert (len(again), said.reused) == (2, False)
    assert any("late.png is not what it was" in line for line in said)


@pytest.mark.parametrize("file", ["rows.arrow", "manifest.json", "quarantine.jsonl", "image_times.npy"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_set_is_made_anew(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, file: str, damage: str) -> None:
    data = make_data([record(0), record(1, image="missing.png")])
    made = prepare(data, tokenizer, spec, Said())
    content = (made.folder / file).read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        (made.folder / file).unlink()
    else:
        (made.folder / file).write_bytes(
            content[:middle] if damage == "cut" else content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        )
    said = Said()
    anew = prepare(data, tokenizer, spec, said)
    assert not said.reused
    assert (anew.folder / file).read_bytes() == content
    assert anew.row(0).ids.tolist()[0] == 1


@pytest.mark.parametrize("token", [-1, 420, 2**31 - 1])
def test_a_forged_set_with_ids_of_no_token_is_made_anew(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, token: int) -> None:
    data = make_data([record(0)])
    made = prepare(data, tokenizer, spec, Said())
    rows = made.folder / "rows.arrow"
    honest = rows.read_bytes()
    ids = made.row(0).ids.copy()
    forged = ids.copy()
    forged[-1] = token
    del made
    rows.write_bytes(honest.replace(ids.tobytes(), forged.tobytes()))
    manifest = json.loads((rows.parent / "manifest.json").read_bytes())
    manifest["rows_sha256"] = file_sha256(rows)
    (rows.parent / "manifest.json").write_text(json.dumps({**manifest, "checksum": checksum_of(manifest)}))
    said = Said()
    assert prepare(data, tokenizer, spec, said).row(0).ids.tolist() == ids.tolist()
    assert "holds token ids that the tokenizer has not" in said[0]


def test_opening_what_is_no_set_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no whole prepared set") as error:
        PreparedSet.open(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pickled_set_opens_again(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    made = prepare(make_data([record(i) for i in range(3)]), tokenizer, spec, Said())
    copy = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert len(pickle.dumps(made)) < 1000
    assert copy.digest == made.digest
    assert copy.row(2).ids.tolist() == made.row(2).ids.tolist()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        pa.ArrowException("Error writing bytes. Detail: [errno 28] No space left"),
        KeyboardInterrupt(),
    ],
)
def test_what_cannot_be_finished_gives_its_space_back(
    make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    data = make_data([record(0)])

    def stop(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(module, "sync", stop)
        with pytest.raises((UserError, KeyboardInterrupt)) as raised:
            prepare(data, tokenizer, spec, Said())
    if isinstance(error, Exception):
        assert re.match(r"data\.prepared_dir: .*No space left on device \(.* free in ", str(raised.value))
    assert data.prepared_dir is not None
    assert [path.suffix for path in data.prepared_dir.iterdir()] == [".lock"]
    assert len(prepare(data, tokenizer, spec, Said())) == 1


def test_what_a_killed_run_left_is_cleared(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = make_data([record(0)])
    made = prepare(data, tokenizer, spec, Said())
    made.folder.rename(made.folder.with_suffix(".partial"))
    (made.folder.with_suffix(".partial") / "rubbish").write_text("x")
    made = prepare(data, tokenizer, spec, Said())
    assert sorted(path.name for path in made.folder.iterdir()) == ["image_times.npy", "manifest.json", "quarantine.jsonl", "rows.arrow"]
    assert data.prepared_dir is not None
    assert not list(data.prepared_dir.glob("*.partial"))


def test_a_set_in_a_folder_that_cannot_be_written_is_used(
    make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data([record(0)])
    made = prepare(data, tokenizer, spec, Said())
    honest = Path.open

    def read_only(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "r" not in mode and path.parent == data.prepared_dir:
            raise OSError(30, "Read-only file system", str(path))
        return honest(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", read_only)
    assert data.images is not None
    os.utime(data.images / "good.png", ns=(5, 5))
    said = Said()
    assert prepare(data, tokenizer, spec, said).digest == made.digest
    assert said.reused
    with pytest.raises(UserError, match=r"data\.prepared_dir: .* cannot be used \(Read-only file system\)"):
        prepare(make_data([record(1)]), tokenizer, spec, Said())


def write_anew(path: Path, colour: tuple[int, int, int]) -> None:
    """A picture of as many bytes as another colour's, uncompressed."""
    Image.new("RGB", (40, 30), colour).save(path, "BMP")


@pytest.fixture
def pictures(make_data: MakeData, tmp_path: Path) -> Callable[..., DataConfig]:
    """Settings of twenty records, each with a picture of its own."""

    def make(**settings: Any) -> DataConfig:
        data = make_data([record(i, image=f"{i}.bmp") for i in range(20)], **settings)
        for i in range(20):
            if not (path := tmp_path / "images" / f"{i}.bmp").exists():
                write_anew(path, (i, 0, 0))
        return data

    return make


def test_a_picture_that_was_replaced_makes_another_set(pictures: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = pictures()
    made = prepare(data, tokenizer, spec, Said())
    assert data.images is not None
    write_anew(data.images / "7.bmp", (9, 9, 9))
    said = Said()
    anew = prepare(data, tokenizer, spec, said)
    assert not said.reused
    assert any("7.bmp is not what it was" in line for line in said)
    assert (len(anew), anew.digest != made.digest) == (20, True)
    # The picture of before: the digest of before, whatever the time of the file.
    write_anew(data.images / "7.bmp", (7, 0, 0))
    assert prepare(data, tokenizer, spec, Said()).digest == made.digest


def test_new_times_of_the_same_pictures_change_nothing(pictures: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = pictures()
    made = prepare(data, tokenizer, spec, Said())
    assert data.images is not None
    for path in data.images.iterdir():
        os.utime(path, ns=(1, 1))
    first, second = Said(), Said()
    found = prepare(data, tokenizer, spec, first)
    assert (found.digest, first.reused) == (made.digest, True)
    assert any("20 images have another time and the same content" in line for line in first)
    assert prepare(data, tokenizer, spec, second).row(3).stamps == found.row(3).stamps
    assert second[0].endswith("nothing has changed, used again")


def test_a_run_that_has_begun_keeps_its_set_while_few_pictures_are_bad(pictures: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = pictures(max_quarantined_share=0.1)
    made = prepare(data, tokenizer, spec, Said())
    assert data.images is not None
    (data.images / "7.bmp").unlink()
    said = Said()
    assert prepare(data, tokenizer, spec, said, keep=made.digest).digest == made.digest
    assert "1 of 20 images are not what they were when this run began, such as 7.bmp" in said[0]
    assert "the run goes on without them" in said[0]
    # Another run begins meanwhile, on what there is now; the first one still finds what it began with.
    assert prepare(data, tokenizer, spec, Said()).digest != made.digest
    assert prepare(data, tokenizer, spec, Said(), keep=made.digest).digest == made.digest
    for i in range(3):
        write_anew(data.images / f"{i}.bmp", (1, 2, 3))
    with pytest.raises(UserError, match=r"data\.images: 4 of 20 images are not what they were .* put them back") as error:
        prepare(data, tokenizer, spec, Said(), keep=made.digest)
    assert "\n" not in str(error.value)


def test_pictures_stored_on_their_side_are_counted(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = make_data([record(0), record(1, image="turned.jpg"), record(2, image="upright.jpg")])
    assert data.images is not None
    for name, orientation in (("turned.jpg", 6), ("upright.jpg", 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20)).save(data.images / name, exif=exif)
    said = Said()
    assert prepare(data, tokenizer, spec, said).manifest["turned"] == 1
    assert "1 records show a picture that its EXIF orientation would turn" in said[-1]


def test_pictures_are_held_to_a_list_of_checksums(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, tmp_path: Path) -> None:
    data = make_data([record(0), record(1, image="rotten.bmp"), record(2, image="unlisted.bmp")], image_checksums=tmp_path / "SHA256SUMS")
    assert data.images is not None
    good = hashlib.sha256((data.images / "good.png").read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{good}  good.png\n{good} *./rotten.bmp\n")
    for name in ("rotten.bmp", "unlisted.bmp"):
        write_anew(data.images / name, (1, 2, 3))
    prepared = prepare(data, tokenizer, spec, Said())
    assert (len(prepared), prepared.manifest["reasons"]) == (1, {"image_checksum": 2})
    (tmp_path / "SHA256SUMS").write_text("abc  good.png\n")
    with pytest.raises(UserError, match=r"data\.image_checksums: line 1 of .* is no line of sha256sum"):
        prepare(data, tokenizer, spec, Said())


def test_the_users_cache_is_the_default(
    make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data([record(0)], prepared_dir=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(data, tokenizer, spec, Said()).folder.parent == tmp_path / "xdg" / "fastllava" / "prepared"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare(data, tokenizer, spec, Said()).folder.parent == tmp_path / "home" / ".cache" / "fastllava" / "prepared"


def test_too_many_bad_records_stop_with_the_table_and_the_path(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    values = [record(i) for i in range(96)] + [record(96, image="a.png"), record(97, image="b.png"), record(98, conversations=[]), 5]
    said = Said()
    with pytest.raises(UserError) as error:
        prepare(make_data(values, max_quarantined_share=0.039), tokenizer, spec, said)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(
        "data.max_quarantined_share: 4 of 100 records (4.00%) are bad (image_not_found 2, no_answer 1, not_an_object 1)"
    )
    assert "write data.max_quarantined_share=0.0401" in message
    listed = Path(message.split("listed in ")[1].split(", and")[0])
    assert [json.loads(line)["index"] for line in listed.read_text().splitlines()] == [96, 97, 98, 99]
    assert "quarantined records" in said[-1]
    # At the limit it goes on.
    assert len(prepare(make_data(values, max_quarantined_share=0.04), tokenizer, spec, Said())) == 96


@pytest.mark.parametrize(("values", "says"), [([], "holds no record"), ([5, 6], "none of the 2 records is usable (not_an_object 2)")])
def test_nothing_usable_stops(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, values: list, says: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(make_data(values), tokenizer, spec, Said())
    assert str(error.value).startswith("data.records: ")
    assert says in str(error.value)


def test_any_number_of_workers_makes_the_same_bytes(
    make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL_SOURCE", 0)
    values = [record(i, image=i % 3 > 0, answer="red dog " * (i % 9 + 1)) if i % 50 else i for i in range(2500)]
    contents = []
    for workers in (0, 2):
        made = prepare(make_data(values, workers=workers, prepared_dir=tmp_path / str(workers)), tokenizer, spec, Said())
        contents.append([(made.folder / name).read_bytes() for name in ("rows.arrow", "quarantine.jsonl", "manifest.json")])
    assert contents[0] == contents[1]
    assert [made.row(i).id for i in range(3)] == ["1", "2", "3"]
    assert made.row(len(made) - 1).id == "2499"
    assert made.manifest["quarantined"] == 50


def test_a_mistake_in_a_worker_is_one_line(
    make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SMALL_SOURCE", 0)
    with pytest.raises(UserError, match=r"data\.images: is not set, and record 0 has the image 'good\.png'") as error:
        prepare(make_data([record(0)], images=None, workers=1), tokenizer, spec, Said())
    assert "\n" not in str(error.value)


def test_a_user_without_a_home_prepares_where_it_is(monkeypatch, tmp_path):
    from fastllava.data.prepared import cache_root

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.chdir(tmp_path)
    assert cache_root() == tmp_path / ".cache" / "fastllava"
