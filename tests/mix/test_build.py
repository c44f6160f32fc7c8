"""A mix of every public format: its records, what it leaves beside them, and that training takes all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from annotation_files import picture, whole_mix, write

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.prepared import prepare
from fastllava.data.tokenizer import Tokenizer
from fastllava.disk import file_digest
from fastllava.errors import UserError
from fastllava.mix import build as module
from fastllava.mix import shelf

PROMPT = "Answer the question using a single word or phrase."


def test_every_public_format_becomes_records_of_the_released_form(world, made):
    records, built = made(whole_mix(world))
    by_source: dict[str, list] = {}
    for name, entry in built.report["sources"].items():
        by_source[name] = [records.pop(0) for _ in range(entry["records"])]

    def turns(source: str, index: int = 0) -> list[str]:
        return [turn["value"] for turn in by_source[source][index]["conversations"]]

    assert by_source["llava"][0]["image"] == "coco/train2017/000000000009.jpg"
    assert turns("vqav2") == [f"<image>\nWhat is in the box?\n{PROMPT}", "Broccoli", "Is it open?", "Yes"]
    assert turns("okvqa") == [f"<image>\nWhat is it called?\n{PROMPT}", "Pony tail"]
    assert by_source["gqa"][0]["id"] == 2354786
    assert turns("gqa") == [f"<image>\nIs the sky dark?\n{PROMPT}", "Yes", "Is it red?", "No"]
    assert by_source["gqa"][1]["image"] == "gqa/images/n161313.jpg"
    letters = [turns("aokvqa", n)[1] for n in range(4)]
    assert letters == ["D", "C", "B", "A"]
    quoted = "A. train\nB. delivery\nC. cab\nD. skateboarder\nAnswer with the option's letter from the given choices directly."
    assert turns("aokvqa", 1)[0] == f"<image>\nWhat is the man awaiting?\n{quoted}"
    assert turns("ocr_vqa") == [f"<image>\nWho wrote this book?\n{PROMPT}", "Sandra Boynton", "Is it a comedy?", "No"]
    asked = "<image>\nProvide a one-sentence caption for the provided image.\nReference OCR token: STOP, here"
    assert turns("textcaps") == [asked, "A sign."]
    assert len(turns("vg")) == 20
    assert len(by_source["refcoco"]) == 1
    assert by_source["sharegpt"][0]["id"] == "wgByO4Y"
    assert turns("sharegpt")[1] == "It has **two** divisors."
    assert turns("sqa")[0].endswith("\n<image>")
    assert records == []


def test_prepare_takes_every_record(world, made, tmp_path, golden):
    given = {**whole_mix(world), "tokenizer": str(golden / "tokenizer"), "order": "shuffled"}
    _, built = made(given)
    data = DataConfig(
        records=built.folder / "mix.json",
        images=world / "images",
        image_policy="pad",
        template="v1",
        group_by_modality=False,
        prepared_dir=tmp_path / "prepared",
        workers=0,
        max_quarantined_share=0.0,
    )
    spec = ImageSpec(56, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    prepared = prepare(data, Tokenizer.load(golden / "tokenizer"), spec, report=lambda _: None)
    assert len(prepared) == built.report["records"] == 17
    assert (prepared.folder / "quarantine.jsonl").read_text() == ""


def test_the_report_counts_and_the_manifest_hashes(world, made, golden):
    records, built = made({**whole_mix(world), "tokenizer": str(golden / "tokenizer")})
    report = json.loads((built.folder / "report.json").read_text())
    assert report == json.loads(json.dumps(built.report))
    sources = report["sources"]
    assert sum(entry["records"] for entry in sources.values()) == report["records"] == len(records)
    assert sum(entry["turns"] for entry in sources.values()) == sum(len(record["conversations"]) for record in records)
    tokenizer = Tokenizer.load(golden / "tokenizer")
    text = lambda record: [turn["value"].replace("<image>", "") for turn in record["conversations"]]  # noqa: E731
    assert sources["llava"]["tokens"] == sum(len(tokenizer.encode(part)) for part in text(records[0]))
    assert sources["ocr_vqa"]["dropped"] == {"other_split": 1}
    assert sources["vg"]["dropped"] == {"per_image": 2}
    assert sources["sharegpt"]["dropped"] == {"sharegpt_short": 1}
    assert sources["vqav2"]["questions_by_prompt"] == {"none": 1, "short answer": 2}
    manifest = json.loads((built.folder / "manifest.json").read_text())
    (entry,) = manifest["inputs"]["gqa"]
    assert entry["sha256"] == file_digest(world / "data" / "gqa.json")
    assert manifest["outputs"]["mix.json"]["sha256"] == file_digest(built.folder / "mix.json")
    assert sorted(path.name for path in built.folder.iterdir()) == ["dropped.jsonl", "manifest.json", "mix.json", "report.json"]


def test_the_same_mix_is_the_same_bytes_and_another_seed_is_not(world, made):
    given = {**whole_mix(world), "order": "shuffled"}
    first, again, other = (made({**given, "seed": seed}, out)[1].folder / "mix.json" for seed, out in ((1, "a"), (1, "b"), (2, "c")))
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    key = lambda record: json.dumps(record["id"]) + str(record.get("image"))  # noqa: E731
    assert sorted(map(key, json.loads(first.read_text()))) == sorted(map(key, json.loads(other.read_text())))


def test_a_source_drawn_from_stays_as_it_is_when_others_come_or_go(world, made):
    given = whole_mix(world)
    regions = [source for source in given["sources"] if source["name"] in ("vg", "refcoco")]
    all_of_them, _ = made(given, "all")
    alone, _ = made({**given, "sources": regions}, "alone")
    assert alone == [record for record in all_of_them if record in alone]
    assert len(alone) == 2


def test_a_built_folder_is_kept_and_another_mix_does_not_write_over_it(world, made):
    given = whole_mix(world)
    _, built = made(given)
    before = (built.folder / "mix.json").stat().st_mtime_ns
    made(given)
    assert (built.folder / "mix.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"another mix.*choose another folder"):
        made({**given, "seed": 5})
    (built.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        made(given)


@pytest.mark.parametrize("wrong", ["expect", "bad", "none"])
def test_a_build_that_fails_leaves_nothing(world, made, tmp_path, wrong):
    gqa = json.loads((world / "data" / "gqa.json").read_text())
    if wrong == "bad":
        gqa = {str(n): {"question": "What?", "imageId": "1"} for n in range(20)}
    elif wrong == "none":
        gqa = {"1": {"question": "What?", "imageId": "1"}}
    path = write(tmp_path / "gqa.json", gqa)
    source = {"name": "gqa", "format": "gqa", "files": {"questions": str(path)}, **({"expect": 3} if wrong == "expect" else {})}
    said = {
        "expect": "2 records, and expect says 3",
        "bad": "20 of 20 annotations are bad, most often field.*'answer' is missing",
        "none": "not one record is left.*'answer' is missing",
    }
    with pytest.raises(UserError, match=said[wrong]):
        made({"sources": [source]})
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_missing_image_is_dropped_by_name_kept_or_the_end(tmp_path, made):
    rows = [{"image": name, "question": "What?", "answer": "x"} for name in ("a.png", "b.png", "../c.png")]
    path = write(tmp_path / "rows.json", rows)
    picture(tmp_path / "images" / "own" / "a.png")
    source = {"name": "s", "format": "vqa", "images": "own", "files": {"rows": str(path)}}
    given = {"images": str(tmp_path / "images"), "sources": [source]}
    records, built = made(given)
    assert [record["image"] for record in records] == ["own/a.png"]
    dropped = [json.loads(line) for line in (built.folder / "dropped.jsonl").read_text().splitlines()]
    assert [(entry["reason"], entry["where"]) for entry in dropped] == [
        ("image_missing", "record b.png"),
        ("image_path", "record ../c.png"),
    ]
    assert built.report["sources"]["s"]["images_missing"] == 1
    assert [record["image"] for record in made({**given, "missing_images": "keep"}, "keep")[0]] == ["own/a.png", "own/b.png"]
    with pytest.raises(UserError, match=r"there is no image .*own/b\.png; put it there, or write missing_images: drop"):
        made({**given, "missing_images": "refuse"}, "refuse")


def test_a_sample_is_drawn_from_all_and_keeps_the_order(tmp_path, made):
    path = write(tmp_path / "rows.json", [{"image": f"{n}.png", "question": "What?", "answer": "x"} for n in range(200)])
    source = {"name": "s", "format": "vqa", "files": {"rows": str(path)}, "sample": 50}
    records, built = made({"sources": [source]})
    numbers = [int(record["image"].split(".")[0]) for record in records]
    assert len(set(numbers)) == 50
    assert numbers == sorted(numbers)
    assert max(numbers) > 100
    assert built.report["sources"]["s"]["dropped"] == {"sample": 150}
    other = made({"sources": [{**source, "seed": 9}]}, "other")[0]
    assert other != records
    rows = json.loads(path.read_text())
    write(path, [{"image": "more.png", "question": "What?", "answer": "x"}, *rows])
    more = made({"sources": [source]}, "more")[0]
    assert sum(record in records for record in more) >= 49, "a record more changes the sample by one at most"


def test_a_file_that_changes_under_the_build_is_told(tmp_path, made, monkeypatch):
    path = write(tmp_path / "rows.json", [{"image": "a.png", "question": "What?", "answer": "x"}])

    def changing(*args, **settings):
        path.write_text(path.read_text() + " ")
        return describe(*args, **settings)

    describe = module.described
    monkeypatch.setattr(module, "described", changing)
    with pytest.raises(UserError, match=r"rows\.json: changed while it was read; start again"):
        made({"sources": [{"name": "s", "format": "vqa", "files": {"rows": str(path)}}]})
    assert not (tmp_path / "out").exists()


def test_two_builds_do_not_share_a_folder(tmp_path, made):
    path = write(tmp_path / "rows.json", [{"image": "a.png", "question": "What?", "answer": "x"}])
    given = {"missing_images": "keep", "sources": [{"name": "s", "format": "vqa", "files": {"rows": str(path)}}]}
    held = "import sys; from pathlib import Path; from fastllava.disk import held_alone\n"
    held += f"file = Path({str(tmp_path / '.out.lock')!r}).open('w'); print(held_alone(file), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with pytest.raises(UserError, match=r"^--out: another process builds a mix in .*; wait for it or choose another folder$"):
            made(given)
        other.stdin.close()
    made(given)


def test_a_full_disk_is_called_one_in_sqlite_s_words_too(tmp_path, made, monkeypatch):
    kept = shelf.Table.__init__

    def small(self, path):
        kept(self, path)
        self._base.execute("PRAGMA max_page_count = 8")

    monkeypatch.setattr(shelf.Table, "__init__", small)
    rows = [{"question_id": n, "image_id": n, "question": "Q" * 100, "answers": [{"answer": "a" * 100}]} for n in range(500)]
    files = {name: str(write(tmp_path / f"{name}.json", {name: rows})) for name in ("questions", "annotations")}
    with pytest.raises(OSError, match=r"No space left on device.* free in"):
        made({"sources": [{"name": "s", "format": "okvqa", "files": files}]})
    assert not list(tmp_path.glob(".*partial"))


MEASURE = """
import resource, sys
from pathlib import Path
from rich.console import Console
from fastllava.mix.build import build
from fastllava.mix.config import load_mix
from fastllava.mix.progress import Working
build(load_mix(Path(sys.argv[1])), Path(sys.argv[2]), Working(Console(quiet=True)))
assert "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measured(folder: Path, n_questions: int) -> int:
    """Peak memory in KiB of a process that builds a mix of a GQA file with so many questions, each of some 900 bytes."""
    folder.mkdir()
    with (folder / "gqa.json").open("w") as file:
        for n in range(n_questions):
            more = {"semantic": [{"operation": "select", "argument": "x" * 60} for _ in range(8)], "fullAnswer": "It is so." * 10}
            row = {"question": f"Is number {n} there?", "imageId": str(n % 1000), "answer": "yes", **more}
            file.write(f'{"," if n else "{"}"{n}": {json.dumps(row)}')
        file.write("}")
    (folder / "mix.yaml").write_text(f"sources: [{{name: gqa, format: gqa, files: {{questions: {folder / 'gqa.json'}}}}}]")
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder / "mix.yaml"), str(folder / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_does_not_grow_with_the_file(tmp_path):
    little, more = measured(tmp_path / "little", 1_000), measured(tmp_path / "more", 21_000)
    assert (tmp_path / "more" / "gqa.json").stat().st_size > 18_000_000
    assert more - little < 12 * 1024, "KiB beyond those of a file of a twentieth"
