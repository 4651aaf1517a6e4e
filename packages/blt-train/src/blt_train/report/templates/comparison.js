"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = { axis: "step", smoothing: 0.35, logx: false, clip: true, hidden: new Set() };
  const NS = "http://www.w3.org/2000/svg";

  // Numbers as people read them.
  const trim = (value, digits) => Number(value.toPrecision(digits)).toString();
  const scaled = (value, units, base) => {
    let index = 0, size = Math.abs(value);
    while (size >= base && index < units.length - 1) { size /= base; value /= base; index += 1; }
    return trim(value, 3) + units[index];
  };
  const plain = (value) => {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e5) return size < 1e15 ? scaled(value, ["", "k", "M", "G", "T"], 1000) : value.toExponential(2);
    return size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : trim(value, 4);
  };
  const bytes = (value) => scaled(value, [" B", " kB", " MB", " GB", " TB", " PB"], 1000);
  const percent = (value) => trim(100 * value, 3) + "%";
  const flops = (value) => value === 0 ? "0" : value.toExponential(1).replace("e+", "e");
  const duration = (value) => {
    if (value < 100) return trim(value, 3) + " s";
    if (value < 6000) return trim(value / 60, 3) + " min";
    return value < 360000 ? trim(value / 3600, 3) + " h" : trim(value / 86400, 3) + " d";
  };
  const count = (value) => Math.abs(value) < 1e5 ? Number(value.toPrecision(5)).toLocaleString("en") : scaled(value, ["", "k", "M", "G"], 1000);

  const AXES = {
    step: { name: "steps", format: count },
    bytes: { name: "bytes read", format: bytes },
    flops: { name: "model FLOPs", format: flops },
    seconds: { name: "training time", format: duration },
  };

  const CHARTS = [
    { column: "bpb", title: "Bits per byte, training", wide: true, format: plain, holdout: false },
    { holdout: true, title: "Bits per byte, held out", format: plain },
    { sources: true, format: plain },
    { column: "loss", title: "Loss", unit: "nats per target", format: plain },
    { column: "learning_rate", title: "Learning rate", format: plain, raw: true },
    { column: "gradient_norm", title: "Gradient norm", unit: "before clipping", format: plain, log: true },
    { column: "update_norm", title: "Update norm", format: plain, log: true },
    { column: "bytes_per_second", title: "Throughput", unit: "bytes per second, all ranks", format: (v) => bytes(v) + "/s", zero: true },
    { column: "flops_per_second_per_rank", title: "FLOP/s per rank", format: plain, zero: true },
    { column: "mfu", title: "Model FLOP utilisation", format: percent, zero: true },
    { column: "data_wait_share", title: "Data wait", unit: "share of the step", format: percent, zero: true },
    { column: "utilisation", title: "Data utilisation", unit: "tokens that are no padding", format: percent },
    { column: "mean_patch_length", title: "Mean patch length", unit: "tokens", format: plain },
    { column: "memory_bytes", title: "Peak memory", unit: "first rank", format: bytes, zero: true, raw: true },
    { column: "memory_reserved_bytes", title: "Peak memory reserved", unit: "first rank", format: bytes, zero: true, raw: true },
    { column: "nonfinite_steps", title: "Steps skipped as not finite", format: count, zero: true, raw: true, rare: true },
  ];

  function svg(tag, attributes, parent) {
    const element = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (parent) parent.appendChild(element);
    return element;
  }

  // Centred running mean over a share of the points; gaps stay gaps.
  function smooth(values, share) {
    const half = Math.round(values.length * share * share * 0.25);
    if (half < 1) return values;
    const sums = [0], counts = [0];
    values.forEach((value, i) => {
      sums.push(sums[i] + (value ?? 0));
      counts.push(counts[i] + (value === null ? 0 : 1));
    });
    return values.map((value, i) => {
      // At the steep beginning as far to the right as to the left, or the curve would be bent.
      const low = Math.max(0, i - half), high = Math.min(values.length, i + Math.min(half, i) + 1);
      return value === null ? null : (sums[high] - sums[low]) / (counts[high] - counts[low]);
    });
  }

  // What one chart draws of each run: positions, mean line, and the band or thin line behind it.
  function linesOf(chart, source) {
    const lines = [];
    data.runs.forEach((run, index) => {
      if (state.hidden.has(index)) return;
      if (chart.column) {
        const column = run.columns[chart.column];
        if (!column) return;
        const mean = chart.raw ? column.mean : smooth(column.mean, state.smoothing);
        lines.push({ index, x: run.positions[state.axis], y: mean, raw: chart.raw ? null : column.mean,
                     low: chart.raw ? null : column.low, high: column.high, dots: mean.length < 2 });
      } else {
        const y = source === undefined ? run.holdout.bpb : run.holdout.bySource[source];
        if (y && y.length) lines.push({ index, x: run.holdout.positions[state.axis], y, dots: y.length <= 60 });
      }
    });
    return lines;
  }

  function rangeX(lines) {
    let low = Infinity, high = -Infinity;
    for (const line of lines) for (const x of line.x) if (x !== null && (!state.logx || x > 0)) {
      low = Math.min(low, x); high = Math.max(high, x);
    }
    if (!state.logx) low = Math.min(low, 0);
    return high > low ? [low, high] : [low, low + 1];
  }

  const quantile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];

  // The values that count for the vertical range: with outliers clipped, neither the untrained model nor rare spikes.
  function rangeY(lines, chart) {
    const means = [], lows = [], highs = [];
    const usable = (y) => y !== null && (!chart.log || y > 0);
    for (const line of lines) {
      const skip = state.clip && line.y.length > 3;
      line.y.forEach((y, i) => { if (usable(y) && !(skip && line.x[i] === 0)) means.push(y); });
      for (const y of line.low ?? line.raw ?? []) if (usable(y)) lows.push(y);
      for (const y of line.high ?? line.raw ?? []) if (usable(y)) highs.push(y);
    }
    if (!means.length) return null;
    for (const list of [means, lows, highs]) list.sort((a, b) => a - b);
    let low = means[0], high = means.at(-1);
    if (!state.clip) {
      low = Math.min(low, lows[0] ?? low);
      high = Math.max(high, highs.at(-1) ?? high);
    } else if (means.length >= 8 && !chart.raw) {
      const top = quantile(means, 0.93);
      high = Math.min(high, top + 0.6 * (top - low));
      low = Math.min(low, quantile(lows, 0.05) ?? low);
      high = Math.max(high, Math.min(means.at(-1), quantile(highs, 0.93) ?? high), quantile(highs, 0.5) ?? high);
    }
    if (chart.log) return high / low < 1.2 ? [low / 1.5, high * 1.5] : [low / 1.08, high * 1.08];
    if (chart.zero) low = Math.min(0, low);
    const isFlat = high - low <= 1e-9 * Math.abs(high), pad = isFlat ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.06;
    return [chart.zero && low === 0 ? 0 : low - pad, high + pad];
  }

  function ticks(low, high, wanted) {
    const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough) ?? 10 * power;
    const result = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) result.push(Math.abs(t) < step * 1e-9 ? 0 : t);
    return result;
  }

  function logTicks(low, high, wanted) {
    const result = [];
    const decades = Math.log10(high / low);
    const factors = decades > wanted ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const skip = Math.max(1, Math.ceil(decades / wanted));
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += 1)
      for (const f of factors) { const t = f * 10 ** p; if (t >= low && t <= high && (f !== 1 || p % skip === 0)) result.push(t); }
    return result.length ? result : [low, high];
  }

  const place = (range, log, from, to) => {
    const f = log ? Math.log : (v) => v;
    const low = f(range[0]), span = f(range[1]) - low || 1;
    return (v) => from + (f(v) - low) / span * (to - from);
  };

  function pathOf(line, values, X, Y, ok) {
    let path = "", pen = false;
    values.forEach((y, i) => {
      const x = line.x[i];
      if (y === null || x === null || !ok(x, y)) { pen = false; return; }
      path += (pen ? "L" : "M") + X(x).toFixed(1) + " " + Y(y).toFixed(1);
      pen = true;
    });
    return path;
  }

  function bandOf(line, X, Y, ok) {
    const top = [], bottom = [];
    line.x.forEach((x, i) => {
      const low = line.low[i], high = line.high[i];
      if (low === null || high === null || !ok(x, low)) return;
      top.push(X(x).toFixed(1) + " " + Y(high).toFixed(1));
      bottom.push(X(x).toFixed(1) + " " + Y(low).toFixed(1));
    });
    return top.length ? "M" + top.join("L") + "L" + bottom.reverse().join("L") + "Z" : "";
  }

  let clips = 0;
  function draw(figure, chart, source) {
    const box = figure.querySelector(".plot");
    box.replaceChildren();
    const lines = linesOf(chart, source), yRange = lines.length ? rangeY(lines, chart) : null;
    if (!yRange) {
      const empty = document.createElement("div");
      empty.className = "empty";
      empty.textContent = "nothing to show of the runs chosen";
      box.appendChild(empty);
      return;
    }
    const width = Math.max(260, box.clientWidth), height = chart.wide ? 300 : 200;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": figure.dataset.title }, box);
    const xRange = rangeX(lines), axis = AXES[state.axis];
    const yTicks = chart.log ? logTicks(yRange[0], yRange[1], 5) : ticks(yRange[0], yRange[1], 5);
    const left = 14 + 6.3 * Math.max(...yTicks.map((t) => chart.format(t).length)), right = width - 12, top = 10, bottom = height - 34;
    const X = place(xRange, state.logx, left, right), Y = place(yRange, chart.log, bottom, top);
    const ok = (x, y) => (!state.logx || x > 0) && (!chart.log || y > 0);
    for (const t of yTicks) {
      svg("line", { class: "grid", x1: left, x2: right, y1: Y(t), y2: Y(t) }, root);
      svg("text", { x: left - 6, y: Y(t) + 4, "text-anchor": "end" }, root).textContent = chart.format(t);
    }
    const xTicks = state.logx ? logTicks(xRange[0], xRange[1], width / 110) : ticks(xRange[0], xRange[1], width / 110);
    let lastEnd = -Infinity;
    for (const t of xTicks) {
      const label = axis.format(t), at = Math.min(X(t), right - 3 * label.length);
      if (at - 3.4 * label.length < lastEnd) continue;
      lastEnd = at + 3.4 * label.length + 6;
      svg("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, root).textContent = label;
    }
    svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, root).textContent = axis.name;
    const clip = `clip${clips++}`;
    svg("rect", { x: left, y: top - 4, width: right - left + 4, height: bottom - top + 8 }, svg("clipPath", { id: clip }, svg("defs", {}, root)));
    const plot = svg("g", { "clip-path": `url(#${clip})` }, root);
    for (const line of lines) {
      const group = svg("g", { class: "r" + line.index % 8 + (line.index >= 8 ? " dashed" : "") }, plot);
      if (line.low && line.high) svg("path", { class: "band", d: bandOf(line, X, Y, ok) }, group);
      else if (line.raw && line.raw !== line.y) svg("path", { class: "raw", d: pathOf(line, line.raw, X, Y, ok) }, group);
      svg("path", { class: "mean", d: pathOf(line, line.y, X, Y, ok) }, group);
      if (line.dots) line.y.forEach((y, i) => {
        if (y !== null && ok(line.x[i], y)) svg("circle", { cx: X(line.x[i]), cy: Y(y), r: 3 }, group);
      });
    }
    hover(root, { lines, chart, X, left, right, top, bottom, width, axis });
  }

  function nearest(values, wanted) {
    let low = 0, high = values.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < wanted) low = middle + 1; else high = middle;
    }
    return low > 0 && wanted - values[low - 1] < values[low] - wanted ? low - 1 : low;
  }

  const tip = document.getElementById("tip");
  function hover(root, view) {
    const cross = svg("line", { class: "cross", y1: view.top, y2: view.bottom, visibility: "hidden" }, root);
    const hide = () => { cross.setAttribute("visibility", "hidden"); tip.hidden = true; };
    root.addEventListener("pointerleave", hide);
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * view.width;
      const share = (at - view.left) / (view.right - view.left);
      if (share < -0.02 || share > 1.02) { hide(); return; }
      const range = rangeX(view.lines);
      const wanted = state.logx ? range[0] * (range[1] / range[0]) ** share : range[0] + share * (range[1] - range[0]);
      const found = view.lines.map((line) => ({ line, i: nearest(line.x, wanted) })).filter(({ line, i }) => line.y[i] !== null);
      if (!found.length) { hide(); return; }
      const closest = found.reduce((a, b) => Math.abs(b.line.x[b.i] - wanted) < Math.abs(a.line.x[a.i] - wanted) ? b : a);
      const x = closest.line.x[closest.i];
      cross.setAttribute("x1", view.X(x)); cross.setAttribute("x2", view.X(x)); cross.setAttribute("visibility", "visible");
      tip.replaceChildren();
      const head = document.createElement("div");
      head.textContent = `${view.axis.name}: ${view.axis.format(x)}`;
      tip.appendChild(head);
      for (const { line, i } of found) {
        const row = document.createElement("div"), swatch = document.createElement("span"), name = document.createElement("span"), value = document.createElement("b");
        swatch.className = "swatch r" + line.index % 8;
        name.textContent = data.runs[line.index].name;
        value.textContent = view.chart.format(line.y[i]);
        row.append(swatch, name, value);
        tip.appendChild(row);
      }
      tip.hidden = false;
      const space = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - space.width - 8)) + "px";
      tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - space.height - 8)) + "px";
    });
  }

  // One figure per chart that any run has numbers for.
  const container = document.getElementById("charts"), figures = [];
  function addFigure(chart, title, unit, source) {
    const figure = document.createElement("figure");
    figure.className = "chart" + (chart.wide ? " wide" : "");
    figure.dataset.title = title;
    const caption = document.createElement("figcaption"), note = document.createElement("span"), plot = document.createElement("div");
    caption.append(title, note);
    note.textContent = (unit ?? "") + (chart.log ? (unit ? ", " : "") + "log scale" : "");
    plot.className = "plot";
    figure.append(caption, plot);
    container.appendChild(figure);
    figures.push(() => draw(figure, chart, source));
  }
  const isShown = (column, chart) => column && (!chart.rare || column.mean.some((value) => value > 0));
  for (const chart of CHARTS) {
    if (chart.sources) {
      const names = new Set(data.runs.flatMap((run) => Object.keys(run.holdout.bySource)));
      [...names].sort().forEach((name) => addFigure(chart, "Held out: " + name, "bits per byte", name));
    } else if (chart.column ? data.runs.some((run) => isShown(run.columns[chart.column], chart)) : data.runs.some((run) => run.holdout.bpb.length)) {
      addFigure(chart, chart.title, chart.unit);
    }
  }
  if (!figures.length) {
    const empty = document.createElement("p");
    empty.className = "soft";
    empty.textContent = "No run has a step yet.";
    container.appendChild(empty);
  }
  const redraw = () => figures.forEach((one) => one());

  const select = document.getElementById("axis");
  for (const name of data.axes) {
    const highest = Math.max(0, ...data.runs.map((run) => run.positions[name].at(-1) ?? 0));
    if (highest > 0 || name === "step") select.add(new Option(AXES[name].name, name));
  }
  select.addEventListener("change", () => { state.axis = select.value; redraw(); });
  const smoothing = document.getElementById("smoothing");
  smoothing.addEventListener("input", () => { state.smoothing = smoothing.value / 100; redraw(); });
  const logx = document.getElementById("logx"), outliers = document.getElementById("outliers");
  logx.addEventListener("change", () => { state.logx = logx.checked; redraw(); });
  outliers.addEventListener("change", () => { state.clip = outliers.checked; redraw(); });
  document.querySelectorAll("button.run").forEach((button) => button.addEventListener("click", () => {
    const index = Number(button.dataset.run);
    state.hidden.has(index) ? state.hidden.delete(index) : state.hidden.add(index);
    button.setAttribute("aria-pressed", String(!state.hidden.has(index)));
    document.querySelectorAll(`.sample[data-run="${index}"]`).forEach((sample) => { sample.hidden = state.hidden.has(index); });
    redraw();
  }));

  document.querySelectorAll(".sample input").forEach((slider) => slider.addEventListener("input", () => {
    const texts = slider.parentElement.querySelectorAll("pre");
    texts.forEach((text, index) => { text.hidden = index !== Number(slider.value); });
    slider.parentElement.querySelector("output").textContent = "step " + Number(texts[slider.value].dataset.step).toLocaleString("en");
  }));
  const allKeys = document.getElementById("all-keys");
  if (allKeys) allKeys.addEventListener("change", () => document.getElementById("config").classList.toggle("differing", !allKeys.checked));

  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); });
  redraw();
})();
