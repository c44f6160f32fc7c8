"""The embedded default from the first stroke to the report: draw, make backbones, train both stages, ask held-out questions."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from rich.console import Console

from fastllava.config import Config, load_config
from fastllava.config.load import SHIPPED
from fastllava.console.speaker import speaker
from fastllava.demo.answers import Accuracy, DrawnScience, answers_of, compare, evaluated
from fastllava.demo.backbones import BackboneSizes, write_json
from fastllava.demo.dataset import DrawnSet, draw_set
from fastllava.demo.llm import make_llm
from fastllava.demo.report import Example, print_accuracy, write_report
from fastllava.demo.science import write_science
from fastllava.demo.tower import make_tower
from fastllava.errors import UserError
from fastllava.model.execution import Execution
from fastllava.model.ops import choose_ops, reference_ops
from fastllava.model.weights import load_llava, write_checkpoint
from fastllava.train import run

STAMP = "demo.json"


@dataclass(frozen=True)
class DemoSettings:
    """What a demo is made of; two runs with equal settings give the same result on the same machine."""

    seed: int = 1
    train_pictures: int = 3000
    held_out_pictures: int = 150
    questions: int = 5
    """At most so many a training picture."""
    sizes: BackboneSizes = field(default_factory=BackboneSizes)


@dataclass(frozen=True)
class DemoResult:
    """What came of it."""

    accuracy: Accuracy
    with_options: float
    """Share of right letters in [0, 1] in the demo's benchmark in the form of ScienceQA."""
    checkpoint: Path
    """What stage 2 leaves: a whole checkpoint in the original's layout, or its LoRA folder."""
    report: Path
    seconds: float


def demo(
    out: Path,
    settings: DemoSettings | None = None,
    console: Console | None = None,
    overrides: tuple[str, ...] = (),
    lora: bool = False,
) -> DemoResult:
    """Run the demo in the folder `out` and leave everything there. The same call again goes on where an earlier one stopped.

    `overrides` go to both stages' configs, as on the command line. `lora`: stage 2 trains adapters in place of the language model, and
    what comes of it lies in `out`/lora; set, backbones and stage 1 are those of the demo without it. Raises UserError when `out` holds
    something else.
    """
    threads = torch.get_num_threads()
    # The demo's tensors are small: a second thread waits more than it works, and badly so beside other programs.
    torch.set_num_threads(1)
    try:
        return _demo(out, settings or DemoSettings(), console or Console(), overrides, lora)
    finally:
        torch.set_num_threads(threads)


def _demo(out: Path, settings: DemoSettings, console: Console, overrides: tuple[str, ...], lora: bool) -> DemoResult:
    began = time.monotonic()
    say = speaker(console)
    pretrain, finetune = stage_configs(out, overrides, lora)
    home = finetune.output_dir.parent
    if _claim(out, settings):
        say(f"{out} holds this demo already: going on where it stopped")

    drawn = draw_set(out / "data", settings.train_pictures, settings.held_out_pictures, settings.questions, settings.seed)
    say(f"drew {len(drawn.train):,} training pictures and {len(drawn.held_out_scenes)} held-out ones of other scenes, in {drawn.images}")
    _make_backbones(out, drawn, settings, pretrain, console)

    write_science(out / "benchmarks" / DrawnScience.folder, drawn, settings.seed)
    say("before training:")
    before = answers_of(_untrained(out / "untrained", pretrain, finetune), drawn, out / "answers" / "before.jsonl", console)
    say("stage 1: the projector learns to show the pictures to the language model, on captions")
    _train(pretrain, console)
    learns = "projector and adapters of the language model" if lora else "projector and language model"
    say(f"stage 2: {learns} learn to answer, on conversations")
    _train(finetune, console)
    say("after training:")
    after = answers_of(finetune.output_dir, drawn, home / "answers" / "after.jsonl", console)
    science = evaluated(finetune.output_dir, out / "benchmarks", home / "eval", console)

    questions = [one.question for one in drawn.held_out]
    accuracy = compare(questions, before, after)
    print_accuracy(accuracy, console)
    with_options = science.figures["img_accuracy"] / 100
    of = f"of {science.figures['img_count']} questions with options, as ScienceQA asks them,"
    say(f"{of} {with_options:.1%} are answered with the right letter")
    examples = [Example(drawn.images / one.image, one.question, b, a) for one, b, a in zip(drawn.held_out, before, after, strict=True)]
    seconds = time.monotonic() - began
    report = write_report(home, accuracy, examples, [pretrain.output_dir, finetune.output_dir], seconds)
    say(f"report:     {report}\ncheckpoint: {finetune.output_dir}\nset:        {out / 'data'}\ntook {seconds:.0f} s; to go on:")
    say(f"  fastllava inspect {drawn.finetune} --tokenizer {out / 'llm'} --template v1")
    asking = f"--questions {drawn.questions} --images {drawn.images}"
    say(f"  fastllava answer {finetune.output_dir} {asking} --max-new-tokens 8 --out {home / 'my-answers.jsonl'}")
    say(f"  fastllava eval {finetune.output_dir} --data {out / 'benchmarks'} --benchmarks scienceqa --out {home / 'my-eval'}")
    say(f"  fastllava chat {finetune.output_dir} --image {drawn.images / drawn.held_out[0].image}")
    say(f"  fastllava export {finetune.output_dir} --layout hf --out {home / 'hf'}")
    say(f"  fastllava train {_write_config(home / 'finetune.yaml', finetune)} train.epochs=1 output_dir={home / 'one-epoch'}")
    return DemoResult(accuracy, with_options, finetune.output_dir, report, seconds)


def stage_configs(out: Path, overrides: tuple[str, ...] = (), lora: bool = False) -> tuple[Config, Config]:
    """The shipped configs of both stages, with `out` in the place of their folder demo/; `lora`: stage 2's with adapters."""

    def load(stage: str) -> Config:
        adapted = lora and stage == "finetune"
        places = {
            "output_dir": out / "lora" / stage if adapted else out / stage,
            "model.llm": out / "llm",
            "model.vision_tower": out / "tower",
            "data.records": out / "data" / f"{stage}.json",
            "data.images": out / "data" / "images",
            "data.prepared_dir": out / "prepared",
        }
        if stage == "finetune":
            places["eval.held_out"] = out / "data" / "held_out.json"
            places["model.projector"] = out / "pretrain" / "mm_projector.safetensors"
        words = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
        return load_config(SHIPPED / f"demo_{stage}{'_lora' if adapted else ''}.yaml", [*words, *overrides])

    return load("pretrain"), load("finetune")


def _write_config(path: Path, config: Config) -> Path:
    """The config as it ran, with the paths of this demo, ready for `fastllava train`; `path` again."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return path


def _claim(out: Path, settings: DemoSettings) -> bool:
    """Whether `out` holds this very demo already; an empty or new folder is taken. Raises UserError for any other."""
    stamp = out / STAMP
    wanted = asdict(settings)
    if stamp.exists():
        if json.loads(stamp.read_text(encoding="utf-8")) != wanted:
            raise UserError(f"--out: {out} holds a demo of other settings; remove it or give another folder")
        return True
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} holds other files; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(stamp, wanted)
    return False


def _make_backbones(out: Path, drawn: DrawnSet, settings: DemoSettings, config: Config, console: Console) -> None:
    """The tower and the language model of the demo, unless they are there; a folder's config.json is written last."""
    say = speaker(console)
    ops = choose_ops(config.kernels, torch.device("cpu"), torch.float32)
    if not (out / "tower" / "config.json").exists():
        say("a tower with random weights cannot carry the two stages, so one is trained on the pictures first, as CLIP was before LLaVA:")
        score = make_tower(out / "tower", drawn, settings.sizes, config.data, ops, settings.seed)
        say(f"  its patches tell {score.shape:.1%} of the shapes and {score.colour:.1%} of the colours held out; now it is frozen")
    if not (out / "llm" / "config.json").exists():
        say("the language model reads the set's sentences, without pictures (as Vicuna had read before LLaVA):")
        loss = make_llm(out / "llm", drawn.texts, settings.sizes, ops, settings.seed)
        say(f"  loss {loss:.2f} nats a token at the end")


def _train(config: Config, console: Console) -> None:
    result = run(config, console)
    if result.stopped_by is not None:
        raise UserError(f"stopped by {result.stopped_by.name}; the same command goes on")


def _untrained(folder: Path, pretrain: Config, finetune: Config) -> Path:
    """The model that stage 1 begins with as a checkpoint in the original's layout, `folder`, so that it can be asked like any other."""
    source = pretrain.model.model_copy(update={"projector": "fresh"})
    if not (folder / "config.json").exists():
        model = load_llava(source, Execution(reference_ops(), torch.float32), pretrain.train.seed)
        data = finetune.data
        write_checkpoint(model, "llava", folder, torch.float32, source=source, image_policy=data.image_policy, max_tokens=data.max_tokens)
    return folder
