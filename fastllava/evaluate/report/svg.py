"""Matplotlib's SVG made fit for a page: the page's colours and type, no inline style, ids that do not meet those of other drawings."""

import hashlib
import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = {
    name: f"#0102{number:02x}"
    for number, name in enumerate(("ink", "soft", "line", "grid", "blue", "pale", "orange", "green", "red", "grey"), 16)
}
"""What to draw in, by the page's names of its colours: they change between light and dark."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastllava",
    "text.parse_math": False,
    "font.size": 9.5,
    "path.simplify": True,
    "axes.unicode_minus": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "text.color": COLOURS["ink"],
}
"""Matplotlib's settings for every drawing; `rc_context(SETTINGS)` around making one, too."""
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NAMES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LEFT_OUT = {"font-family", "font-style", "font-variant", "font-stretch"}


def svg_of(figure: Figure, label: str) -> Markup:
    """The drawing as an <svg> element; `label` is what a screen reader says of it."""
    drawn = io.StringIO()
    with rc_context(SETTINGS), warnings.catch_warnings():
        # The reader's fonts draw the text: that matplotlib's own lacks a letter does not matter.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    root = ElementTree.fromstring(text.encode())  # noqa: S314 (matplotlib has just written it)
    prefix = f"c{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    _rewrite(root, prefix, _referenced(root))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label}
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 (serialised, so escaped)


def _referenced(root: ElementTree.Element) -> set[str]:
    """The ids that something in the drawing points to."""
    found: set[str] = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == f"{{{_XLINK}}}href":
                found.add(value.removeprefix("#"))
            found.update(_REFERENCE.findall(value))
    return found


def _rewrite(element: ElementTree.Element, prefix: str, kept: set[str]) -> None:
    for child in list(element):
        if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
            element.remove(child)
        else:
            _rewrite(child, prefix, kept)
    if not (element.text or "").strip():
        element.text = None
    element.tail = None
    attributes: dict[str, str] = {}
    for name, value in element.attrib.items():
        if name == "style":
            for declaration in value.split(";"):
                key, _, said = declaration.partition(":")
                if key.strip() and key.strip() not in _LEFT_OUT:
                    attributes[key.strip()] = _NAMES.get(said.strip(), said.strip())
        elif name == "id":
            if value in kept:
                attributes["id"] = prefix + value
        elif name == f"{{{_XLINK}}}href":
            attributes[name] = f"#{prefix}{value.removeprefix('#')}"
        else:
            attributes[name] = _REFERENCE.sub(rf"url(#{prefix}\1)", " ".join(value.split()))
    element.attrib.clear()
    element.attrib.update(attributes)
