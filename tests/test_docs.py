"""The documents: every link leads somewhere, the map is the tree, and figures and messages that they quote are those of this version."""

import json
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import fastllava
from fastllava.data.checks import REASONS

REPO = Path(__file__).resolve().parents[1]
OWN = [
    REPO / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "kernels/aot.md", "tests/golden/README.md")
]
DOCUMENTS = [*OWN, *sorted((REPO / "docs").glob("*.md"))]
TEXTS = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
README = TEXTS["README.md"]


def without_code(text: str) -> str:
    """Markdown without its code, whose brackets are no links."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def links(text: str) -> list[str]:
    """Where the links and pictures of a page lead."""
    return [*re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)), *re.findall(r"<(https?://[^>]+)>", text)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, target: str) -> str | None:
    """What is wrong with a link of `page`, or None. Nothing is fetched."""
    if re.match(r"\w+:", target):
        parts = urlsplit(target)
        good = parts.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc) and not re.search(r"[\s<>\"]", target)
        return None if good else "no well-formed address"
    name, _, anchor = target.partition("#")
    place = (page.parent / name).resolve() if name else page
    if not place.is_relative_to(REPO) or not place.exists():
        return "leads nowhere"
    if anchor and anchor not in anchors(place.read_text(encoding="utf-8")):
        return "no such heading"
    return None


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    wrong = {target: what for target in links(TEXTS[name]) if (what := broken(REPO / name, target))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("docs/none.md", "leads nowhere"),
        ("../outside.md", "leads nowhere"),
        ("#no-such-heading", "no such heading"),
        ("docs/config.md#no-such-heading", "no such heading"),
        ("https://", "no well-formed address"),
        ("ftp://example.org/x", "no well-formed address"),
        ("docs/config.md", None),
        ("#how-it-works", None),
        ("https://example.org/a#b", None),
    ],
)
def test_the_link_checker_tells_good_links_from_bad_ones(target: str, what: str | None) -> None:
    assert broken(REPO / "README.md", target) == what


def test_readme_leads_to_every_page() -> None:
    led_to = {(REPO / target.partition("#")[0]).resolve() for target in links(README)}
    pages = [*(REPO / "docs").glob("*.md"), REPO / "CONTRIBUTING.md", REPO / "CITATION.cff"]
    assert [path.name for path in sorted(pages) if path not in led_to] == []


def test_every_picture_is_shown() -> None:
    shown = {(REPO / name).parent / target for name, text in TEXTS.items() for target in links(text)}
    assert [path.name for path in (REPO / "docs" / "images").iterdir() if path not in {place.resolve() for place in shown}] == []


def map_of_readme() -> set[str]:
    """The folders that the README's map names, from the root."""
    section = README[README.index("## A map of the repository") :]
    table = section[: section.index("\n## Glossary")]
    named: set[str] = set()
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`([\w/.]+?)/?`", cell)
        named |= {first, *(f"{Path(first).parent}/{other}" for other in others)}
    return named


def test_the_map_is_the_tree() -> None:
    named = map_of_readme()
    assert [name for name in sorted(named) if not (REPO / name).is_dir()] == []
    top = {path.name for path in REPO.iterdir() if path.is_dir() and any(path.rglob("*.*")) and not path.name.startswith(".")}
    kept = top - {"build", "dist", "demo", "runs", "wheels"} - {path.name for path in REPO.glob("*.egg-info")}
    assert kept <= named
    packages = {path.parent.relative_to(REPO).as_posix() for path in (REPO / "fastllava").glob("*/__init__.py")}
    assert packages <= named, "a folder of fastllava/ is missing in the map"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_floors_of_contributing_are_those_that_are_held() -> None:
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (shown,) = re.findall(r"```text\n(.*?)```", TEXTS["CONTRIBUTING.md"], re.DOTALL)
    floors = [re.split(r" {2,}", line)[0] for line in shown.splitlines()]
    assert floors == [*contracts[0]["layers"], "fastllava_kernels"]


def hours(size: str) -> list[float]:
    """The hours of both stages, as the committed plan foresees them."""
    stages = json.loads((REPO / "benches" / "results" / f"plan_8xa100-80g_{size}.json").read_text(encoding="utf-8"))
    return [stage["hours"] for stage in stages]


def test_the_hours_of_readme_are_those_of_the_plans() -> None:
    row = re.search(r"^\| \*\*fastllava\*\* \|(.*)\|$", README, re.MULTILINE)
    assert row is not None
    cells = [cell.strip() for cell in row[1].split("|")]
    for size, cell in zip(("7b", "13b"), cells, strict=False):
        first, second = hours(size)
        assert cell == f"{first + second:.1f} ({first:.1f} + {second:.1f}), *predicted*"


def measured_on_a_cpu() -> Iterator[tuple[str, str]]:
    """(variant, how many times as fast as the original's recipe) of the table in docs/benchmarks.md, which `bench report` writes."""
    for line in TEXTS["docs/benchmarks.md"].splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")]
        if line.startswith("| finetune | 150m"):
            yield cells[3], cells[5].split(" ")[0]


def test_the_measured_column_of_readme_is_that_of_the_benchmark() -> None:
    found = dict(measured_on_a_cpu())
    assert set(found) == {"original", "transformers", "fastllava"}
    for variant in ("transformers", "fastllava"):
        assert re.search(rf"^\| \**{variant}\** \|.*\| {found[variant]} times as fast, \*measured\* \|$", README, re.MULTILINE), variant


def test_the_published_hours_are_those_of_the_configs() -> None:
    """The configs name the hours that the original took, and tests/test_configs.py holds them to the published ones."""
    for size in ("7b", "13b"):
        took = []
        for stage in ("pretrain", "finetune"):
            found = re.search(
                r"the original took ([\d.]+) hours", (REPO / "configs" / f"llava15_{size}_{stage}.yaml").read_text(encoding="utf-8")
            )
            assert found is not None
            took.append(float(found[1]))
        assert f"{sum(took):g} ({took[0]:g} + {took[1]:g}), *measured* by its authors" in README


def test_the_messages_of_troubleshooting_are_those_of_the_program() -> None:
    """Each heading quotes a message; its fixed parts stand in the source."""
    source = "\n".join(path.read_text(encoding="utf-8") for top in ("fastllava", "kernels") for path in (REPO / top).rglob("*.py"))
    headings = re.findall(r"^## (\d+)\. (.*)$", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert [int(number) for number, _ in headings] == list(range(1, 11))
    for _, heading in headings:
        for quoted in re.findall(r"`([^`]+)`", heading):
            for part in re.split(r"\.\.\.|;|<\w+>|wandb|model\.llm|'cuda'", quoted):
                assert part.strip(" :?';.") in source, quoted


def test_the_reference_that_the_kernels_page_shows_is_that_of_the_room() -> None:
    shown = re.search(r"^   ```python\n(.*?)^   ```$", TEXTS["docs/kernels.md"], re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert textwrap.dedent(shown[1]) == (REPO / "kernels" / "fastllava_kernels" / "swiglu" / "reference.py").read_text(encoding="utf-8")


def test_every_reason_of_the_quarantine_is_explained() -> None:
    page = TEXTS["docs/bad-records.md"]
    told = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page[page.index("## The reasons") :], re.MULTILINE))
    assert {reason: what.replace("`<image>`", "<image>") for reason, what in told.items()} == REASONS


def test_exit_codes_are_told() -> None:
    table = re.findall(r"^\| ([\d n+]+) \|", TEXTS["docs/what-a-run-leaves.md"], re.MULTILINE)
    assert table == ["0", "1", "2", "75", "128 + n"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"], citation["type"]) == (fastllava.__version__, "Apache-2.0", "software")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
