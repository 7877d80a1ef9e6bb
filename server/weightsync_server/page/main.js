// Looks at the agent: GET /status for what there is, GET /events for when to look again.

import { ago } from "./dom.js";
import { drawPushes } from "./pushes.js";
import { events, get } from "./stream.js";
import { drawChecksums, drawEngines, drawErrors, drawFacts, drawRefusal, drawState, drawWorkers } from "./view.js";

const LOOK_MS = 5000;
const ANSWER_MS = 5000;
const KEY = "weightsync-token";
const byId = (id) => document.getElementById(id);

let token = sessionStorage.getItem(KEY);
let wantsToken = false;
let lookedAt = 0; // when the agent last answered, by this page's clock
let failed = false; // whether the last look got no answer
let skewS = 0; // the agent's time of day less this machine's
let looking = false;
let again = false;
let waking = null;
let stream = new AbortController();

const sleep = (ms) => new Promise((wake) => {
  const timer = setTimeout(wake, ms);
  waking = () => { clearTimeout(timer); wake(); };
});
const agentNow = () => Date.now() / 1000 + skewS;

function draw(status) {
  drawState(status);
  drawFacts(status, agentNow());
  drawPushes(status.recent_pushes, agentNow);
  drawErrors(status.last_errors);
  drawWorkers(status.workers);
  drawEngines(status.engines);
  byId("main").hidden = false;
}

function drawLink() {
  const link = byId("link");
  const state = wantsToken ? "token" : failed ? "lost" : lookedAt ? "live" : "waiting";
  const since = lookedAt ? `lost the agent ${ago((Date.now() - lookedAt) / 1000)} ago; below is what it said last` : "the agent does not answer";
  link.textContent = { token: "wants a token", waiting: "connecting", live: "live", lost: since }[state];
  if (link.dataset.link === state) return;
  link.dataset.link = state;
  // said once, not with every second that passes
  byId("lost").textContent = state === "lost" ? "Lost the agent" : "";
  document.body.classList.toggle("lost", state === "lost");
  if (state === "lost") document.title = "lost the agent · weightsync";
}

function askForToken(error) {
  wantsToken = true;
  if (token !== null) byId("token-why").textContent = `${error.message}. ${error.hint}`;
  token = null;
  sessionStorage.removeItem(KEY);
  byId("main").hidden = true;
  byId("forget").hidden = true;
  byId("token").hidden = false;
  byId("token-value").focus();
  document.title = "token wanted · weightsync";
}

async function lookOnce() {
  const answer = await get("status", token, { signal: AbortSignal.timeout(ANSWER_MS) });
  const apart = Date.parse(answer.headers.get("date")) / 1000 - Date.now() / 1000;
  skewS = Math.abs(apart) > 2 ? apart : 0; // the header has whole seconds
  const status = await answer.json();
  lookedAt = Date.now();
  failed = false;
  byId("forget").hidden = token === null;
  draw(status);
}

/** Ask for the status and show it; calls that come meanwhile are one more look after this one. */
async function look() {
  if (looking) {
    again = true;
    return;
  }
  looking = true;
  try {
    do {
      again = false;
      if (!wantsToken) await lookOnce();
    } while (again);
  } catch (error) {
    if (error.status === 401 || error.status === 429) askForToken(error);
    else {
      failed = true;
      stream.abort(); // a connection that hangs tells nothing: make a new one
    }
  } finally {
    looking = false;
    drawLink();
  }
}

/** Follow the events, for ever; whatever comes, the status has changed. */
async function follow() {
  let lastId = null;
  for (let wait = 500; ; wait = Math.min(wait * 2, 10000)) {
    try {
      if (!wantsToken) {
        stream = new AbortController();
        const answer = await get("events", token, { lastId, signal: stream.signal });
        wait = 500;
        for await (const told of events(answer.body)) {
          lastId = told.id ?? lastId;
          look();
        }
      }
    } catch {
      // it is gone, or wants a token: the look at the status says which
    }
    look();
    await sleep(wait);
  }
}

byId("host").textContent = location.host;
byId("token").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token-value").value.trim();
  byId("token-value").value = "";
  sessionStorage.setItem(KEY, token);
  byId("token").hidden = true;
  wantsToken = false;
  look();
  waking?.();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
byId("checksums-ask").addEventListener("click", async (event) => {
  const button = event.currentTarget;
  button.disabled = true;
  byId("checksums").textContent = "The workers are computing…";
  try {
    drawChecksums(await (await get("checksums", token)).json());
  } catch (error) {
    drawRefusal("checksums", error);
  } finally {
    button.disabled = false;
  }
});

follow();
setInterval(look, LOOK_MS);
setInterval(drawLink, 1000);
