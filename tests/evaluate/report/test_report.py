"""The page of a run: every state a run may be in, what is damaged, and what the records and answers of others cannot do."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import ATTACK, Made, eval_row, step_row
from typer.testing import CliRunner

from fastllava.cli import app
from fastllava.errors import UserError
from fastllava.evaluate.report.data import RECORDS
from fastllava.evaluate.report.page import LONGEST
from fastllava.evaluate.report.write import write_report

HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


class Page(HTMLParser):
    """The text and the elements of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._words: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._words.append(data)

    def charts(self) -> list[str]:
        """The titles of the charts over steps."""
        return re.findall(r'<figure class="chart" data-hover[^>]*>\s*<figcaption>([^<]*)', self.source)


def page_of(made: Made) -> Page:
    return Page(write_report(made.folder))


def test_a_complete_run(make_run: Callable[[], Made]) -> None:
    page = page_of(make_run())
    assert "Stage 2, finetune: run complete" in page.text
    assert page.charts() == ["Loss", "Held-out loss", "Learning rate", "Gradient norm", "Throughput", "Samples", "Data wait"]
    for words in ("40 of 40", "1.5000", "NVIDIA H100 2 processes", "goodput 90%", "0123abc", "2 h 02 min"):
        assert words in page.text
    assert page.text.count("supervised</p>") == 0
    assert page.source.count('class="card record') == RECORDS
    assert len([1 for tag, said in page.tags if tag == "img" and str(said["src"]).startswith("data:image/")]) == RECORDS - 2 + 1


def test_the_command_writes_beside_the_run_or_where_it_is_told(make_run: Callable[[], Made], tmp_path: Path) -> None:
    made = make_run()
    done = CliRunner().invoke(app, ["report", str(made.folder)])
    assert (done.exit_code, done.output.replace("\n", "")) == (0, f"report: {made.folder / 'report.html'}")
    elsewhere = tmp_path / "elsewhere.html"
    CliRunner().invoke(app, ["report", str(made.folder), "--out", str(elsewhere)])
    assert elsewhere.read_bytes() == (made.folder / "report.html").read_bytes()


def test_memory_and_mfu_are_drawn_where_there_is_a_gpu(make_run: Callable[[], Made]) -> None:
    rows = [step_row(i, mfu=0.5, hfu=0.6, peak_memory_bytes=2**33) for i in range(5)]
    page = page_of(make_run().write("metrics.jsonl", rows))
    assert page.charts()[-3:] == ["MFU", "Data wait", "Peak GPU memory"]
    assert "50.0% HFU 60.0%" in page.text
    assert "8.0 GiB" in page.text


@pytest.mark.parametrize(
    ("status", "steps", "word", "said"),
    [
        ("interrupted", 40, "stopped", "A signal stopped the run before step 40"),
        ("failed", 40, "failed", "The run ended with an error before step 40"),
        # It was stopped there, went on, and was killed.
        ("interrupted", 10, "ended", "The run ended after step 39 without a word"),
    ],
)
def test_how_a_run_has_ended(make_run: Callable[[], Made], status: str, steps: int, word: str, said: str) -> None:
    made = make_run()
    page = page_of(made.write("run_summary.json", {**made.summary, "status": status, "steps": steps}))
    assert f"finetune: run {word}" in page.text
    assert said in page.text


def test_a_run_without_a_summary_was_killed_or_is_going_on(make_run: Callable[[], Made]) -> None:
    made = make_run()
    (made.folder / "run_summary.json").unlink()
    (made.folder / ".lock").touch()
    page = page_of(made)
    assert "finetune: run ended" in page.text
    # What the summary would have told is found by the config.
    assert "40 of 40" in page.text
    assert page.source.count('class="card record') == RECORDS
    command = [sys.executable, "-c", HOLDS, str(made.folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        page = page_of(made)
        holder.communicate()
    assert "finetune: run running" in page.text


def test_a_run_that_has_taken_no_step(make_run: Callable[[], Made]) -> None:
    made = make_run()
    for name in ("run_summary.json", "metrics.jsonl"):
        (made.folder / name).unlink()
    page = page_of(made)
    assert "finetune: run not begun" in page.text
    assert "metrics.jsonl holds no step yet" in page.text


def test_damaged_lines_are_counted_and_left_out(make_run: Callable[[], Made]) -> None:
    made = make_run()
    path = made.folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    deep = b"[" * 100_000 + b"\n"
    lines[5:6] = [b"\x00\xff\n", b'{"step": -1, "loss": 1}\n', b'{"step": 3.5, "loss": 1}\n', b"[]\n", deep, b'{"step": 1}\n']
    path.write_bytes(b"".join(lines) + b'{"step": 40, "lo')
    page = page_of(made)
    assert "6 lines of metrics.jsonl are damaged and left out here" in page.text
    assert "metrics.jsonl lacks the rows of 1 of 40 steps" in page.text


def test_values_that_are_no_numbers_or_not_finite_leave_gaps(make_run: Callable[[], Made]) -> None:
    rows = [
        step_row(0, grad_norm=None),
        step_row(1, grad_norm=float("nan")),
        {**step_row(2), "loss": float("inf")},
        {**step_row(3), "lr": "x"},
    ]
    page = page_of(make_run().write("metrics.jsonl", [*rows, eval_row(4, None), eval_row(4, float("nan"))]))
    assert page.charts()[0] == "Loss"


ODD = [None, True, "x", -1, float("nan"), 10**400, [], {}, [1], {"a": 1}, "\ud800\x00"]


@pytest.mark.parametrize("shift", range(3))
def test_values_of_another_kind_are_passed_over(make_run: Callable[[], Made], shift: int) -> None:
    """Every key of every file once with something that nobody would write there."""
    made = make_run()
    rows = [step_row(i, mfu=0.5, hfu=0.5, peak_memory_bytes=5, spike={"skipped": False}) for i in range(60)]
    for number, key in enumerate(rows[0]):
        rows[number + 1][key] = ODD[(number + shift) % len(ODD)]
    asked = [{**eval_row(0, 1.0)["samples"][0], key: ODD[(n + shift) % len(ODD)]} for n, key in enumerate(eval_row(0, 1.0)["samples"][0])]
    evaluations = [{**eval_row(5 + n, 1.0), "samples": asked, "held_out_loss": value} for n, value in enumerate(ODD)]
    summary = {key: ODD[(number + shift) % len(ODD)] for number, key in enumerate(made.summary)}
    pope = {
        "title": 1,
        "value": 2.0,
        "unit": 1.0,
        "published": {"7b": 1},
        "warnings": ["w"],
        "noise": "n",
        "judge": {},
        "figures": {"a": 1.0, "b": 2},
    }
    benchmarks = {key: {**pope, key: ODD[(number + shift) % len(ODD)]} for number, key in enumerate(pope)}
    made.write("metrics.jsonl", [*rows, *evaluations]).write("run_summary.json", summary).write("scores.json", {"benchmarks": benchmarks})
    assert page_of(made).charts()[0] == "Loss"


def test_text_of_others_is_text(make_run: Callable[[], Made], tmp_path: Path) -> None:
    page = page_of(make_run())
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [said for _, said in page.tags if any(name.startswith("on") or name == "style" for name in said)]
    assert ATTACK in page.text
    assert "49" not in re.findall(r"\S+", page.text.partition("Some records")[0])
    for hidden in ("\u202e", "\x1b", "\x00"):
        assert hidden not in page.source
    addresses = [value for _, said in page.tags for name, value in said.items() if name in ("src", "href", "xlink:href", "action")]
    assert all(str(value).startswith(("data:", "#")) for value in addresses)


def test_the_policy_allows_this_page_s_own_style_and_script_alone(make_run: Callable[[], Made]) -> None:
    page = page_of(make_run())
    policy = next(said["content"] for tag, said in page.tags if said.get("http-equiv") == "Content-Security-Policy")
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-[^' ]+'; script-src 'sha256-[^' ]+'; base-uri 'none'; form-action 'none'",
        str(policy),
    )


def test_a_page_does_not_grow_with_the_run_or_its_texts(make_run: Callable[[], Made]) -> None:
    rows = [step_row(i) for i in range(30_000)]
    long = [{**eval_row(0, 1.0)["samples"][0], "answer": "x" * 10**6, "id": i} for i in range(50)]
    made = make_run().write("metrics.jsonl", [*rows, {**eval_row(9, 1.0), "samples": long}])
    page = page_of(made)
    assert len(page.source) < 3e6
    assert f"{'x' * LONGEST}... (1,000,000 characters)" in page.text
    assert "Of 30,000 steps each chart shows the lowest and the highest value in each of 1,000 equal stretches" in page.text


def test_a_prepared_set_or_config_that_is_gone_is_told(make_run: Callable[[], Made], tmp_path: Path) -> None:
    made = make_run()
    made.write("run_summary.json", {**made.summary, "prepared": str(tmp_path / "gone")})
    assert "The prepared set cannot be shown" in page_of(made).text
    made.write("run_summary.json", made.summary).write("run_config.json", {**made.config, "invented": 1})
    page = page_of(made)
    assert "Records cannot be shown: invented" in page.text
    assert "Another training" in page.text


def test_bad_records_are_listed_by_reason(make_run: Callable[[], Made]) -> None:
    text = page_of(make_run()).text
    for reason in ("image_not_found 1", "image_path 1", "conversations 1"):
        assert reason in text


def test_scores_of_the_run_are_part_of_it(make_run: Callable[[], Made], tmp_path: Path) -> None:
    made = make_run()
    scores = {"checkpoint": str(made.folder / "checkpoint-40"), "benchmarks": {"pope": {"title": "POPE", "value": 85.9, "figures": {}}}}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.json").write_text(json.dumps(scores))
    assert "Scores: eval" in page_of(made).text
    (tmp_path / "eval" / "scores.json").write_text(json.dumps({**scores, "checkpoint": "elsewhere"}))
    assert "Scores: eval" not in page_of(made).text


def test_a_folder_without_a_run_is_refused_and_those_below_it_are_named(make_run: Callable[[], Made], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run .* give the output_dir"):
        write_report(tmp_path)
    made = make_run()
    with pytest.raises(UserError, match=re.escape(f"give {made.folder}")):
        write_report(tmp_path)
    with pytest.raises(UserError, match=r"--out: .* is a folder"):
        write_report(made.folder, tmp_path)
    with pytest.raises(UserError, match=r"--out: .* cannot be written \(.*\); give another place"):
        write_report(made.folder, made.folder / "metrics.jsonl" / "report.html")
    assert write_report(made.folder, tmp_path / "new" / "report.html").is_file()


def test_a_checkpoint_is_no_run(make_run: Callable[[], Made]) -> None:
    made = make_run()
    below = made.folder / "checkpoint-40"
    below.mkdir(exist_ok=True)
    (below / "run_config.json").write_bytes((made.folder / "run_config.json").read_bytes())
    with pytest.raises(UserError, match=re.escape(f"give the run's folder {made.folder.resolve()}")):
        write_report(below)
    assert not (below / "report.html").exists()
