// Elements and figures. All that an engine or a trainer said becomes text, never markup.

/** An element; strings among the children become text nodes. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const drawn = new Map();

/** Put what `render` makes of `facts` into the element of that id, if the facts are new. */
export function show(id, facts, render) {
  const key = JSON.stringify(facts);
  if (drawn.get(id) === key) return;
  drawn.set(id, key);
  document.getElementById(id).replaceChildren(...[render(facts)].flat().filter((made) => made !== null));
}

/** A table; each row is a list of cells, strings or elements, or a list with a class. */
export function table(heads, rows) {
  const cell = (content, index) => {
    const made = el(index === 0 ? "th" : "td", index === 0 ? { scope: "row" } : {});
    made.append(content);
    made.dataset.head = heads[index];
    return made;
  };
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" },
    el("table", {},
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
}

export function seconds(value) {
  if (value < 1e-3) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1e3).toPrecision(3)} ms`;
  if (value < 100) return `${value.toPrecision(3)} s`;
  return ago(value);
}

/** Long times, as people say them. */
export function ago(value) {
  if (value < 60) return `${Math.max(0, Math.floor(value))} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86400) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86400)} d ${Math.floor((value % 86400) / 3600)} h`;
}

export function bytes(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

export function clock(at) {
  const when = new Date(at * 1000);
  const time = when.toLocaleTimeString([], { hour12: false });
  return when.toDateString() === new Date().toDateString() ? time : `${when.toLocaleDateString()} ${time}`;
}
