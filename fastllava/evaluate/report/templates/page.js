
"use strict";
// Values under the pointer. The points lie in the figure's data-hover, in units of the data; `box` is the axes' place in the SVG.
for (const figure of document.querySelectorAll("figure[data-hover]")) {
  const plot = JSON.parse(figure.dataset.hover);
  const svg = figure.querySelector("svg");
  const [left, top, right, bottom] = plot.box;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, value] of Object.entries({ y1: top, y2: bottom, stroke: "var(--grey)", "stroke-width": 0.8, visibility: "hidden" })) {
    line.setAttribute(name, value);
  }
  svg.append(line);
  const written = (value) => {
    const size = Math.abs(value);
    if (value === null) return "not finite";
    if (size >= 1e4 && size < 1e15) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };
  const nearest = (values, wanted) => {
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] <= wanted) low = middle; else high = middle;
    }
    return Math.abs(values[low] - wanted) <= Math.abs(values[high] - wanted) ? low : high;
  };
  const hide = () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); };
  const show = (event) => {
    const frame = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / frame.width;
    const at = (event.clientX - frame.left) * scale;
    if (at < left - 4 || at > right + 4) return hide();
    const wanted = plot.x[0] + (at - left) / (right - left) * (plot.x[1] - plot.x[0]);
    const first = plot.series[0], x = first.x[nearest(first.x, wanted)];
    const lines = [`${plot.name} ${x.toLocaleString("en")}`];
    for (const series of plot.series) {
      const i = nearest(series.x, x);
      const elsewhere = series.x[i] === x ? "" : ` (${plot.name} ${series.x[i].toLocaleString("en")})`;
      lines.push(`${series.name}: ${written(series.y[i])}${elsewhere}`);
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const place = left + (x - plot.x[0]) / (plot.x[1] - plot.x[0]) * (right - left);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.setAttribute("visibility", "visible");
    const outer = figure.getBoundingClientRect();
    const wish = frame.left - outer.left + place / scale + 10;
    const flipped = wish + tip.offsetWidth > outer.width - 4 ? wish - tip.offsetWidth - 20 : wish;
    tip.style.left = `${Math.max(4, flipped)}px`;
    tip.style.top = `${frame.top - outer.top + top / scale + 4}px`;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
