"""The pages in a real browser: no error on the console, charts that are drawn, and nothing that leaves the page."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, browser, found
from made_runs import Made
from PIL import Image

from fastllava.evaluate.report.scores import Example, write_scores_page
from fastllava.evaluate.report.write import write_report

# Of each chart: how wide and high what is drawn in a colour of the page's is, grids and axes aside.
DRAWN = """
[...document.querySelectorAll("figure svg")].map((svg) => {
  const series = [...svg.querySelectorAll("path, use")].filter((path) => {
    const named = path.getAttribute("stroke") + path.getAttribute("fill");
    return /--(blue|pale|orange|green|red)/.test(named);
  });
  const boxes = series.map((path) => path.getBoundingClientRect());
  return [Math.max(0, ...boxes.map((box) => box.width)), Math.max(0, ...boxes.map((box) => box.height))];
})
"""
# Charts with words that lie on each other or outside the drawing.
UNREADABLE = """
[...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  const across = boxes.some((a) => a.left < frame.left - 0.5 || a.right > frame.right + 0.5);
  if (across || boxes.some((a) => a.top < frame.top - 1 || a.bottom > frame.bottom + 1)) {
    return [svg.getAttribute("aria-label") + " is cut"];
  }
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => meet(a, b)).map(() => svg.getAttribute("aria-label")));
})
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser. Skips where there is none."""
    if (program := found()) is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(run_made_once: Made) -> str:
    """The page of a run."""
    return write_report(run_made_once.folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_the_page_of_a_run(chromium: Browser, page: str, tmp_path: Path, width: int, dark: bool) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    seen = chromium.open(tmp_path / "page.html", width=width, dark=dark)
    assert (seen.problems, seen.requests) == ([], [])
    assert chromium.value("document.title") == "Stage 2, finetune: run"
    drawn = chromium.value(DRAWN)
    assert len(drawn) == 9
    assert all(across > 100 and up > 20 for across, up in drawn), drawn
    assert chromium.value(UNREADABLE) == []
    assert chromium.value("document.documentElement.scrollWidth") <= width
    pictures = chromium.value("[...document.images].map((image) => image.naturalWidth)")
    assert len(pictures) > 3
    assert all(pictures)
    red, green, blue = (int(part) for part in chromium.value("getComputedStyle(document.body).backgroundColor")[4:-1].split(","))
    assert (red + green + blue < 150) == dark


def test_values_are_told_under_the_pointer(chromium: Browser, page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    chromium.open(tmp_path / "page.html")
    chromium.value("document.querySelector('figure svg').scrollIntoView({block: 'center'})")
    left, top, width, height = chromium.value(
        "(({left, top, width, height}) => [left, top, width, height])(document.querySelector('figure svg').getBoundingClientRect())"
    )
    assert chromium.value("document.querySelector('.tip').hidden")
    chromium.move(left + 0.955 * width, top + height / 2)
    said = chromium.value("document.querySelector('.tip').textContent").split("\n")
    assert said == ["step 39", "each step: 0.5268", "held out: 1.5 (step 20)"]
    chromium.move(0, 0)
    assert chromium.value("document.querySelector('.tip').hidden")


def test_the_page_of_scores(chromium: Browser, tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), "teal").save(tmp_path / "a.png")
    figures = {"perception": 1500.0, "cognition": 300.0, **{f"category.{'very ' * i}long name": 100.0 + i for i in range(14)}}
    scores = {"benchmarks": {"mme": {"title": "MME", "value": 1500.0, "figures": figures}}}
    seen = chromium.open(write_scores_page(tmp_path / "report.html", scores, [Example("mme", "q", tmp_path / "a.png", "a", "b", 0.0)]))
    assert (seen.problems, seen.requests) == ([], [])
    assert len(chromium.value(DRAWN)) == 2
    assert all(across > 100 and up > 5 for across, up in chromium.value(DRAWN))
    assert chromium.value(UNREADABLE) == []


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (("</script>", "undefined_name();</script>"), "has refused"),
        (("</main>", "<script>console.error('wrong')</script></main>"), "violates"),
        (("</main>", "<p style='color: red'>x</p></main>"), "violates"),
        (("</main>", "<img src='http://127.0.0.1:1/x.png'></main>"), "violates"),
        (("script-src &#39;sha256-", "script-src &#39;unsafe-inline&#39;; x &#39;sha256-"), None),
    ],
)
def test_what_is_wrong_with_a_page_is_seen(
    chromium: Browser, page: str, tmp_path: Path, change: tuple[str, str], caught: str | None
) -> None:
    assert change[0] in page
    text = page.replace(*change)
    if caught is None:
        # Without the policy the script would run: its own errors are seen, and so is a request.
        text = text.replace("</main>", "<script>fetch('http://127.0.0.1:1/x'); undefined_name();</script></main>")
        text = text.replace("default-src &#39;none&#39;; ", "")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    seen = chromium.open(tmp_path / "page.html")
    assert seen.problems
    if caught is None:
        assert "undefined_name" in "".join(seen.problems)
        assert seen.requests == ["http://127.0.0.1:1/x"]


def test_a_chart_that_is_not_drawn_is_seen(chromium: Browser, page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.replace("<path d=", "<path data-d="), encoding="utf-8")
    chromium.open(tmp_path / "page.html")
    assert not all(across > 100 for across, _ in chromium.value(DRAWN))
