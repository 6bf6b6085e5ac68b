// The shell: which view is shown, sign-in, theme, and what is said when the service is away.

import { h, fill, field, icon, dialog, problemBox, toast } from "./dom.js";
import * as api from "./api.js";

const main = document.getElementById("main");
const banner = document.getElementById("banner");

const VIEWS = [
  [/^\/$/, "machines", () => import("./views/start.js")],
  [/^\/vms\/(?<vm>[^/]+)$/, "machines", () => import("./views/machine.js")],
  [/^\/vms\/(?<vm>[^/]+)\/(?<tab>[a-z]+)(?:\/(?<rest>.+))?$/, "machines", () => import("./views/machine.js")],
  [/^\/compare$/, "compare", () => import("./views/compare.js")],
  [/^\/operator$/, "operator", () => import("./views/operator.js")],
];

let current = null; // { abort, leave }

/** The parts of the hash: its path, and its parameters. */
export function place() {
  const [path, query = ""] = (location.hash.slice(1) || "/").split("?");
  return { path: decodeURI(path), query: new URLSearchParams(query) };
}

async function show() {
  const { path, query } = place();
  const found = VIEWS.map(([pattern, section, load]) => ({ match: pattern.exec(path), section, load })).find((one) => one.match);
  const params = { ...found?.match.groups };
  // Another tab of the same machine, or another trace of the same tab, is the view's own affair.
  if (current?.again && found && current.section === found.section && (await current.again(params, query))) return;
  current?.abort.abort();
  current?.leave?.();
  const abort = new AbortController();
  const mine = (current = { abort, section: found?.section });
  for (const link of document.querySelectorAll("[data-section]")) {
    if (link.dataset.section === found?.section) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const root = h("div", { class: "view" });
  try {
    if (!found) throw new api.Problem({ title: "There is no such page", detail: `Nothing is shown at ${path}.` }, 404);
    const view = await found.load();
    if (current !== mine) return;
    fill(main, root);
    const made = await view.show({ root, params, query, signal: abort.signal });
    Object.assign(mine, made);
  } catch (error) {
    if (api.isAbort(error) || current !== mine) return;
    if (!(error instanceof api.Problem)) console.error(error);
    fill(main, h("div", { class: "view narrow" }, problemBox(error, show), h("p", {}, h("a", { href: "#/" }, "All machines"))));
    mine.failed = true;
  }
}

export function go(path) {
  if (location.hash === `#${path}`) show();
  else location.hash = path;
}

window.addEventListener("hashchange", () => {
  if (location.hash === "#main") return;
  show().then(() => { if (!main.contains(document.activeElement)) main.focus({ preventScroll: true }); });
});
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });

// ---- the service is away: say so, look again, and take up where the page was

let looking = null;
api.signals.addEventListener("unreachable", () => {
  if (looking) return;
  fill(banner, h("div", { class: "banner bad" }, "The service does not answer. Looking again every two seconds; nothing on this page is lost."));
  looking = setInterval(async () => {
    try { if ((await fetch("/livez", { cache: "no-store" })).ok) back(); } catch { /* not yet */ }
  }, 2000);
});
function back() {
  if (!looking) return;
  clearInterval(looking);
  looking = null;
  fill(banner);
  toast("The service is back.");
  if (current?.failed) show();
  api.signals.dispatchEvent(new Event("back"));
}
api.signals.addEventListener("reachable", back);

// ---- sign-in

const sign = document.getElementById("sign");
api.signals.addEventListener("signed-in", () => { sign.hidden = false; });
api.signals.addEventListener("signed-out", () => { sign.hidden = true; });
sign.addEventListener("click", () => { api.signOut(); go("/"); show(); });

api.signals.addEventListener("sign-in", async ({ detail }) => {
  sign.hidden = true;
  const input = h("input", { type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const token = await dialog("Sign in", (close) => h("form", {
    onsubmit: (event) => { event.preventDefault(); if (input.value.trim()) close(input.value.trim()); },
  },
  detail.refused
    ? h("p", { class: "problem", role: "alert" }, "The token is not valid, or not any more. What you had begun is still here and goes on with another.")
    : h("p", {}, "This service asks for a token. ", h("span", { class: "muted" }, "The operator makes one with ", h("code", {}, "subpage token create"), ".")),
  field("Token", input, "Kept in the memory of this page alone: reloading it forgets the token."),
  h("div", { class: "actions" }, h("button", { type: "submit", class: "primary" }, "Sign in"))), { dismiss: false });
  api.setToken(token);
  detail.done();
});

// ---- theme: as the system says, or as chosen here

const THEMES = ["system", "light", "dark"];
const themed = document.getElementById("theme");
let theme = "system";
try { theme = THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system"; } catch { /* storage is off */ }
function setTheme(wanted) {
  theme = wanted;
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("theme", theme); } catch { /* storage is off */ }
  themed.setAttribute("aria-label", theme === "system" ? "Theme: as the system" : `Theme: ${theme}`);
  themed.title = themed.getAttribute("aria-label");
  fill(themed, icon(theme));
  window.dispatchEvent(new Event("theme"));
}
themed.addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => window.dispatchEvent(new Event("theme")));
setTheme(theme);
show();
