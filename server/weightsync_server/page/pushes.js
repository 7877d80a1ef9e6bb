// Pushes as bars on one scale of seconds, the newest first.

import { bytes, clock, el, seconds, show } from "./dom.js";

const PHASES = ["pause", "begin", "write", "prepare", "commit", "resume", "rollback", "reload", "abort", "close"];
const OUTCOMES = ["running", "committed", "aborted", "torn", "engine_lost", "rolled_back", "reloaded"];
const SHOWN = 8;
const STEPS = [1, 2, 5];

let all = false;
let ticking;

const shadeOf = (phase) => (PHASES.includes(phase) ? phase : "other");

/** Round marks for an axis of so many seconds: three to six of them. */
function ticks(span) {
  const unit = 10 ** Math.floor(Math.log10(span / 3));
  const step = unit * (STEPS.findLast((k) => k * unit <= span / 3) ?? 1);
  return Array.from({ length: Math.floor(span / step) + 1 }, (_, k) => k * step);
}

function length(push, now) {
  const ends = push.phases.map((p) => p.start_s + took(push, p, now));
  return Math.max(...ends, push.seconds.paused ?? 0, 1e-3);
}

/** When the engine stopped: at once, but in shadow mode, which begins before it pauses. */
function stopsAt(push) {
  if (push.phases[0]?.phase !== "begin") return 0;
  return push.phases.find((phase) => phase.phase === "pause")?.start_s ?? Infinity;
}

/** How long a phase took, or has taken until now. */
const took = (push, phase, now) => phase.seconds ?? Math.max(now - push.started_at - phase.start_s, 0);

function words(push, now) {
  const parts = push.phases.map((p) => {
    const lasted = seconds(took(push, p, now));
    return `${p.phase} ${p.seconds === null ? "running " : ""}${lasted}${p.ok ? "" : " ✗"}`;
  });
  return parts.join(" · ");
}

function figures(push) {
  const told = [];
  const write = push.seconds.write;
  if (push.seconds.paused !== undefined) told.push(`paused ${seconds(push.seconds.paused)}`);
  if (push.nbytes) told.push(bytes(push.nbytes));
  if (push.nbytes && write) told.push(`${bytes(push.nbytes / write)}/s`);
  if (push.ranks) told.push(push.ranks === 1 ? "1 rank" : `${push.ranks} ranks`);
  return told.join(" · ");
}

function row(push, scale, now) {
  const track = el("div", { class: "track", "aria-hidden": "true" });
  const stops = stopsAt(push);
  for (const phase of push.phases) {
    const part = el("i", { class: "phase", "data-phase": shadeOf(phase.phase), title: `${phase.phase} ${phase.seconds === null ? "…" : seconds(phase.seconds)}` });
    part.classList.toggle("serving", phase.start_s < stops);
    part.classList.toggle("failed", !phase.ok);
    part.classList.toggle("runs", phase.seconds === null);
    part.style.left = `${(100 * phase.start_s) / scale}%`;
    part.style.width = `max(2px, ${(100 * took(push, phase, now)) / scale}%)`;
    track.append(part);
  }
  const outcome = OUTCOMES.includes(push.outcome) ? push.outcome : "other";
  return el("li", { "data-outcome": outcome },
    el("div", { class: "which" },
      el("b", {}, push.version === null ? "v?" : `v${push.version}`),
      el("span", { class: "outcome" }, push.outcome.replace("_", " ")),
      el("time", { class: "quiet", datetime: new Date(push.started_at * 1000).toISOString() }, clock(push.started_at))),
    track,
    el("p", { class: "words" }, el("span", {}, figures(push)), el("code", { class: "quiet" }, push.push_id), el("span", { class: "quiet" }, words(push, now))));
}

function draw({ pushes, now }) {
  if (!pushes.length) return el("p", { class: "quiet" }, "None yet since this agent started.");
  const newest = pushes.slice().reverse();
  const shown = all ? newest : newest.slice(0, SHOWN);
  const scale = Math.max(...shown.map((push) => length(push, now))) * 1.02;
  const axis = el("div", { class: "axis", "aria-hidden": "true" });
  for (const at of ticks(scale)) {
    const mark = el("span", {}, at === 0 ? "0" : seconds(at).replace(/\.0+(?= )/, ""));
    if (at > scale * 0.85) break; // it would stand out over the edge
    mark.style.left = `${(100 * at) / scale}%`;
    axis.append(mark);
  }
  const more = newest.length > SHOWN
    ? el("button", { type: "button", class: "plain", id: "pushes-all" }, all ? "Show fewer" : `Show all ${newest.length}`)
    : null;
  more?.addEventListener("click", () => {
    all = !all;
    drawPushes(pushes, () => now);
    document.getElementById("pushes-all")?.focus();
  });
  return [el("div", { class: "axis-row" }, axis), el("ol", { class: "pushes" }, ...shown.map((push) => row(push, scale, now))), more];
}

/** Draw them; while a phase runs, its bar grows. `now` tells the agent's time of day in seconds. */
export function drawPushes(pushes, now) {
  clearTimeout(ticking);
  const runs = pushes.some((push) => push.phases.some((phase) => phase.seconds === null));
  show("pushes", { pushes, now: runs ? now() : 0, all }, draw);
  show("legend", pushes.map((push) => push.phases.map((phase) => phase.phase)), () => legend(pushes));
  if (runs) ticking = setTimeout(() => drawPushes(pushes, now), 100);
}

/** The colours of those phases that are there. */
function legend(pushes) {
  const there = new Set(pushes.flatMap((push) => push.phases.map((phase) => phase.phase)));
  const pale = pushes.some((push) => stopsAt(push) > 0);
  return [
    ...PHASES.filter((phase) => there.has(phase)).map((phase) => el("li", {}, el("i", { class: "phase", "data-phase": phase }), phase)),
    pale ? el("li", {}, el("i", { class: "phase serving" }), "pale: the engine serves") : null,
  ];
}
