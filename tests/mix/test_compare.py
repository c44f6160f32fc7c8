"""How a given file differs from a built mix, kind by kind, and from the published counts."""

import json

import pytest
from annotation_files import whole_mix, write
from rich.console import Console

from fastllava.mix.compare import differences, kinds_in, table
from fastllava.mix.kinds import PUBLISHED, kind_of, prompt_of, prompts_of


def record(image: str | None, *questions: str) -> dict:
    turns = [{"from": role, "value": text} for question in questions for role, text in (("human", question), ("gpt", "a"))]
    return {"id": 1, **({"image": image} if image else {}), "conversations": turns}


SHORT, LETTER = "Answer the question using a single word or phrase.", "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (record("coco/train2017/1.jpg", "<image>\nTell me."), "LLaVA-Instruct"),
        (record("coco/train2017/1.jpg", f"<image>\nWhat?\n{SHORT}", "And?"), "VQAv2 and OKVQA"),
        (record("coco/train2017/1.jpg", f"<image>\nWhat?\nA. x\nB. y\n{LETTER}"), "A-OKVQA"),
        (record("coco/train2017/1.jpg", "<image>\nPlease provide a short description for this region: [0.0, 0.1, 0.2, 0.3]."), "RefCOCO"),
        (
            record("vg/VG_100K/1.jpg", "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: x."),
            "Visual Genome",
        ),
        (record("gqa/images/1.jpg", "<image>\nWhat?"), "GQA"),
        (record("ocr_vqa/images/1.jpg", "<image>\nWhat?"), "OCR-VQA"),
        (record("textvqa/train_images/1.jpg", "<image>\nProvide a one-sentence caption for the provided image."), "TextCaps"),
        (record(None, "What?"), "ShareGPT (no image)"),
        (record("00453/1.jpg", "Describe the image concisely.\n<image>"), "captions of stage 1"),
        (record("own/1.jpg", "<image>\nWhat?"), "own"),
        (record("1.jpg", "<image>\nWhat?"), "."),
    ],
)
def test_kinds_are_told_by_folder_and_prompt(given, kind):
    assert kind_of(given, prompts_of(given)) == kind


def test_prompts_have_names():
    assert prompt_of(f"<image>\nQ\n{SHORT}") == "short answer"
    assert prompt_of("Provide a one-sentence caption for the provided image.\nReference OCR token: a") == "one sentence with OCR tokens"
    assert prompt_of("Provide a one-sentence caption for the provided image.") == "one sentence"
    assert prompt_of("Q") == "none"


def test_published_counts_are_those_of_the_whole_file():
    assert sum(PUBLISHED.values()) == 665_298


def test_a_given_file_beside_a_built_one(world, made, tmp_path, working):
    records, built = made(whole_mix(world))
    same = differences(kinds_in(built.folder / "mix.json", working)[0], *kinds_in(built.folder / "mix.json", working))
    assert all(entry["given"] == entry["built"] for entry in same["kinds"].values())
    prompted = next(record for record in records if record["id"] == 25)
    prompted["conversations"][0]["value"] = "<image>\nHow many?"
    given = [*[record for record in records if record["id"] != 51606], {"no": "record"}]
    path = write(tmp_path / "given.json", given)
    found = differences(kinds_in(built.folder / "mix.json", working)[0], *kinds_in(path, working))
    assert found["broken_records"] == 1
    vqa, instruct = found["kinds"]["VQAv2 and OKVQA"], found["kinds"]["LLaVA-Instruct"]
    assert (vqa["given"]["records"], vqa["built"]["records"]) == (1, 3)
    assert (instruct["given"]["records"], instruct["built"]["records"]) == (2, 1)
    assert vqa["built"]["questions_by_prompt"] == {"none": 1, "short answer": 3}
    assert found["kinds"]["GQA"]["given"] == found["kinds"]["GQA"]["built"]
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found))
    shown = " ".join(console.export_text().split())
    assert "VQAv2 and OKVQA records 1 3 -2" in shown
    assert "GQA records 2 2 equal" in shown


def test_a_given_file_beside_what_was_published(tmp_path, working):
    path = write(tmp_path / "given.json", [record("gqa/images/1.jpg", f"<image>\nQ\n{SHORT}", "R")])
    found = differences(None, *kinds_in(path, working))
    assert set(found["kinds"]) == set(PUBLISHED)
    assert found["kinds"]["GQA"]["published"] == 72_140
    assert found["kinds"]["GQA"]["given"]["records_by_questions"] == {"2": 1}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found))
    assert "GQA records 1 72,140 -72,139" in " ".join(console.export_text().split())
    assert json.loads(json.dumps(found)) == found
