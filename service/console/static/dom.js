// Elements from data. Text stays text: nothing here, or anywhere in the console, turns a string into markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Properties: `class`, `on…` listeners, `style` as an object, `data-…`, `aria-…` and other attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  add(element, children);
  return element;
}

/** Append children: elements, text, lists of both; null and false are none. */
export function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren();
  return add(element, children);
}

let unique = 0;
export const newId = (prefix = "x") => `${prefix}-${++unique}`;

/** A labelled control; `hint` is read with it. */
export function field(label, control, hint) {
  control.id ||= newId("f");
  const about = hint ? h("span", { class: "hint", id: newId("hint") }, hint) : null;
  if (about) control.setAttribute("aria-describedby", about.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, about);
}

/** What is wider than the window scrolls by itself, by keyboard too. */
export const tableScroll = (...children) => h("div", { class: "table-scroll", tabindex: 0, role: "group", "aria-label": "Table" }, ...children);

export function select(options, chosen, properties = {}) {
  return h("select", properties, options.map((one) => {
    const [value, text] = Array.isArray(one) ? one : [one, one];
    return h("option", { value, selected: value === chosen }, text);
  }));
}

const PATHS = {
  system: "M3 4h14v9H3zM7 16h6M10 13v3",
  light: "M10 6a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM10 1.5v2M10 16.5v2M1.5 10h2M16.5 10h2M4 4l1.4 1.4M14.6 14.6 16 16M4 16l1.4-1.4M14.6 5.4 16 4",
  dark: "M16 12.2A6.8 6.8 0 0 1 7.8 4a6.8 6.8 0 1 0 8.2 8.2z",
  plus: "M10 4v12M4 10h12",
  minus: "M4 10h12",
  fit: "M3 7V3h4M13 3h4v4M17 13v4h-4M7 17H3v-4",
  upload: "M10 13V3M6 7l4-4 4 4M3 13v4h14v-4",
  play: "M6 4l10 6-10 6z",
  trash: "M4 6h12M8 6V4h4v2M6 6l.7 11h6.6L14 6",
  close: "M5 5l10 10M15 5 5 15",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** What a colour of the style sheet is now, as a canvas wants it. */
export function color(name, element = document.body) {
  const probe = h("span", { hidden: true, style: { color: `var(--${name})` } });
  element.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export function toast(text, kind = "note") {
  const shown = h("div", { class: `toast ${kind}` }, text);
  document.getElementById("toasts").append(shown);
  setTimeout(() => shown.remove(), kind === "bad" ? 9000 : 4000);
}

/** A modal dialog; resolves with what `close` is called with, null when it is dismissed. */
export function dialog(title, build, { dismiss = true } = {}) {
  return new Promise((resolve) => {
    const heading = h("h2", { id: newId("dialog") }, title);
    const box = h("dialog", { "aria-labelledby": heading.id }, heading);
    let result = null;
    const close = (value = null) => { result = value; box.close(); };
    add(box, [build(close)]);
    box.addEventListener("cancel", (event) => { if (!dismiss) event.preventDefault(); });
    box.addEventListener("close", () => { box.remove(); resolve(result); });
    document.body.append(box);
    box.showModal();
  });
}

/** Where something went wrong: what, and what to do. */
export function problemBox(problem, retry) {
  return h("div", { class: "problem", role: "alert" },
    h("strong", {}, problem.title ?? "Something went wrong"),
    h("p", {}, problem.message),
    problem.index !== undefined && h("p", {}, `At record ${Number(problem.index).toLocaleString("en")}. Nothing was changed.`),
    retry && h("button", { type: "button", onclick: retry }, "Try again"));
}
