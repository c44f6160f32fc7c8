"""Engine vllm: what it asks of vLLM, by a stand-in for that package which answers from a table, as vLLM itself runs on GPUs alone."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastllava.data.asking import Turn, ask
from fastllava.errors import UserError
from fastllava.evaluate.answer import answer_file, answer_questions
from fastllava.evaluate.checkpoint import load_trained
from fastllava.evaluate.engines import Prompt, make_engine
from fastllava.evaluate.pictures import load_pictures
from fastllava.evaluate.questions import Question
from fastllava.export import export


class StandIn(ModuleType):
    """The part of vLLM's interface that is used, recording what it is asked."""

    def __init__(self):
        super().__init__("vllm")
        self.made, self.asked, self.settings = {}, [], []

    def LLM(self, **given):
        self.made = given
        return SimpleNamespace(generate=self._generate)

    def SamplingParams(self, **given):
        self.settings.append(given)
        return SimpleNamespace(**given)

    def _generate(self, prompts, settings, use_tqdm):
        assert not use_tqdm
        self.asked += prompts
        # One that ends, with the token that ended it; one that ends, without it; one that is cut.
        kinds = [([91, 92, 2], "stop"), ([91], "stop"), ([91, 92, 93][: settings.max_tokens], "length")]
        answers = [kinds[number % 3] for number in range(len(prompts))]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), finish_reason=why)]) for ids, why in answers]


@pytest.fixture
def vllm(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return module


@pytest.fixture(scope="module")
def trained(tiny_llava):
    return load_trained(tiny_llava, precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def questions(golden):
    image = golden / "trace" / "images" / "img0.png"
    return [Question(0, "What colour?", image, "What colour?"), Question(1, "Why?", None, "Why?"), Question(2, "Who?", image, "Who?")]


def test_it_asks_vllm_for_the_ids_and_pixels_of_the_other_engine(vllm, trained, questions, tmp_path, monkeypatch):
    # Other tests keep exports of this model.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []
    outcome = answer_questions(
        trained, questions, tmp_path / "a.jsonl", engine=make_engine("vllm", trained, 8, said.append), max_new_tokens=3
    )
    made = dict(vllm.made)
    exported = made.pop("model")
    image = json.loads(Path(exported, "config.json").read_text())["image_token_index"]
    assert made == {
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "limit_mm_per_prompt": {"image": 1},
        "generation_config": "vllm",
        "seed": 0,
    }
    assert vllm.settings == [{"temperature": 0.0, "max_tokens": 3, "stop_token_ids": [2], "detokenize": False}]
    ids = [ask(trained.form, Turn(one.text, int(one.image is not None)), trained.tokenizer) for one in questions]
    assert [prompt["prompt_token_ids"] for prompt in vllm.asked] == [[image if i == -200 else i for i in row] for row in ids]
    assert ["multi_modal_data" in prompt for prompt in vllm.asked] == [True, False, True]
    shown = np.asarray(vllm.asked[0]["multi_modal_data"]["image"]).transpose(2, 0, 1)
    assert np.array_equal(shown, load_pictures(questions[0], trained)[0])
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    decode = trained.tokenizer.decode
    assert texts == [decode(row).strip() for row in ([91, 92], [91], [91, 92, 93])]
    assert (outcome.answered, outcome.unended) == (3, 1)
    assert any("layout hf" in line for line in said)
    # The export is kept, and a checkpoint that is one is read where it lies.
    said.clear()
    make_engine("vllm", trained, 8, said.append)
    assert (vllm.made["model"], said) == (exported, [])


def test_the_export_takes_the_picture_as_it_is(vllm, trained, questions):
    """The processor beside the export makes of it the pixels that the other engine normalises."""
    import transformers

    from fastllava.model.llava import normalise

    engine = make_engine("vllm", trained, 8)
    processor = transformers.AutoProcessor.from_pretrained(vllm.made["model"])
    pixels = load_pictures(questions[0], trained)
    given = engine._prompt(Prompt(ask(trained.form, Turn("?", 1), trained.tokenizer), pixels))
    seen = processor.image_processor(images=given["multi_modal_data"]["image"], return_tensors="pt")["pixel_values"]
    mean, std = torch.tensor(trained.model.spec.mean), torch.tensor(trained.model.spec.std)
    torch.testing.assert_close(seen, normalise(torch.from_numpy(pixels[0])[None], mean, std), rtol=0, atol=1e-5)


def test_an_export_is_read_where_it_lies_and_a_long_prompt_is_cut(vllm, tiny_llava, questions, tmp_path):
    export(tiny_llava, "hf", tmp_path / "hf", lambda line: None)
    trained = load_trained(tmp_path / "hf", precision="bf16", device=torch.device("cpu"))
    engine = make_engine("vllm", trained, 8)
    assert (vllm.made["model"], vllm.made["dtype"]) == (str(tmp_path / "hf"), "bfloat16")
    ids = ask(trained.form, Turn("one two three", 1), trained.tokenizer)
    pixels = load_pictures(questions[0], trained)
    engine.trained = replace(trained, max_tokens=len(ids) + trained.model.spec.patches - 1 - 3)
    assert len(engine._prompt(Prompt(ids, pixels))["prompt_token_ids"]) == len(ids) - 3
    engine.trained = replace(trained, max_tokens=10)
    with pytest.raises(UserError, match=r"^--engine: vllm cannot cut a picture"):
        engine._prompt(Prompt(ids, pixels))


def test_without_vllm_one_line_says_how_to_get_it(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        UserError, match=r"^--engine: vllm cannot be loaded \(.*\); run pip install 'fastllava\[vllm\]', or write --engine tr"
    ):
        make_engine("vllm", trained, 8)


def test_a_model_that_its_layout_cannot_hold_is_refused(vllm, trained):
    other = SimpleNamespace(projector=SimpleNamespace(projector_type="linear"))
    with pytest.raises(UserError, match=r"^--engine: vllm reads .*, this one is linear; write --engine transformers$"):
        make_engine("vllm", replace(trained, model=other), 2)


def test_torchrun_is_not_for_it(vllm, trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^--engine: vllm takes all GPUs of a machine by itself; start one process, without torchrun$"):
        make_engine("vllm", trained, 8)


def test_the_command_takes_it(vllm, tiny_llava, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Why?"}\n')
    given = {"template": "llava_v1", "max_new_tokens": 3, "batch_size": 1, "engine": "vllm", "precision": "auto", "skip_bad": False}
    answer_file(tiny_llava, tmp_path / "q.jsonl", None, tmp_path / "a.jsonl", **given, console=Console(quiet=True))
    assert json.loads((tmp_path / "a.jsonl").read_text())["question_id"] == 1
