// The rest of the page: state, figures, errors, workers, engines, checksums.

import { advice } from "./advice.js";
import { ago, bytes, clock, el, seconds, show, table } from "./dom.js";

const KNOWN = ["detached", "ready", "shadowing", "paused", "receiving", "torn"];
// put back by a person: no push
const BACK = ["rolled_back", "reloaded"];
const SERVES_NONE = ["detached", "torn"];
const ROWS_SHOWN = 500;

export function drawState(status) {
  const told = advice(status);
  const box = document.getElementById("state");
  box.dataset.state = KNOWN.includes(status.state) ? status.state : "unknown";
  const where = SERVES_NONE.includes(status.state) ? "" : ` · version ${status.version}`;
  const target = status.target === null ? "" : ` → ${status.target}`;
  // text that stays the same is not written again: it would be read out again
  const write = (id, text) => {
    const element = document.getElementById(id);
    if (element.textContent !== text) element.textContent = text;
  };
  write("state-name", `${told.name}${where}${status.state === "torn" ? "" : target}`);
  write("state-means", told.means);
  const cause = SERVES_NONE.includes(status.state) ? (status.last_errors.at(-1) ?? null) : null;
  show("state-do", { items: told.do, cause }, ({ items }) => [
    items.length ? el("h3", {}, "What to do") : null,
    ...items.map((item) => (item.code ? el("pre", {}, el("code", {}, item.code)) : el("p", {}, item))),
    cause ? el("div", { class: "cause" }, el("h3", {}, "The last error"), ...errorLines(cause)) : null,
  ]);
  document.title = `${told.name}${where} · weightsync`;
}

export function drawFacts(status, now) {
  const last = status.recent_pushes.findLast((push) => push.outcome === "committed");
  const facts = [[SERVES_NONE.includes(status.state) ? "Last whole version" : "Version", String(status.version)]];
  if (last) {
    facts.push(["Last commit", `${ago(now - last.started_at)} ago`]);
    if (last.seconds.paused !== undefined) facts.push(["Paused for it", seconds(last.seconds.paused)]);
    if (last.nbytes && last.seconds.write) facts.push(["Write rate", `${bytes(last.nbytes / last.seconds.write)}/s`]);
  }
  const ended = status.recent_pushes.filter((push) => push.outcome !== "running");
  const pushed = ended.filter((push) => !BACK.includes(push.outcome));
  const failed = pushed.filter((push) => push.outcome !== "committed").length;
  if (pushed.length) facts.push(["Pushes failed", `${failed} of ${pushed.length}`]);
  facts.push(["Workers", String(status.workers.length)]);
  show("facts", facts, (pairs) => pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  document.getElementById("about").textContent = `weightsync ${status.weightsync_version} · up ${ago(status.uptime_s)}`;
  document.getElementById("ids").textContent =
    `epoch ${status.epoch} · session ${status.session ?? "none"}${status.connected ? "" : status.session ? " (not connected)" : ""} · protocol ${status.protocol_version}`;
}

export function drawErrors(errors) {
  show("errors", errors, (told) =>
    told.length === 0
      ? el("p", { class: "quiet" }, "None since this agent started.")
      : el("ol", { class: "errors" }, ...told.slice().reverse().map((error) =>
          el("li", {}, ...errorLines(error)))));
}

function errorLines(error) {
  const at = el("time", { datetime: new Date(error.at * 1000).toISOString() }, clock(error.at));
  return [
    el("p", {}, at, " ", el("b", { class: "bad" }, error.code), el("span", { class: "quiet" }, ` in ${error.what}`)),
    el("p", { class: "detail" }, error.detail),
    error.hint ? el("p", { class: "hint" }, error.hint) : null,
  ];
}

export function drawWorkers(workers) {
  show("workers", workers, (told) => {
    if (!told.length) return el("p", { class: "quiet" }, "None attached.");
    const rows = told.map((worker) => [
      worker.place,
      `v${worker.version}`,
      worker.dirty ? el("b", { class: "bad" }, "not whole") : "whole",
      `${worker.kernel_tensors} (${worker.direct} direct, ${worker.staged} staged)`,
      worker.refusals.length ? el("b", { class: "bad" }, String(worker.refusals.length)) : "0",
      String(worker.pid),
    ]);
    const made = [table(["Worker", "Version", "Weights", "Kernel tensors", "Refused", "Process"], rows)];
    const warnings = told.flatMap((worker) => worker.warnings.map((warning) => `${worker.place}: ${warning}`));
    const refusals = told.flatMap((worker) => worker.refusals.map((refusal) => [worker.place, refusal.tensor, refusal.reason]));
    if (warnings.length) made.push(list("warnings", warnings));
    if (refusals.length) {
      const all = el("details", {}, el("summary", {}, `${refusals.length} tensors cannot be pushed`));
      all.append(table(["Worker", "Kernel tensor", "Why"], refusals.slice(0, ROWS_SHOWN)));
      made.push(all);
    }
    return made;
  });
}

const list = (kind, items) => el("ul", { class: kind }, ...items.map((item) => el("li", {}, item)));

export function drawEngines(engines) {
  show("engines", engines, (told) => {
    const rows = told.map((engine) => [engine.url, engine.name ? `${engine.name} ${engine.version}` : "not reached yet", engine.model, engine.instance.slice(0, 8)]);
    const warnings = told.flatMap((engine) => engine.warnings.map((warning) => `${engine.url}: ${warning}`));
    return [table(["Engine", "Kind", "Model", "Instance"], rows), warnings.length ? list("warnings", warnings) : null];
  });
}

/** Checksums with a filter; `answer` is that of GET /checksums. */
export function drawChecksums(answer) {
  const names = Object.keys(answer.sha256).sort();
  const filter = el("input", { type: "search", id: "checksums-filter", spellcheck: "false" });
  const rows = el("div");
  const fill = () => {
    const wanted = names.filter((name) => name.includes(filter.value));
    rows.replaceChildren(table(["Kernel tensor", "SHA-256"], wanted.slice(0, ROWS_SHOWN).map((name) => [name, el("code", {}, answer.sha256[name])])));
    if (wanted.length > ROWS_SHOWN) rows.append(el("p", { class: "quiet" }, `${wanted.length - ROWS_SHOWN} more: narrow the filter.`));
  };
  filter.addEventListener("input", fill);
  fill();
  document.getElementById("checksums").replaceChildren(
    el("p", {}, `${names.length} kernel tensors of version ${answer.version}, at ${clock(Date.now() / 1000)}`),
    el("div", { class: "field" }, el("label", { for: "checksums-filter" }, "Filter by name"), filter),
    rows);
}

export function drawRefusal(id, error) {
  document.getElementById(id).replaceChildren(
    el("p", { class: "detail" }, error.code ? `${error.code}: ${error.message}` : `The agent did not answer: ${error.message}`),
    error.hint ? el("p", { class: "hint" }, error.hint) : "");
}
