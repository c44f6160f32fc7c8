"""Each source by itself: what its rules change, and that a bad annotation is dropped by name while the others stay."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotation_files import picture, vqa_files, write

from fastllava.errors import UserError
from fastllava.mix.instructions import LCS_558K
from fastllava.mix.pickles import read_plain_pickle


def texts(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def dropped(folder: Path) -> list[tuple[str, str]]:
    """(reason, the end of where) of what is named in dropped.jsonl."""
    entries = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return [(entry["reason"], entry["where"].rpartition("/")[2]) for entry in entries]


@pytest.fixture
def two(tmp_path):
    """The files of the VQA evaluation as the config names them."""
    return {"questions": str(tmp_path / "questions.json"), "annotations": str(tmp_path / "annotations.json")}


def test_vqa_answers_and_questions_that_do_not_meet(tmp_path, one, two):
    vqa_files(tmp_path, [(1, 5, "One?", ["a", "b", "b"]), (2, 5, "Two?", ["c"]), (3, 6, "Three?", ["d"])], False)
    annotations = json.loads(Path(two["annotations"]).read_text())
    del annotations["annotations"][0]
    annotations["annotations"] += [
        {"question_id": 1, "answers": [{"answer": "z"}]},
        {"question_id": 9, "answers": [{"answer": "z"}]},
        {"x": 1},
    ]
    write(Path(two["annotations"]), annotations)
    records = one(format="okvqa", files=two)
    assert [texts(record)[1::2] for record in records] == [["B", "C"]]
    reasons = [reason for reason, _ in dropped(tmp_path / "out")]
    assert reasons == ["twice", "field", "answer_missing", "answer_missing"]


def test_vqa_answers_that_are_chosen(tmp_path, one, two):
    vqa_files(tmp_path, [(1, 5, "One?", ["a", "b", "b"]), (2, 6, "Two?", ["c", "d", "d"])], True)
    assert [texts(record)[1] for record in one("a", format="vqav2", files=two)] == ["B", "D"]
    rules = {"answer": "first", "capitalise": False, "merge_by_image": False, "prompt_at": "none"}
    records = one("b", format="vqav2", files=two, rules=rules)
    assert [(record["id"], texts(record)) for record in records] == [(1, ["<image>\nOne?", "a"]), (2, ["<image>\nTwo?", "c"])]


def test_okvqa_answers_as_they_were_typed(tmp_path, one, two):
    answers = [{"answer": "pony tail", "raw_answer": "Pony tails"}] * 2 + [{"answer": "bun", "raw_answer": "bun"}]
    write(tmp_path / "questions.json", {"questions": [{"question_id": 1, "image_id": 2, "question": "What?"}]})
    write(tmp_path / "annotations.json", {"annotations": [{"question_id": 1, "image_id": 2, "answers": answers}]})
    assert texts(one("a", format="okvqa", files=two)[0])[1] == "Pony tail"
    assert texts(one("b", format="okvqa", files=two, rules={"answer_field": "raw_answer"})[0])[1] == "Pony tails"


def test_aokvqa_merges_by_image_and_asks_once_without_rotations(tmp_path, one):
    base = {"image_id": 7, "choices": ["w", "x", "y", "z"], "correct_choice_idx": 0}
    rows = [{**base, "question_id": str(n), "question": f"Q{n}?"} for n in range(2)]
    path = str(write(tmp_path / "aokvqa.json", [*rows, {**base, "question_id": "2", "question": "Q2?", "correct_choice_idx": 4}]))
    records = one("a", format="aokvqa", files={"questions": path})
    assert [record["id"] for record in records] == [7, "7_1", "7_2", "7_3"]
    assert [texts(record)[1::2] for record in records] == [["A", "A"], ["D", "D"], ["C", "C"], ["B", "B"]]
    assert texts(records[1])[2] == "Q1?\nA. x\nB. y\nC. z\nD. w"
    assert dropped(tmp_path / "a") == [("field", "aokvqa.json: line 1")]
    records = one("b", format="aokvqa", files={"questions": path}, rules={"rotations": False, "merge_by_image": False})
    assert [record["id"] for record in records] == ["0", "1"]


def test_one_bad_question_does_not_take_the_others_of_its_image(tmp_path, one, two):
    vqa_files(tmp_path, [(1, 5, "One?", ["a"]), (2, 5, " ", ["b"]), (3, 5, "Three <image>?", ["c"]), (4, 5, "Four?", [""])], True)
    assert [texts(record) for record in one("vqa", format="vqav2", files=two, rules={"prompt": ""})] == [["<image>\nOne?", "A"]]
    assert [reason for reason, _ in dropped(tmp_path / "vqa")] == ["empty", "image_word", "empty"]
    book = {"questions": ["Who?", "When?"], "answers": ["", "now"], "imageURL": "http://x/y.gif", "split": 1}
    path = str(write(tmp_path / "dataset.json", {"A": book}))
    assert [texts(record)[1:] for record in one("ocr", format="ocr_vqa", files={"questions": path})] == [["now"]]
    assert dropped(tmp_path / "ocr") == [("empty", "dataset.json: line 1, key 'A', question 0")]


def test_ocr_vqa_takes_a_split_and_the_file_s_ending(tmp_path, one):
    book = {"questions": ["Who?"], "answers": ["me"], "imageURL": "http://x/y.gif"}
    given = {"A": {**book, "split": 1}, "B": {**book, "split": 2}, "C": {**book, "split": 1, "answers": []}}
    path = str(write(tmp_path / "dataset.json", given))
    assert [record["image"] for record in one("a", format="ocr_vqa", files={"questions": path})] == ["A.jpg"]
    assert dropped(tmp_path / "a") == [("answer_missing", "dataset.json: line 1, key 'C'")]
    rules = {"split": "all", "extension": "", "capitalise": True}
    records = one("b", format="ocr_vqa", files={"questions": path}, rules=rules)
    assert [(record["image"], texts(record)[1]) for record in records] == [("A.gif", "Me"), ("B.gif", "Me")]


def test_textcaps_in_turns_and_without_words(tmp_path, one):
    rows = {"data": [{"image_id": "i", "caption_str": text} for text in ("One.", "Two.")]}
    files = {"captions": str(write(tmp_path / "captions.json", rows))}
    (record,) = one("a", format="textcaps", files=files, rules={"caption": "all"})
    prompt = "Provide a one-sentence caption for the provided image."
    assert texts(record) == [f"<image>\n{prompt}", "One.", prompt, "Two."]
    files["ocr"] = str(write(tmp_path / "ocr.json", {"data": []}))
    assert texts(one("b", format="textcaps", files=files)[0])[0] == f"<image>\n{prompt}\nReference OCR token: "
    assert texts(one("c", format="textcaps", files=files, rules={"ocr_line": "with_words"})[0])[0] == f"<image>\n{prompt}"


def refcoco(folder: Path, refs: Any, name: str = "refs(unc).p") -> dict[str, Any]:
    (folder / name).write_bytes(pickle.dumps(refs, protocol=2) if name.endswith(".p") else json.dumps(refs).encode())
    images = [{"id": 1, "width": 100, "height": 50}]
    annotations = [{"id": 7, "image_id": 1, "bbox": [10, 5, 20, 10.5]}, {"id": 8, "image_id": 1, "bbox": [200, 5, 20, 10]}]
    write(folder / "instances.json", {"annotations": annotations, "images": images})
    return {"sets": [{"refs": str(folder / name), "instances": str(folder / "instances.json")}]}


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json"])
def test_refcoco_is_cut_into_segments_and_names_bad_boxes(tmp_path, one, name):
    sentences = [{"sent": f"dog {n}", "raw": f"DOG {n}!"} for n in range(12)]
    ref = {"ann_id": 7, "image_id": 1, "split": "train", "sentences": sentences}
    refs = [ref, {**ref, "ann_id": 8}, {**ref, "ann_id": 9}, {**ref, "image_id": 2}, {**ref, "split": "testA"}, {**ref, "sentences": []}, 3]
    records = one(format="refcoco", files=refcoco(tmp_path, refs, name), rules={"regions": "locate"})
    assert [(record["id"], len(texts(record)) // 2) for record in records] == [(1, 9), ("1_1", 3)]
    assert texts(records[0])[1] == "[0.1, 0.3, 0.3, 0.41]"
    assert [reason for reason, _ in dropped(tmp_path / "out")] == ["box", "box", "no_size", "empty", "field"]
    rules = {"regions": "describe", "sentences": "first", "text": "raw", "fewer_than": None, "padded_square": False}
    (record,) = one("raw", format="refcoco", files=refcoco(tmp_path, refs, name), rules=rules)
    assert texts(record) == ["<image>\nPlease provide a short description for this region: [0.1, 0.1, 0.3, 0.31].", "DOG 0!"]


class Evil:
    def __reduce__(self):
        return (print, ("the pickle has run",))


@pytest.mark.parametrize("value", [Evil(), {"a": Evil()}, [Path("x")], 3, "x" * 10])
def test_a_pickle_of_more_than_plain_values_is_refused_unrun(tmp_path, one, capsys, value):
    with pytest.raises(UserError, match=r"is no pickle of plain lists.*asks for|not a list of refs"):
        one(format="refcoco", files=refcoco(tmp_path, value))
    assert "has run" not in capsys.readouterr().out


def test_a_damaged_pickle_is_refused(tmp_path):
    whole = pickle.dumps([{"a": [1, "x"]}], protocol=2)
    for damaged in (whole[:-3], b"", b"\x80\xff", b"no pickle", whole.replace(b"}", b"R")):
        (tmp_path / "refs.p").write_bytes(damaged)
        with pytest.raises(UserError, match="is no pickle of plain"):
            read_plain_pickle(tmp_path / "refs.p")


def test_visual_genome_takes_ten_and_drops_regions_by_name(tmp_path, one):
    region = {"x": 10, "y": 10, "width": 20, "height": 20}
    regions = [{**region, "phrase": f"thing {n}"} for n in range(30)]
    bad = [{**region, "phrase": " "}, {**region, "phrase": "x", "width": 0}, {"phrase": "x"}]
    given = [
        {"id": 1, "regions": [*regions, *bad]},
        {"id": 2, "regions": regions[:3]},
        {"id": 3, "regions": regions},
        {"id": 2, "regions": []},
    ]
    url = "https://host/images/VG_100K/{}.jpg"
    sizes = [{"image_id": n, "url": url.format(n), "width": 100, "height": 100} for n in (1, 2)]
    files = {"regions": str(write(tmp_path / "regions.json", given)), "images": str(write(tmp_path / "images.json", sizes))}
    records = one(format="visual_genome", files=files, images="vg", rules={"regions": "describe"})
    assert [(record["image"], len(texts(record)) // 2) for record in records] == [("vg/VG_100K/1.jpg", 10), ("vg/VG_100K/2.jpg", 3)]
    taken = [int(text.split()[1]) for text in texts(records[0])[1::2]]
    assert taken == sorted(taken)
    assert max(taken) > 9
    assert [reason for reason, _ in dropped(tmp_path / "out")] == ["empty", "box", "field", "no_size", "no_pairs"]


def test_sharegpt_is_cut_by_tokens(tmp_path, made, golden):
    said = [{"from": role, "value": f"{role} says a word or two {n}"} for n in range(8) for role in ("human", "gpt")]
    path = str(write(tmp_path / "sharegpt.json", [{"id": "x", "model": "m", "conversations": said}]))
    counts = {}
    for long in ("first_segment", "leading_pairs", "split", "keep"):
        source = {"name": "s", "format": "sharegpt", "files": {"conversations": path}, "rules": {"long": long, "max_tokens": 120}}
        records, _ = made({"tokenizer": str(golden / "tokenizer"), "sources": [source]}, long)
        counts[long] = [len(record["conversations"]) for record in records]
        assert records[0]["id"] == ("x" if long == "keep" else "x_0")
        assert records[0]["model"] == "m"
    assert counts["keep"] == [16]
    assert counts["first_segment"] == counts["leading_pairs"]
    assert 2 <= counts["first_segment"][0] < 16
    assert len(counts["split"]) > 1
    with pytest.raises(UserError, match="counts tokens, and the mix names no tokenizer; write tokenizer:"):
        made({"sources": [{"name": "s", "format": "sharegpt", "files": {"conversations": path}}]}, "none")


def test_llava_records_pass_with_all_their_keys(tmp_path, one):
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": 1, "image": "a.png", "conversations": turns, "note": "x"}, {"id": 2, "conversations": turns[1:] * 2}, {"id": 3}, 4]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    records = one(format="llava", images="own", files={"records": str(path)})
    assert records[0] == {"id": 1, "image": "own/a.png", "conversations": turns, "note": "x"}
    assert [reason for reason, _ in dropped(tmp_path / "out")] == ["not_a_record", "field"]


def test_questions_of_one_s_own_with_choices_and_many_answers(tmp_path, one):
    rows = [
        {"picture": "a.png", "q": "One?", "a": ["x", "y", "y"]},
        {"picture": "b.png", "q": "Two?", "a": 2},
        {"picture": {"bytes": "x", "path": None}, "q": "Three?", "a": "z"},
        {"picture": "c.png", "q": "Four?", "a": []},
        {"picture": "d.png", "a": "z"},
    ]
    columns = {"image": "picture", "question": "q", "answer": "a"}
    records = one("a", format="vqa", columns=columns, files={"rows": str(write(tmp_path / "rows.json", rows))})
    assert [texts(record)[1] for record in records] == ["y", "2"]
    assert [reason for reason, _ in dropped(tmp_path / "a")] == ["field", "answer_missing", "field"]
    rows = [{"image": "a.png", "question": "One?", "options": ["x", "y"], "answer": "1"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (record,) = one("b", format="vqa", columns={"choices": "options"}, files={"rows": str(tmp_path / "rows.parquet")})
    assert texts(record) == ["<image>\nOne?\nA. x\nB. y", "B"]


def test_captions_become_stage_1_records(tmp_path, one):
    rows = [{"image": f"{n}.png", "caption": [f" caption {n} ", "other"]} for n in range(200)]
    path = str(write(tmp_path / "rows.json", [*rows, {"image": "x.png", "caption": " "}]))
    records = one("a", format="captions", files={"rows": path})
    assert [texts(record)[1] for record in records] == [f"caption {n}" for n in range(200)]
    asked = [texts(record)[0] for record in records]
    assert {text.replace("<image>", "").strip() for text in asked} == set(LCS_558K)
    assert 60 < sum(text.startswith("<image>\n") for text in asked) < 140
    assert dropped(tmp_path / "a") == [("empty", "rows.json: line 1")]
    rules = {"instructions": ["Say it."], "place_image": "after", "caption": "all"}
    records = one("b", format="captions", files={"rows": path}, rules=rules)
    assert len(records) == 400
    assert texts(records[1]) == ["Say it.\n<image>", "other"]
    assert records[1]["id"] == "rows_0_1"


def test_boxes_of_one_s_own_in_every_form(tmp_path, made):
    picture(tmp_path / "images" / "a.png", 100, 50)
    forms = {"xywh": [10, 5, 20, 10], "xyxy": [10, 5, 30, 15], "xywh_shares": [0.1, 0.1, 0.2, 0.2], "xyxy_shares": [0.1, 0.1, 0.3, 0.3]}
    for form, box in forms.items():
        path = tmp_path / f"{form}.csv"
        path.write_text(
            f'image,phrase,box\na.png,the dog,"{box}"\nb.png,the cat,"{box}"\na.png,bad,"[1, 2, 3]"\na.png,bad,"[9, 9, -5, 2]"\n'
        )
        source = {"name": "s", "format": "boxes", "files": {"rows": str(path)}, "rules": {"box": form, "regions": "locate"}}
        records, built = made({"images": str(tmp_path / "images"), "max_bad_share": 1.0, "sources": [source]}, form)
        assert [texts(record)[1] for record in records] == ["[0.1, 0.3, 0.3, 0.4]"], form
        assert [reason for reason, _ in dropped(built.folder)] == ["no_size", "field", "box"], form


@pytest.mark.parametrize("form", ["chat", "messages"])
def test_chats_of_one_s_own(tmp_path, one, form):
    role, text, turns, image = ("from", "value", "conversations", "image") if form == "chat" else ("role", "content", "messages", "images")

    def said(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
        return [{role: who, text: what} for who, what in pairs]

    rows = [
        {turns: said(("user", "Q"), ("assistant", "a"), ("user", "R"), ("assistant", "b")), image: ["a.png"]},
        {turns: said(("human", "Q\n<image>"), ("gpt", "a")), image: "a.png"},
        {
            turns: said(("user", [{"type": "image"}, {"type": "text", "text": "Q"}]), ("assistant", [{"type": "text", "text": "a"}])),
            image: ["a.png"],
        },
        {turns: said(("user", "Q"), ("assistant", "a"))},
        {turns: said(("system", "S"), ("user", "Q"), ("assistant", "a"))},
        {turns: said(("user", "Q"))},
        {turns: said(("assistant", "a"), ("user", "Q"))},
        {turns: said(("user", "Q <image>"), ("assistant", "a"))},
        {turns: said(("user", "Q"), ("assistant", "a")), image: ["a.png", "b.png"]},
        {turns: said(("user", [{"type": "video"}]), ("assistant", "a"))},
    ]
    files = {"rows": str(write(tmp_path / "rows.json", rows))}
    records = one("a", format=form, files=files)
    assert [texts(record)[0] for record in records] == ["<image>\nQ", "Q\n<image>", "<image>\nQ", "Q"]
    assert [record.get("image") for record in records] == ["a.png", "a.png", "a.png", None]
    assert [reason for reason, _ in dropped(tmp_path / "a")] == ["roles", "roles", "roles", "image_word", "max_images", "field"]
    records = one("b", format=form, files=files, rules={"system": "to_question"})
    assert texts(records[4])[0] == "S\nQ"
    assert texts(one("c", format=form, files=files, rules={"system": "leave_out"})[4])[0] == "Q"
    lines = tmp_path / "rows.csv"
    lines.write_text(f'{turns}\n"{json.dumps(rows[3][turns]).replace(chr(34), chr(34) * 2)}"\n', encoding="utf-8")
    assert texts(one("d", format=form, files={"rows": str(lines)})[0]) == ["Q", "a"]


def test_pictures_in_the_rows_are_saved_where_the_config_says_so(tmp_path, made):
    data = picture(tmp_path / "there.png", 20, 10).read_bytes()
    images = tmp_path / "images"
    images.mkdir()
    pictures = [{"bytes": data, "path": "x.png"}, {"bytes": data, "path": None}, {"bytes": b"no picture", "path": None}, None]
    rows = [{"image": image, "question": f"Q{n}", "answer": "a", "messages": None} for n, image in enumerate(pictures)]
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "image": {"bytes": None, "path": "there.png"}}]), tmp_path / "rows.parquet")
    source = {"name": "s", "format": "vqa", "images": "hub", "files": {"rows": str(tmp_path / "rows.parquet"), "pictures": "save"}}
    given = {"images": str(images), "max_bad_share": 1.0, "sources": [source]}
    records, built = made(given)
    (record,) = records
    assert (images / record["image"]).read_bytes() == data
    assert record["image"].startswith("hub/")
    assert texts(record)[::2] == ["<image>\nQ0", "Q1"]
    assert [reason for reason, _ in dropped(built.folder)] == ["field", "field", "image_missing"]
    assert len(list((images / "hub").iterdir())) == 1
    with pytest.raises(UserError, match=r"sources.s.files.pictures: save needs a folder; write images:"):
        made({**given, "images": None}, "none")
    (images / "hub").rename(images / "else")
    source["files"] = {"rows": str(tmp_path / "rows.parquet")}
    source["images"] = ""
    with pytest.raises(UserError, match=r"holds the picture itself; write files.pictures: save"):
        made({**given, "max_bad_share": 0.0}, "refused")


WRONG: list[Any] = [None, True, -1, 1.5, 10**30, "", "x", [], [None], {}, {"a": 1}, "\ud83d", [[1, 2], 3], "x" * 5000]


@pytest.mark.parametrize("format_", ["gqa", "aokvqa", "ocr_vqa", "vqa", "captions", "boxes", "chat", "messages", "llava", "sharegpt"])
def test_no_value_of_any_field_brings_a_traceback(tmp_path, made, format_):
    """Every field of a good row in turn is every wrong value, and the row itself is."""
    turn = [{"from": "human", "value": "Q is a long question"}, {"from": "gpt", "value": "a"}]
    message = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]
    good: dict[str, Any] = {
        "gqa": {"question": "Q", "imageId": "1", "answer": "a"},
        "aokvqa": {"question": "Q", "image_id": 1, "question_id": "x", "choices": ["a", "b"], "correct_choice_idx": 0},
        "ocr_vqa": {"questions": ["Q"], "answers": ["a"], "split": 1, "imageURL": "x.jpg"},
        "vqa": {"image": "a.png", "question": "Q", "answer": "a"},
        "captions": {"image": "a.png", "caption": "a"},
        "boxes": {"image": "a.png", "phrase": "a", "box": [1, 2, 3, 4], "width": 10, "height": 10},
        "chat": {"conversations": turn, "image": "a.png"},
        "messages": {"messages": message, "images": ["a.png"]},
        "llava": {"id": 1, "conversations": turn},
        "sharegpt": {"id": 1, "conversations": turn},
    }[format_]
    rows = [good, *WRONG, *({**good, key: value} for key in good for value in WRONG)]
    for key in ("conversations", "messages"):
        rows += [{**good, key: [{**good[key][0], inner: value}, good[key][1]]} for inner in good.get(key, [{}])[0] for value in WRONG]
    by_name = format_ in ("gqa", "ocr_vqa")
    path = str(write(tmp_path / "rows.json", {str(n): row for n, row in enumerate(rows)} if by_name else rows))
    key = {"gqa": "questions", "aokvqa": "questions", "ocr_vqa": "questions", "llava": "records", "sharegpt": "conversations"}.get(
        format_, "rows"
    )
    source: dict[str, Any] = {"name": "s", "format": format_, "files": {key: path}}
    if format_ == "sharegpt":
        source["rules"] = {"long": "keep"}
    if format_ == "boxes":
        source["columns"] = {"width": "width", "height": "height"}
    records, built = made({"images": str(tmp_path), "missing_images": "keep", "max_bad_share": 1.0, "sources": [source]})
    assert records
    assert dropped(built.folder)


def spoilt(row: dict[str, Any]) -> list[Any]:
    """The row as it is, every wrong value in its place, and it with every wrong value in every field."""
    return [row, *WRONG, *({**row, key: value} for key in row for value in WRONG)]


PAIRED: dict[str, tuple[dict[str, tuple[str | None, list[dict[str, Any]]]], dict[str, Any]]] = {
    "vqav2": (
        {
            "questions": ("questions", [{"question_id": 1, "image_id": 1, "question": "Q"}]),
            "annotations": ("annotations", [{"question_id": 1, "answers": [{"answer": "a"}], "multiple_choice_answer": None}]),
        },
        {},
    ),
    "textcaps": (
        {"captions": ("data", [{"image_id": "a", "caption_str": "b"}]), "ocr": ("data", [{"image_id": "a", "ocr_tokens": ["x"]}])},
        {},
    ),
    "visual_genome": (
        {
            "regions": (None, [{"id": 1, "regions": [{"x": 1, "y": 1, "width": 5, "height": 5, "phrase": "p"}]}]),
            "images": (None, [{"image_id": 1, "url": "http://h/VG_100K/1.jpg", "width": 10, "height": 10}]),
        },
        {},
    ),
    "scienceqa": (
        {
            "problems": (
                "1",
                [{"question": "Q", "choices": ["a", "b"], "answer": 0, "hint": "", "lecture": "", "solution": "", "image": None}],
            )
        },
        {"prompt_format": "QCM-LEA"},
    ),
}


@pytest.mark.parametrize("format_", PAIRED)
def test_no_value_of_any_field_of_two_files_brings_a_traceback(tmp_path, made, format_):
    files, rules = PAIRED[format_]
    given: dict[str, str] = {}
    for name, (under, (row,)) in files.items():
        rows = spoilt(row)
        for key, value in row.items():
            if isinstance(value, list) and isinstance(value[0], dict):
                rows += [{**row, key: [each]} for each in spoilt(value[0])[1:]]
        held: Any = {str(n): each for n, each in enumerate(rows)} if format_ == "scienceqa" else {under: rows} if under else rows
        given[name] = str(write(tmp_path / f"{name}.json", held))
        if format_ == "scienceqa":
            given["splits"] = str(write(tmp_path / "splits.json", {"train": [*map(str, range(len(rows))), *WRONG]}))
    source = {"name": "s", "format": format_, "files": given, "rules": rules}
    records, built = made({"max_bad_share": 1.0, "sources": [source]})
    assert records
    assert dropped(built.folder)


def test_no_value_of_a_ref_or_an_instance_brings_a_traceback(tmp_path, one):
    ref = {"ann_id": 7, "image_id": 1, "split": "train", "sentences": [{"sent": "s"}]}
    refs = [*spoilt(ref), *({**ref, "sentences": [each]} for each in spoilt({"sent": "s"}))]
    files = refcoco(tmp_path, refs, "refs.json")
    entries = {
        "annotations": spoilt({"id": 7, "image_id": 1, "bbox": [1, 2, 3, 4]}),
        "images": spoilt({"id": 1, "width": 10, "height": 10}),
    }
    write(tmp_path / "instances.json", entries)
    assert one(format="refcoco", files=files)
    assert dropped(tmp_path / "out")
