"""`fastllava prepare` at the size of mix665K: time and memory, beside tokenizing every round again as the original does.

    python -P benches/prepare.py --tokenizer vicuna-7b-v1.5/tokenizer.model [--records 665298] [--workers 2] [--out DIR]

Records are drawn with the sources, rounds and lengths of llava_v1_5_mix665k.json, from words made of syllables.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import check_record
from fastllava.data.conversation import IMAGE, template
from fastllava.data.prepared import prepare
from fastllava.data.records import read_records
from fastllava.data.tokenizer import Tokenizer

# Records of each source in mix665K, then: rounds, words of a question, words of an answer (from, to), and whether an image is shown.
SOURCES = (
    (58_000, (2, 5), (6, 14), (10, 60), True),  # instruct, conversation
    (99_712, (1, 1), (8, 20), (80, 180), True),  # instruct, detail and reasoning
    (40_688, (1, 5), (5, 120), (60, 260), False),  # chats
    (243_921, (3, 10), (5, 12), (1, 3), True),  # questions answered in a word
    (66_160, (1, 1), (20, 40), (1, 1), True),  # multiple choice
    (21_953, (1, 1), (20, 60), (8, 14), True),  # captions of text
    (134_864, (4, 10), (5, 14), (4, 8), True),  # regions
)
MIX = 665_298


def main() -> None:
    if not sys.flags.safe_path:
        # With this folder on the import path, transformers would take kernels.py in it for a library of Hugging Face.
        sys.exit("error: write python -P benches/prepare.py ...")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model of a Llama-family model, or its folder")
    arguments.add_argument("--records", type=int, default=MIX)
    arguments.add_argument("--images", type=int, default=2000, help="different image files; mix665K has some 340,000")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--sample", type=int, default=1000, help="records that are tokenized the original's way")
    arguments.add_argument("--out", type=Path, help="folder for the records and the prepared set; a temporary one when left out")
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        prepare_once(given.out, given.tokenizer, given.workers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        draw(folder, given.records, given.images)
        size = (folder / "records.json").stat().st_size
        print(f"drew {given.records:,} records, {size / 2**20:,.0f} MiB, and {given.images:,} images in {time.monotonic() - began:.0f} s")
        report(folder, given)


def report(folder: Path, given: argparse.Namespace) -> None:
    """Runs and prints; the last line is JSON."""
    # Before and after, so that other load on the machine weighs on both.
    tokens, before = original_ms(folder / "records.json", given.tokenizer, given.sample)
    command = [
        sys.executable,
        "-P",
        __file__,
        "--child",
        "--tokenizer",
        str(given.tokenizer),
        "--workers",
        str(given.workers),
        "--out",
        str(folder),
    ]
    began = time.monotonic()
    child = subprocess.Popen(command)
    memory = watch(child.pid)
    child.wait()
    seconds = time.monotonic() - began
    if child.returncode:
        sys.exit(child.returncode)
    original = (before + original_ms(folder / "records.json", given.tokenizer, given.sample)[1]) / 2
    usage = json.loads((folder / "usage.json").read_text())
    row = {
        "bench": "prepare",
        "records": given.records,
        "workers": given.workers,
        "cores": os.cpu_count(),
        "seconds": round(seconds, 1),
        "ms_per_record": round(seconds / given.records * 1e3, 3),
        "cpu_ms_per_record": round(usage["cpu_seconds"] / given.records * 1e3, 3),
        "text_tokens_per_record": round(tokens, 1),
        "original_ms_per_record": round(original, 3),
        "times_faster": round(original / (seconds / given.records * 1e3), 1),
        "times_less_cpu": round(original / (usage["cpu_seconds"] / given.records * 1e3), 1),
        "peak_pss_mib": round(memory["pss"] / 2**20),
        "peak_rss_mib": round(memory["rss"] / 2**20),
    }
    print(json.dumps(row))


def draw(folder: Path, records: int, images: int) -> None:
    """Writes records.json, one after the other, and the image files."""
    rng = random.Random(0)
    (folder / "images").mkdir(exist_ok=True)
    for i in range(images):
        Image.new("RGB", (rng.randrange(200, 640), rng.randrange(200, 640)), (i % 256, 90, 30)).save(folder / "images" / f"{i:06}.jpg")
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ou", "st")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(40_000)]
    # As words are spread in a language: the n-th most frequent comes about 1/n times as often.
    drawn = rng.choices(words, weights=[1 / (n + 3) for n in range(len(words))], k=2_000_000)

    def text(length: tuple[int, int], end: str) -> str:
        n = rng.randint(*length)
        at = rng.randrange(len(drawn) - n)
        return " ".join(drawn[at : at + n]).capitalize() + end

    weights = [source[0] for source in SOURCES]
    with (folder / "records.json").open("w", encoding="utf-8") as file:
        for i in range(records):
            _, rounds, asked, answered, shown = rng.choices(SOURCES, weights)[0]
            turns = []
            for n in range(rng.randint(*rounds)):
                mark = f"{IMAGE}\n" if shown and n == 0 else ""
                turns += [{"from": "human", "value": mark + text(asked, "?")}, {"from": "gpt", "value": text(answered, ".")}]
            record: dict[str, Any] = {"id": f"{i:09}", "conversations": turns}
            if shown:
                record["image"] = f"{rng.randrange(images):06}.jpg"
            file.write(("[" if i == 0 else ",\n") + json.dumps(record))
        file.write("]\n")


def prepare_once(folder: Path, tokenizer: Path, workers: int) -> None:
    """In a process of its own: a fresh prepared set, and the processor time it took."""
    settings = {
        "records": folder / "records.json",
        "images": folder / "images",
        "image_policy": "pad",
        "template": "v1",
        "group_by_modality": True,
        "prepared_dir": folder / f"prepared-{os.getpid()}",
        "workers": workers,
    }
    data = DataConfig.model_validate(settings)
    spec = ImageSpec(336, 576, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    prepare(data, Tokenizer.load(tokenizer), spec)
    times = os.times()
    (folder / "usage.json").write_text(json.dumps({"cpu_seconds": sum(times[:4])}))


def watch(pid: int) -> dict[str, int]:
    """Peak memory in bytes of the process and its children, until it ends: shared pages counted once (pss), or in each (rss)."""
    peak = {"pss": 0, "rss": 0}

    def sample() -> None:
        while True:
            try:
                parent = psutil.Process(pid)
                if parent.status() == psutil.STATUS_ZOMBIE:
                    return
                found = [process.memory_full_info() for process in (parent, *parent.children(recursive=True))]
            except psutil.NoSuchProcess:
                if not psutil.pid_exists(pid):
                    return
                continue
            for kind in peak:
                peak[kind] = max(peak[kind], sum(getattr(info, kind) for info in found))
            time.sleep(0.5)

    threading.Thread(target=sample, daemon=True).start()
    return peak


def original_ms(records: Path, tokenizer: Path, sample: int) -> tuple[float, float]:
    """Text tokens of a record, and milliseconds of one processor to tokenize it as preprocess_v1 of the original does.

    That is the whole prompt once, then every round twice (whole, and without its answer) to count what to mask, each with
    the slow sentencepiece tokenizer of transformers. Reading JSON and checking images are not counted, here alone.
    """
    slow = slow_tokenizer(tokenizer)
    form = template("v1")
    prompts = [prompt for _, prompt in zip(range(sample), prompts_of(records), strict=False)]

    def length(text: str) -> int:
        return sum(len(slow(chunk).input_ids) for chunk in text.split(IMAGE))

    tokens = 0
    length(prompts[0])
    began = time.process_time()
    for prompt in prompts:
        tokens += length(prompt)
        for part in prompt.split("</s>")[:-1]:
            length(part)
            length(part.split(f" {form.gpt}: ")[0] + f" {form.gpt}: ")
    return tokens / len(prompts), (time.process_time() - began) / len(prompts) * 1e3


def prompts_of(records: Path) -> Iterator[str]:
    form = template("v1")
    for raw in read_records(records):
        text = f"{form.system} "
        for role, value in check_record(raw.value, raw.index).turns:
            text += f"{form.human}: {value} " if role == "human" else f"{form.gpt}: {value}</s>"
        yield text


def slow_tokenizer(path: Path) -> Any:
    """The tokenizer class in Python over sentencepiece, whatever this transformers calls it."""
    file = path / "tokenizer.model" if path.is_dir() else path
    tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    try:
        from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
    except ImportError:
        from transformers import LlamaTokenizer

        return LlamaTokenizer(vocab_file=str(file), legacy=True, **tokens)
    return SentencePieceBackend(vocab_file=str(file), legacy=True, **tokens)


if __name__ == "__main__":
    main()
