"use strict";
(() => {
  const { figures, colours, alts, notes } = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const partner = new Map(colours);
  const family = getComputedStyle(document.body).fontFamily;
  let printing = false;

  // A copy of a figure in which every light colour is replaced by its dark partner where the reader prefers dark.
  const themed = (value, key = "") => {
    if (Array.isArray(value)) return value.map((item) => themed(item, key));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, k)]));
    return /color$/.test(key) && dark.matches && !printing && partner.has(value) ? partner.get(value) : value;
  };

  const draw = (box) => {
    const name = box.dataset.figure;
    const figure = themed(figures[name]);
    figure.layout.font.family = family;
    if (printing) figure.layout.width = Math.min(box.clientWidth, box.dataset.half ? 320 : 660);
    else figure.layout.autosize = true;
    box.setAttribute("aria-label", alts[name]);
    return Plotly.react(box, figure.data, figure.layout, { displayModeBar: false, responsive: true, showTips: false });
  };
  const boxes = [...document.querySelectorAll(".chart")];
  const drawAll = () => boxes.forEach(draw);
  drawAll();

  const chooser = document.getElementById("estimator");
  const choose = () => {
    const box = document.getElementById("scores-chart");
    box.dataset.figure = chooser.value;
    document.getElementById("scores-note").textContent = notes[chooser.value];
    draw(box);
  };
  chooser.addEventListener("change", choose);
  // A browser that restores a form on reload changes the choice without an event.
  if (chooser.value !== document.getElementById("scores-chart").dataset.figure) choose();

  dark.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
})();
