"""Annotation files in every public format, with their images, and a mix that reads them all. All values are invented."""

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

COCO = [9, 25, 51606, 299207, 581857]


def write(path: Path, value: Any) -> Path:
    """A JSON file, with the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def picture(path: Path, width: int = 40, height: int = 30) -> Path:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (120, width % 256, height % 256)).save(path)
    return path


def vqa_files(folder: Path, asked: list[tuple[int, int, str, list[str]]], most_common: bool) -> None:
    """(question_id, image_id, question, answers) as questions.json and annotations.json, in the format of the VQA evaluation."""
    head = {"info": {"year": 2014, "nested": [{"deep": [1, {"deeper": []}]}]}, "license": {}, "data_subtype": "train2014"}
    questions = [{"image_id": image, "question": text, "question_id": number} for number, image, text, _ in asked]
    annotations = []
    for number, image, _, answers in asked:
        each = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(answers, 1)]
        entry: dict[str, Any] = {"question_id": number, "image_id": image, "question_type": "what is", "answers": each}
        annotations.append({**entry, "multiple_choice_answer": max(answers, key=answers.count)} if most_common else entry)
    write(folder / "questions.json", {**head, "task_type": "Open-Ended", "questions": questions})
    write(folder / "annotations.json", {**head, "annotations": annotations[::-1]})


def lay_out(root: Path) -> None:
    """Every file and image below `root`."""
    images, data = root / "images", root / "data"
    for number in COCO:
        picture(images / "coco/train2017" / f"{number:012d}.jpg", 40 + number % 7, 30)
    for name in ("gqa/images/2354786", "gqa/images/n161313", "ocr_vqa/images/1421544350", "textvqa/train_images/011e7e629fb9ae7b"):
        picture(images / f"{name}.jpg")
    picture(images / "vg/VG_100K_2/2407890.jpg", 80, 60)
    picture(images / "own/a.png", 64, 48)
    picture(images / "sqa/1/image.png")

    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
    write(data / "llava.json", [{"id": "000000000009", "image": "000000000009.jpg", "conversations": turns}])
    four = ["broccoli"] * 4 + ["food"] * 2 + ["lunch", "vegetables", "fruit", "green"]
    vqa_files(
        data / "vqav2",
        [(9000, 9, "What is in the box?", four), (25000, 25, "How many?", ["2"] * 10), (9001, 9, "Is it open?", ["yes"] * 10)],
        True,
    )
    vqa_files(data / "okvqa", [(516065, 51606, "What is it called?", ["pony tail"] * 6 + ["bun"] * 4)], False)
    gqa = {
        "02930152": {"question": "Is the sky dark?", "imageId": "2354786", "answer": "yes", "fullAnswer": "Yes, it is dark.", "groups": {}},
        "07333408": {"question": "What is on the wall?", "imageId": "n161313", "answer": "pipe", "fullAnswer": "The pipe is.", "types": {}},
        "07333405": {
            "question": "Is it red?",
            "imageId": "2354786",
            "answer": "no",
            "fullAnswer": "No, it is white.",
            "semantic": [{"a": [1]}],
        },
    }
    write(data / "gqa.json", gqa)
    choices = ["skateboarder", "train", "delivery", "cab"]
    aokvqa = {
        "image_id": 299207,
        "question_id": "22Mex",
        "question": "What is the man awaiting?",
        "choices": choices,
        "correct_choice_idx": 3,
    }
    write(data / "aokvqa.json", [{**aokvqa, "split": "train", "direct_answers": ["ride"] * 10, "rationales": ["He waits."] * 3}])
    book = {"questions": ["Who wrote this book?", "Is it a comedy?"], "answers": ["Sandra Boynton", "No"], "genre": "Calendars"}
    address = "http://ecx.images-amazon.com/images/I/51RgQzEBtnL.jpg"
    write(
        data / "ocr_vqa.json",
        {"1421544350": {**book, "imageURL": address, "split": 1}, "0761183272": {**book, "imageURL": "x.gif", "split": 3}},
    )
    captions = [
        {"image_id": "011e7e629fb9ae7b", "caption_str": text, "caption_id": n} for n, text in enumerate(["A sign.", "A stop sign."])
    ]
    write(data / "textcaps.json", {"dataset_type": "train", "data": captions})
    write(
        data / "ocr.json",
        {"dataset_name": "textvqa", "data": [{"image_id": "011e7e629fb9ae7b", "ocr_tokens": ["STOP", "here"], "ocr_info": []}]},
    )
    phrases = [
        {"sent_id": n, "raw": text.upper(), "sent": text, "tokens": text.split()} for n, text in enumerate(["the lady", "blue shirt."])
    ]
    ref = {"ref_id": 0, "ann_id": 17, "category_id": 1, "image_id": 581857, "split": "train", "sent_ids": [0, 1], "sentences": phrases}
    (data / "refs(unc).p").write_bytes(pickle.dumps([ref, {**ref, "ref_id": 1, "split": "val"}], protocol=0))
    boxes = {"annotations": [{"id": 17, "image_id": 581857, "bbox": [3.93, 9.99, 20.22, 10.42], "segmentation": [[1, 2, 3]]}]}
    write(data / "instances.json", {"info": {}, "images": [{"id": 581857, "width": 45, "height": 30, "file_name": "x.jpg"}], **boxes})
    region = {"image_id": 2407890, "x": 21, "y": 7, "width": 30, "height": 40}
    regions = [{"id": 2407890, "regions": [{**region, "region_id": n, "phrase": f"clock number {n}"} for n in range(12)]}]
    write(data / "regions.json", regions)
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/2407890.jpg"
    write(data / "image_data.json", [{"image_id": 2407890, "url": url, "width": 80, "height": 60, "coco_id": None}])
    told = [("human", "What is a prime number, please?"), ("gpt", "<p>It has <strong>two</strong> divisors.</p>")] * 2
    chats = [{"id": "wgByO4Y", "conversations": [{"from": role, "value": text} for role, text in told]}]
    write(data / "sharegpt.json", [*chats, {"id": "short", "conversations": chats[0]["conversations"][:1]}])
    problem = {"question": "Which is it?", "choices": ["a map", "a bird"], "answer": 1, "hint": "", "lecture": "A lecture.", "solution": ""}
    write(
        data / "problems.json", {"1": {**problem, "image": "image.png"}, "2": {**problem, "image": None}, "3": {**problem, "image": None}}
    )
    write(data / "pid_splits.json", {"train": ["1", "2"], "test": ["3"]})


def whole_mix(root: Path) -> dict[str, Any]:
    """A mix of every public format."""
    data = root / "data"
    coco = "coco/train2017"

    def at(name: str) -> str:
        return str(data / name)

    def two(name: str) -> dict[str, str]:
        return {"questions": at(f"{name}/questions.json"), "annotations": at(f"{name}/annotations.json")}

    refs = {"refs": at("refs(unc).p"), "instances": at("instances.json")}
    return {
        "images": str(root / "images"),
        "sources": [
            {"name": "llava", "format": "llava", "images": coco, "files": {"records": at("llava.json")}},
            {"name": "vqav2", "format": "vqav2", "images": coco, "files": two("vqav2"), "expect": 2},
            {"name": "okvqa", "format": "okvqa", "images": coco, "files": two("okvqa")},
            {"name": "gqa", "format": "gqa", "images": "gqa/images", "files": {"questions": at("gqa.json")}, "expect": 2},
            {"name": "aokvqa", "format": "aokvqa", "images": coco, "files": {"questions": at("aokvqa.json")}, "expect": 4},
            {"name": "ocr_vqa", "format": "ocr_vqa", "images": "ocr_vqa/images", "files": {"questions": at("ocr_vqa.json")}},
            {
                "name": "textcaps",
                "format": "textcaps",
                "images": "textvqa/train_images",
                "files": {"captions": at("textcaps.json"), "ocr": at("ocr.json")},
            },
            {"name": "refcoco", "format": "refcoco", "images": coco, "files": {"sets": [refs]}},
            {
                "name": "vg",
                "format": "visual_genome",
                "images": "vg",
                "files": {"regions": at("regions.json"), "images": at("image_data.json")},
            },
            {"name": "sharegpt", "format": "sharegpt", "files": {"conversations": at("sharegpt.json")}, "rules": {"long": "keep"}},
            {
                "name": "sqa",
                "format": "scienceqa",
                "images": "sqa",
                "files": {"problems": at("problems.json"), "splits": at("pid_splits.json")},
            },
        ],
    }
