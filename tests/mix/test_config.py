"""The config of a mix: every problem at once, in the words of its keys; the schema and the shipped recipe."""

import json
from pathlib import Path

import pytest
import yaml

from fastllava.errors import UserError
from fastllava.mix import instructions
from fastllava.mix.config import check_mix, load_mix
from fastllava.mix.inputs import check_inputs, files_of
from fastllava.mix.schema import schema_text
from fastllava.mix.sources import FORMATS


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        check_mix(yaml.safe_load(text))
    return str(refused.value).splitlines()


def test_every_problem_is_told_at_once_with_its_remedy():
    given = """
    seed: x
    sead: 1
    sources:
      - {name: a, format: gqua, files: {}}
      - {name: b, format: gqa, files: {question: x}, rules: {capitalize: true, prompt_at: last}}
      - {format: vqav2, files: {questions: 3}, sample: 0, images: ../x}
      - {name: "a b", format: gqa, files: {questions: []}}
      - {name: c, format: sharegpt, images: x, files: {conversations: a}}
      - {name: d, format: scienceqa, files: {problems: a, splits: b}, rules: {prompt_format: QCM}}
      - {name: e}
      - 3
    """
    assert problems(given) == [
        "seed: 'x' is no whole number; write one such as 128",
        "sources.a.format: 'gqua' is not among the formats; did you mean gqa?",
        "sources.b.files.questions: is missing; write it there",
        "sources.b.files.question: no such key; did you mean sources.b.files.questions?",
        "sources.b.rules.prompt_at: 'last' is not among its values; write 'first', 'every' or 'none'",
        "sources.b.rules.capitalize: no such key; did you mean sources.b.rules.capitalise?",
        "sources.2.name: is missing; write it there",
        "sources.2.images: '../x' leads out of the images folder of the mix; write the part below it, such as coco/train2017",
        "sources.2.sample: 0 is too small; write at least 1",
        "sources.2.files.questions: 3 is no path; write one, in quotes when it looks like a number",
        "sources.2.files.annotations: is missing; write it there",
        "sources.a b.name: 'a b' is not of the form ^[\\w.-]+$; write one that is",
        "sources.a b.files.questions: is empty; write at least one",
        "sources.c: images: ShareGPT has no pictures; take the key out",
        "sources.d.rules.prompt_format: 'QCM' is not of the form "
        "^(CQM|QCM|QCML|QCME|QCMLE|QCLM|QCEM|QCLEM)-(A|AL|AE|ALE|AEL|LA|EA|LEA|ELA|LEPA)$; write one that is",
        f"sources.e: says no format; write format: and one of {', '.join(FORMATS)}",
        "sources.7: 3 holds no keys; write name, format and files below it",
        "sead: no such key; did you mean seed?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sources: []", "sources: is empty; write at least one"),
        ("sources: 3", "sources: 3 is no list; write one entry a line, each behind '- '"),
        ("seed: 1", "sources: is missing; write it there"),
        (
            "sources: [{name: a, format: gqa, files: {questions: x}}, {name: a, format: gqa, files: {questions: x}}]",
            "the name 'a' stands twice",
        ),
    ],
)
def test_sources_there_must_be(text, said):
    assert said in problems(text)[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- 1", "holds \\[1\\], not keys"),
        (b"a: [", "line 1|is not valid YAML"),
        (b"\xff", "is not text in UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_mix_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "mix.yaml").write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_mix(tmp_path / "mix.yaml")


def test_all_missing_files_are_named_at_once(tmp_path):
    (tmp_path / "images").mkdir()
    there = tmp_path / "there.json"
    there.touch()
    mix = check_mix(
        {
            "images": str(tmp_path / "images"),
            "sources": [
                {"name": "a", "format": "gqa", "images": "gqa", "files": {"questions": ["x.json", str(there), str(tmp_path)]}},
                {"name": "b", "format": "refcoco", "files": {"sets": [{"refs": "y.p", "instances": str(there)}]}},
            ],
        }
    )
    with pytest.raises(UserError) as refused:
        check_inputs(mix)
    assert str(refused.value).splitlines() == [
        "sources.a.files.questions.0: there is no file x.json; download it, or mend the path",
        f"sources.a.files.questions.2: {tmp_path} is no file; give the file itself",
        f"sources.a.images: there is no folder {tmp_path}/images/gqa; put the images there, or mend it",
        "sources.b.files.sets.refs: there is no file y.p; download it, or mend the path",
    ]
    with pytest.raises(UserError, match=r"images: .* is no folder"):
        check_inputs(check_mix({"images": str(there), "sources": [{"name": "a", "format": "gqa", "files": {"questions": str(there)}}]}))


def test_the_schema_is_current(repo):
    assert (repo / "configs" / "mix-schema.json").read_text(encoding="utf-8") == schema_text(), "run make schema"
    kinds = json.loads(schema_text())["properties"]["sources"]["items"]["discriminator"]["mapping"]
    assert set(kinds) == set(FORMATS)


def test_every_key_is_described():
    definitions = json.loads(schema_text())["$defs"].items()
    bare = [f"{name}.{key}" for name, entry in definitions for key, value in entry["properties"].items() if "description" not in value]
    assert [key for key in bare if key.rpartition(".")[2] not in ("format", "files", "rules", "columns")] == []


def test_the_recipe_of_stage_1_is_the_paper_s(repo):
    (source,) = load_mix(repo / "configs" / "mix_lcs558k.yaml").sources
    rules = getattr(source, "rules", None)
    assert (rules.instructions, rules.place_image, rules.balance.least, rules.balance.most) == ("lcs_558k", "random", 3, 100)
    assert len(set(instructions.LCS_558K)) == 11


@pytest.mark.parametrize("name", ["mix665k", "mix_lcs558k"])
def test_a_shipped_mix_opens_with_its_promise(repo, name):
    lines = (repo / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=mix-schema.json"
    opening = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"fastllava mix configs/{name}.yaml --out " in opening
    for word in ("# Needs", "# Leaves", "# Promise"):
        assert word in opening


@pytest.fixture
def recipe(repo):
    return load_mix(repo / "configs" / "mix665k.yaml")


def test_the_recipe_is_the_paper_s(recipe):
    by_name = {source.name: source for source in recipe.sources}
    counted = {name: source.expect or source.published for name, source in by_name.items()}
    assert sum(count or 0 for count in counted.values()) == 665_298
    expected = {"llava": 157_712, "vqav2": 82_783, "gqa": 72_140, "okvqa": 8_998, "aokvqa": 66_160, "textcaps": 21_953}
    assert {name: source.expect for name, source in by_name.items() if source.expect} == expected
    rules = {name: getattr(source, "rules", None) for name, source in by_name.items()}
    assert {rules[name].prompt for name in ("vqav2", "gqa", "okvqa", "ocr_vqa")} == {instructions.SHORT_ANSWER}
    assert rules["aokvqa"].prompt == instructions.LETTER
    assert rules["aokvqa"].rotations
    assert rules["textcaps"].prompt == instructions.ONE_SENTENCE
    assert (rules["refcoco"].fewer_than, rules["visual_genome"].per_image, by_name["ocr_vqa"].sample) == (10, 10, 80_000)
    assert rules["refcoco"].regions == rules["visual_genome"].regions == "random"
    assert {rules[name].prompt_at for name in ("vqav2", "gqa", "okvqa", "ocr_vqa", "aokvqa")} == {"first"}


def test_the_recipe_names_the_public_files(recipe):
    names = {path.name for source in recipe.sources for _, path in files_of(source)}
    assert {"train_balanced_questions.json", "aokvqa_v1p0_train.json", "refs(unc).p", "region_descriptions.json", "dataset.json"} <= names
    assert recipe.images == Path("playground/data")
