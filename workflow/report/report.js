"use strict";
// A click on a head sorts a table; menus and a text field filter its rows. Without this script tables show all rows.
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

  if (original.length < 6) continue;
  const controls = document.createElement("div");
  controls.className = "controls";
  const labelled = (text, field) => {
    const label = document.createElement("label");
    label.append(text, field);
    controls.append(label);
    return field;
  };
  const menus = heads.flatMap((head, column) => {
    if (!("choose" in head.dataset)) return [];
    const values = [...new Set(original.map((row) => row.cells[column].textContent))];
    if (values.length < 2) return [];
    const menu = labelled(head.textContent, document.createElement("select"));
    menu.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    return [{ menu, column }];
  });
  const words = labelled("contains", document.createElement("input"));
  words.type = "search";
  words.size = 14;
  const count = document.createElement("output");
  controls.append(count);
  table.closest(".scroll").before(controls);

  const filter = () => {
    const wanted = words.value.toLowerCase();
    let shown = 0;
    for (const row of original) {
      const chosen = menus.every(({ menu, column }) => !menu.value || row.cells[column].textContent === menu.value);
      row.hidden = !(chosen && row.textContent.toLowerCase().includes(wanted));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${original.length} rows`;
  };
  controls.addEventListener("input", filter);
  filter();
}
