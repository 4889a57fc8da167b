"use strict";
// Show the values of a chart under the pointer. Without this the page lacks nothing else.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const { unit, first, last, series } = JSON.parse(figure.dataset.chart);
  const plot = figure.querySelector(".plot");
  const cursor = Object.assign(document.createElement("div"), { className: "cursor", hidden: true });
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  plot.append(cursor, tip);
  const shown = (value) =>
    value === null ? "-" : unit === "ratio" ? (100 * value).toFixed(1) + "%" : value.toLocaleString("en", { maximumSignificantDigits: 4 });
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = first + part * (last - first);
    tip.replaceChildren(`step ${Math.round(x).toLocaleString("en")}`);
    for (const { label, colour, x: xs, y: ys } of series) {
      let nearest = 0;
      xs.forEach((each, i) => { if (Math.abs(each - x) < Math.abs(xs[nearest] - x)) nearest = i; });
      const line = document.createElement("div");
      line.className = "s" + colour;
      const away = Math.abs(xs[nearest] - x) > Math.max(1, (last - first) / 50) ? ` (step ${xs[nearest]})` : "";
      line.append(document.createElement("i"), `${label} ${shown(ys[nearest])}${away}`);
      tip.append(line);
    }
    cursor.hidden = tip.hidden = false;
    cursor.style.left = `${100 * part}%`;
    tip.style.left = part < 0.5 ? `calc(${100 * part}% + 8px)` : "auto";
    tip.style.right = part < 0.5 ? "auto" : `calc(${100 * (1 - part)}% + 8px)`;
  });
  plot.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}
