"use strict";
// Menus choose the model, method and bits of everything that is shown; a cell opens with its images, recipe, provenance
// and logs; two methods are compared under a line that moves. A click on a head sorts a table; menus and a text field
// filter its rows. Without this script the page shows all rows and images.
const cells = JSON.parse(document.querySelector("#details").textContent);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const field = (box, text, control) => {
  box.append(make("label", {}, text, control));
  return control;
};
const choice = (values, all) => {
  const menu = make("select");
  menu.append(...(all ? [new Option("all", "")] : []), ...[...new Set(values)].map((value) => new Option(value, value)));
  return menu;
};

// What is shown: every table has a function here that filters it again.
const KEYS = ["model", "method", "bits"];
const refilter = [];
const form = document.querySelector("#show");
const menus = KEYS.map((key) => {
  const values = cells.map((cell) => (key === "bits" ? cell.bits.toUpperCase() : cell[key]));
  return field(form, key, choice(values, true));
});
const fits = (place, ...values) => {
  const wanted = menus[place].value;
  return !wanted || values.includes(wanted);
};
const show = () => {
  for (const element of document.querySelectorAll("main [data-model]")) {
    if (element.tagName === "TR") continue;
    const full = element.dataset.method === "fp"; // stands beside every method and width
    element.hidden = !KEYS.every((key, place) => {
      const value = element.dataset[key];
      return value === undefined || fits(place, value) || (full && key !== "model");
    });
  }
  for (const again of refilter) again();
};
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;

// A cell: images stand in the section of samples, everything else in #details.
const dialog = document.querySelector("#cell");
const label = (cell) => `${cell.model}, ${cell.method}, ${cell.bits.toUpperCase()}`;
const cellOf = (model, method, bits) =>
  cells.find((cell) => cell.model === model && cell.method === method && cell.bits.toUpperCase() === bits);
const figuresOf = (model, method, bits) =>
  [...document.querySelectorAll("#samples figure")].find(
    ({ dataset }) => dataset.model === model && dataset.method === method && dataset.bits === bits,
  );
const openCell = (cell) => {
  document.querySelector("#cell-title").textContent = label(cell);
  const body = document.querySelector("#cell-body");
  const row = [...document.querySelectorAll("#main-table tbody tr")].find((one) => one.dataset.cell === label(cell));
  body.replaceChildren(make("p", {}, cell.about));
  if (row) body.append(make("p", {}, make("a", { href: `#${row.id}`, onclick: () => dialog.close() }, "Link to its row")));
  const strips = make("div", { className: "scroll strips", tabIndex: 0 });
  for (const [method, bits] of [["fp", "W32A32"], [cell.method, cell.bits.toUpperCase()]]) {
    const figure = figuresOf(cell.model, method, bits);
    if (!figure || (method === "fp" && cell.method === "fp" && strips.children.length)) continue;
    strips.append(make("figure", {}, make("figcaption", {}, figure.querySelector("figcaption").textContent),
      figure.querySelector("img").cloneNode()));
  }
  if (strips.children.length) body.append(strips);
  for (const [title, text] of Object.entries(cell.parts)) {
    const part = make("details", { open: title === "Recipe" });
    part.append(make("summary", {}, title), make("pre", { tabIndex: 0 }, text));
    body.append(part);
  }
  dialog.showModal();
};
const opener = (element, cell) => {
  const button = make("button", { type: "button", className: "cell", title: `Images, recipe, provenance and logs of ${label(cell)}` });
  button.append(...element.childNodes);
  button.addEventListener("click", () => openCell(cell));
  element.append(button);
};
for (const figure of document.querySelectorAll("#samples figure")) {
  const { model, method, bits } = figure.dataset;
  const cell = cellOf(model, method, bits);
  if (cell) opener(figure.querySelector("figcaption"), cell);
}

// Two methods: the part of each image left of the line is that of A, the part right of it that of B.
const grids = [...document.querySelectorAll("#samples details.grid")];
if (grids.length) {
  const [section, canvas, line, box] = ["#compare", "#both", "#line", "#chosen"].map((id) => document.querySelector(id));
  const nameOf = (grid) => `${grid.dataset.model}, ${grid.dataset.bits}`;
  const rows = (grid) => [...grid.querySelectorAll("figure")];
  const methods = (grid) => rows(grid).map((figure) => figure.querySelector("figcaption").textContent);
  const which = field(box, "model and bits", choice(grids.map(nameOf)));
  const [a, b] = ["A", "B"].map((side) => field(box, side, make("select")));
  const chosenGrid = () => grids.find((grid) => nameOf(grid) === which.value);
  const offer = () => {
    const names = methods(chosenGrid());
    for (const [menu, fallback] of [[a, names[0]], [b, names.at(-1)]]) {
      const before = menu.value;
      menu.replaceChildren(...names.map((name) => new Option(name, name)));
      menu.value = names.includes(before) ? before : fallback;
    }
  };
  const draw = async () => {
    const grid = chosenGrid();
    const images = [a, b].map((menu) => rows(grid)[methods(grid).indexOf(menu.value)].querySelector("img"));
    await Promise.all(images.map((image) => image.decode()));
    const { naturalWidth, naturalHeight: height } = images[0];
    const columns = Number(images[0].dataset.columns);
    const width = (naturalWidth + 2) / columns - 2; // images of a strip are two pixels apart
    const scale = Math.max(1, Math.floor(104 / width));
    canvas.width = naturalWidth * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const left = Math.round((width * scale * line.value) / 100);
    for (let column = 0; column < columns; column++) {
      const start = column * (width + 2) * scale;
      for (const [image, from, to] of [[images[0], 0, left], [images[1], left, width * scale]]) {
        if (to <= from) continue;
        context.drawImage(image, column * (width + 2) + from / scale, 0, (to - from) / scale, height,
          start + from, 0, to - from, height * scale);
      }
      context.fillStyle = "#e11d74";
      context.fillRect(start + left - 1, 0, 2, height * scale);
    }
    canvas.setAttribute("aria-label", `${which.value}: ${a.value} left of the line, ${b.value} right of it`);
  };
  section.addEventListener("input", (event) => {
    if (event.target === which) offer();
    draw();
  });
  section.hidden = false;
  offer();
  draw();
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const original = [...body.rows];
  const content = (row, column) => {
    const cell = row.cells[column];
    return heads[column].dataset.kind === "number" ? cell.dataset.value : cell.textContent;
  };
  const compare = (column, direction) => (a, b) => {
    const [x, y] = [content(a, column), content(b, column)];
    if (x === "" || y === "") return (x === "") - (y === ""); // missing values come last in both directions
    const order = heads[column].dataset.kind === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
    return direction * order;
  };

  const places = [...KEYS, "versus"].map((key) => heads.findIndex((head) => head.textContent === key));
  const at = (row, place) => (places[place] < 0 ? undefined : row.cells[places[place]].textContent);
  for (const row of original) {
    const cell = cellOf(at(row, 0), at(row, 1), at(row, 2));
    if (cell && table.closest("#main-table")) {
      row.dataset.cell = label(cell);
      opener(row.cells[places[1]], cell);
    }
    // Out of the order of tabs, because a table has hundreds of rows; an opened cell has the link to its row.
    row.cells[0].prepend(make("a", { className: "row", href: `#${row.id}`, tabIndex: -1, ariaLabel: "Link to this row" }));
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.better === "higher" ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const next = head.ariaSort === first ? second : head.ariaSort === second ? null : first;
      for (const other of heads) other.removeAttribute("aria-sort");
      const rows = [...original];
      if (next) {
        head.setAttribute("aria-sort", next);
        rows.sort(compare(column, next === "ascending" ? 1 : -1));
      }
      body.append(...rows);
    });
  });

  // Without rows enough for controls of its own, a table still follows the menus of the page.
  const own = [];
  let words, count;
  if (original.length >= 6) {
    const controls = make("div", { className: "controls" });
    heads.forEach((head, column) => {
      const values = original.map((row) => row.cells[column].textContent);
      if (!("choose" in head.dataset) || new Set(values).size < 2) return;
      own.push({ menu: field(controls, head.textContent, choice(values, true)), column });
    });
    words = field(controls, "contains", make("input", { type: "search", size: 14 }));
    count = make("output");
    controls.append(count);
    table.closest(".scroll").before(controls);
    controls.addEventListener("input", () => filter());
  }

  const filter = () => {
    const wanted = words?.value.toLowerCase() ?? "";
    let shown = 0;
    for (const row of original) {
      const ofPage = KEYS.every((key, place) => {
        const values = [at(row, place), ...(key === "method" ? [at(row, 3)] : [])].filter((value) => value !== undefined);
        return !values.length || fits(place, ...values);
      });
      const chosen = own.every(({ menu, column }) => !menu.value || row.cells[column].textContent === menu.value);
      row.hidden = !(ofPage && chosen && row.textContent.toLowerCase().includes(wanted));
      shown += !row.hidden;
    }
    if (count) count.textContent = `${shown} of ${original.length} rows`;
  };
  filter.reset = () => {
    for (const { menu } of own) menu.value = "";
    if (words) words.value = "";
  };
  refilter.push(filter);
  filter();
}

// A link to a row shows it, whatever is filtered and closed.
const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  if (target.hidden) {
    for (const menu of menus) menu.value = "";
    for (const filter of refilter) filter.reset();
    show();
  }
  if (target.tagName === "TR") target.scrollIntoView({ block: "center" });
};
addEventListener("hashchange", reveal);
reveal();

// On paper nothing can be opened.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("main details:not([open])")];
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of closed) details.open = false;
});
