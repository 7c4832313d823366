// What a page does when it is touched: values under the pointer, smoothing and zoom of curves, and trials that are
// found again in every chart and table. Without it the page shows the same, still.
"use strict";
(() => {
  document.documentElement.classList.add("scripted");
  const SVG = "http://www.w3.org/2000/svg";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const short = (value) =>
    Math.abs(value) >= 1e4 ? value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 }) : number(value);
  const draw = (parent, name, attributes, text) => {
    const made = parent.appendChild(document.createElementNS(SVG, name));
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // One tip for the whole page; `fill` puts the content into it.
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  const show = (x, y, fill) => {
    tip.replaceChildren();
    fill(tip);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${Math.max(4, y + height + 18 < innerHeight ? y + 14 : y - height - 10)}px`;
  };
  const hide = () => { tip.hidden = true; };
  const line = (parent, text, strong) => {
    parent.appendChild(document.createElement(strong ? "b" : "div")).textContent = text;
  };

  // Scales of a chart, as `chart.py` has them.
  const share = ([low, high, log], value) => log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  const at = ([low, high, log], part) => log ? low * (high / low) ** part : low + part * (high - low);
  const ticks = ([low, high, log]) => {
    if (log && high / low > 10) {
      const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
      const every = Math.ceil((last - first + 1) / 6);
      return Array.from({ length: last - first + 1 }, (_, step) => 10 ** (first + step)).filter((_, step) => step % every === 0);
    }
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let place = Math.ceil(low / step); place * step <= high; place++) found.push(place * step);
    return found;
  };
  // Gaussian window without lag, as `smooth` of figures.py; `width` is its deviation, a share of the points.
  const smooth = (values, width) => {
    if (width === 0) return values;
    const deviation = Math.max(1e-9, width * values.length);
    return values.map((value, here) => {
      if (value === null) return null;
      let sum = 0, weight = 0;
      values.forEach((other, there) => {
        if (other === null) return;
        const w = Math.exp(-0.5 * ((there - here) / deviation) ** 2);
        sum += w * other;
        weight += w;
      });
      return sum / weight;
    });
  };

  const settings = { smoothing: null, from: 0, to: 1 };
  const charts = all("svg[data-chart]").map((svg) => {
    const data = JSON.parse(svg.dataset.chart);
    const [width, height, left, right, top, bottom] = data.frame;
    const box = { left, top, width: width - left - right, height: height - top - bottom };
    let view = { x: data.x, y: data.y };
    const px = (value) => box.left + box.width * share(view.x, value);
    const py = (value) => box.top + box.height * (1 - share(view.y, value));
    const path = (xs, ys) => {
      let before = false;
      return xs.map((x, place) => {
        if (ys[place] === null) { before = false; return ""; }
        const part = `${before ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[place]).toFixed(1)}`;
        before = true;
        return part;
      }).join("");
    };
    const lines = data.lines.map((each) => ({ ...each, shown: each.y }));

    const redraw = () => {
      const untouched = settings.smoothing === null && settings.from === 0 && settings.to === 1;
      const deviation = data.smooth ? settings.smoothing ?? Math.max(0.015, 1 / Math.max(...lines.map((each) => each.x.length))) : 0;
      lines.forEach((each) => { each.shown = smooth(each.y, deviation); });
      if (untouched && !svg.dataset.redrawn) return; // as it came
      svg.dataset.redrawn = "yes";
      const x = [at(data.x, settings.from), at(data.x, settings.to), data.x[2]];
      const seen = lines.flatMap((each) => each.y.filter((y, place) => y !== null && each.x[place] >= x[0] && each.x[place] <= x[1]));
      let y = data.y;
      if (seen.length > 1 && (settings.from > 0 || settings.to < 1)) {
        const low = Math.min(...seen), high = Math.max(...seen);
        if (high > low) y = data.y[2] ? [low / (high / low) ** 0.05, high * (high / low) ** 0.05, true] : [low - 0.05 * (high - low), high + 0.05 * (high - low), false];
      }
      view = { x, y };
      lines.forEach((each, index) => all(`path[data-line="${index}"]`, svg).forEach((drawn) => {
        drawn.setAttribute("d", path(each.x, drawn.classList.contains("faint") ? each.y : each.shown));
      }));
      all("[data-mark]", svg).forEach((mark) => {
        const [index, place] = mark.dataset.mark.split(",");
        const value = lines[index].shown[place];
        if (value === null) return;
        mark.setAttribute("cx", px(lines[index].x[place]));
        mark.setAttribute("cy", py(value));
      });
      const [across, up] = [svg.querySelector(".ticks.x"), svg.querySelector(".ticks.y")];
      [across, up].forEach((group) => group.replaceChildren());
      ticks(x).forEach((value) => {
        draw(across, "line", { x1: px(value), x2: px(value), y1: top, y2: height - bottom });
        draw(across, "text", { x: px(value), y: height - bottom + 4, dy: "1.1em", "text-anchor": "middle" }, short(value));
      });
      ticks(y).forEach((value) => {
        draw(up, "line", { x1: left, x2: width - right, y1: py(value), y2: py(value) });
        draw(up, "text", { x: left - 6, y: py(value), dy: ".35em", "text-anchor": "end" }, short(value));
      });
    };

    // The nearest values to a place between the axes, 0 to 1, with a line through them.
    let cross = null, place = null;
    const point = (part, clientX, clientY) => {
      const wanted = at(view.x, part);
      const near = (xs) => xs.reduce((best, x, index) => Math.abs(x - wanted) < Math.abs(xs[best] - wanted) ? index : best, 0);
      const longest = lines.reduce((one, other) => other.x.length > one.x.length ? other : one);
      place = near(longest.x);
      const x = longest.x[place];
      cross?.remove();
      cross = draw(svg, "line", { class: "cross", x1: px(x), x2: px(x), y1: top, y2: height - bottom });
      show(clientX, clientY, (into) => {
        line(into, `${number(x)} images`, true);
        lines.forEach((each) => {
          const here = near(each.x), value = each.y[here];
          if (value === null) return;
          const smoothed = data.smooth && each.shown[here] !== value ? `, smoothed ${number(each.shown[here])}` : "";
          line(into, `${each.name ? `${each.name}: ` : ""}${number(value)}${smoothed}`);
        });
      });
    };
    const leave = () => { cross?.remove(); cross = null; hide(); };
    const partOf = (event) => {
      const area = svg.getBoundingClientRect();
      const x = (event.clientX - area.left) * width / area.width;
      return Math.min(1, Math.max(0, (x - box.left) / box.width));
    };

    let drag = null, shade = null;
    svg.style.touchAction = "pan-y";
    svg.tabIndex = 0;
    svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse" && data.smooth) { drag = partOf(event); event.preventDefault(); } });
    svg.addEventListener("pointermove", (event) => {
      const part = partOf(event);
      point(part, event.clientX, event.clientY);
      shade?.remove();
      shade = drag === null ? null : draw(svg, "rect", {
        class: "window", x: box.left + box.width * Math.min(drag, part), y: top, width: box.width * Math.abs(part - drag), height: box.height,
      });
    });
    svg.addEventListener("pointerup", (event) => {
      if (drag === null) return;
      const [low, high] = [Math.min(drag, partOf(event)), Math.max(drag, partOf(event))];
      shade?.remove();
      drag = shade = null;
      if (high - low > 0.02) zoom(settings.from + low * (settings.to - settings.from), settings.from + high * (settings.to - settings.from));
    });
    svg.addEventListener("pointerleave", () => { leave(); shade?.remove(); drag = shade = null; });
    svg.addEventListener("dblclick", () => zoom(0, 1));
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") { leave(); zoom(0, 1); }
      if (step === undefined) return;
      event.preventDefault();
      const xs = lines.reduce((one, other) => other.x.length > one.x.length ? other : one).x;
      place = Math.min(xs.length - 1, Math.max(0, place === null ? (step > 0 ? 0 : xs.length - 1) : place + step));
      const area = svg.getBoundingClientRect(), part = share(view.x, xs[place]);
      point(part, area.left + (box.left + part * box.width) * area.width / width, area.top + area.height / 2);
    });
    return { redraw };
  });

  const redrawAll = () => charts.forEach((chart) => chart.redraw());
  const zoom = (from, to) => {
    Object.assign(settings, { from, to });
    all("input[data-zoom]").forEach((input) => { input.value = settings[input.dataset.zoom]; });
    redrawAll();
  };
  all("input[data-smoothing]").forEach((input) => input.addEventListener("input", () => {
    settings.smoothing = Number(input.value) ** 2;
    redrawAll();
  }));
  all("input[data-zoom]").forEach((input) => input.addEventListener("input", () => {
    const value = Number(input.value);
    if (input.dataset.zoom === "from") zoom(Math.min(value, settings.to - 0.02), settings.to);
    else zoom(settings.from, Math.max(value, settings.from + 0.02));
  }));
  all("button[data-reset]").forEach((button) => button.addEventListener("click", () => zoom(0, 1)));
  redrawAll();

  // Trials: the same one in every chart and table, with what its details say.
  const mark = (trial) => {
    all("[data-trial]").forEach((each) => each.classList.toggle("hot", each.dataset.trial === trial));
    all("svg.chart").forEach((svg) => svg.classList.toggle("dimmed", trial !== null && all("[data-trial].hot", svg).length > 0));
  };
  const open = () => {
    const details = location.hash.startsWith("#trial-") && document.getElementById(location.hash.slice(1));
    if (details) { details.open = true; details.scrollIntoView({ block: "nearest" }); }
  };
  addEventListener("hashchange", open);
  open();
  all("[data-trial]").forEach((each) => {
    const trial = each.dataset.trial;
    const enter = (x, y) => {
      mark(trial);
      const details = document.getElementById(`trial-${trial}`);
      if (each.tagName === "TR" || !details || each.closest("svg[data-chart]")) return;
      show(x, y, (into) => {
        line(into, `trial ${trial}`, true);
        all("[data-tip]", details).forEach((row) => line(into, row.dataset.tip));
        const image = details.querySelector("img");
        if (image) into.appendChild(image.cloneNode());
      });
    };
    const leave = () => { mark(null); if (!each.closest("svg[data-chart]")) hide(); };
    each.addEventListener("pointerenter", (event) => enter(event.clientX, event.clientY));
    each.addEventListener("pointerleave", leave);
    each.addEventListener("focus", () => { const area = each.getBoundingClientRect(); enter(area.right, area.top); });
    each.addEventListener("blur", leave);
    each.addEventListener("click", () => setTimeout(open));
  });

  // Tables that filter and sort.
  all("table[data-sorts]").forEach((table) => {
    const body = table.tBodies[0], rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
    const value = (row, column) => {
      const cell = row.cells[column], given = cell.dataset.value ?? cell.textContent.trim();
      return given === "" ? null : Number.isNaN(Number(given)) ? given : Number(given);
    };
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        all("[aria-sort]", table).forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const order = (one, other) => typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other));
        rows.sort((one, other) => {
          const [a, b] = [value(one, column), value(other, column)];
          return a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * order(a, b);
        });
        body.append(...rows);
      });
    });
    const filter = document.querySelector(`input[data-filters="${table.id}"]`);
    const condition = (word) => {
      const [, name, sign, limit] = word.match(/^([^<>=]+)(<=|>=|<|>|=)(.+)$/) ?? [];
      const column = name === undefined ? -1 : heads.findIndex((head) => head.toLowerCase().includes(name));
      if (column < 0) return (row) => row.textContent.toLowerCase().includes(word);
      return (row) => {
        const found = value(row, column), wanted = Number(limit);
        if (found === null) return false;
        if (sign === "=" || typeof found !== "number") return String(found).toLowerCase() === limit || found === wanted;
        return { "<": found < wanted, ">": found > wanted, "<=": found <= wanted, ">=": found >= wanted }[sign];
      };
    };
    filter?.addEventListener("input", () => {
      const asked = filter.value.toLowerCase().split(/\s+/).filter(Boolean).map(condition);
      rows.forEach((row) => {
        row.hidden = !asked.every((holds) => holds(row));
        all(`svg [data-trial="${row.dataset.trial}"], details[data-of="${row.dataset.trial}"]`).forEach((each) => {
          each.classList.toggle("out", row.hidden);
          if (each.tagName === "DETAILS") each.hidden = row.hidden;
        });
      });
      const count = rows.filter((row) => !row.hidden).length;
      filter.nextElementSibling.textContent = `${count} of ${rows.length}`;
    });
  });
})();
