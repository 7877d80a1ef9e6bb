// What each state means to the person who is on call, and what to do now.

const NOTHING = { do: [] };

const STATES = {
  ready: (s) => ({
    means: `The engine serves version ${s.version}, whole, on ${workers(s)}.`,
    ...NOTHING,
  }),
  paused: (s) =>
    s.pause_owner === null
      ? {
          name: "paused by hand",
          means: `Somebody has stopped the engine. It holds version ${s.version}, answers no request, and takes no push.`,
          do: [
            "When the reason is over, start it again. Nothing else will: a push never resumes what a person has paused.",
            { code: `weightsync resume ${location.origin}` },
          ],
        }
      : {
          name: "paused by a push",
          means: `Push ${s.pause_owner} has stopped the engine; it still holds version ${s.version}.`,
          do: ["Wait: this lasts as long as the phases below. If its trainer is gone, the agent gives the push up by itself and resumes the engine."],
        },
  receiving: (s) => ({
    means:
      s.target === null
        ? "The engine takes back weights that it had. It answers no request meanwhile."
        : `Version ${s.target} is being written over version ${s.version}. The engine answers no request meanwhile.`,
    do: ["Wait. If the trainer falls silent, the agent gives the push up by itself; the engine is then torn, or ready where nothing live was touched."],
  }),
  shadowing: (s) => ({
    means: `The engine serves version ${s.version}, whole; version ${s.target} arrives beside it. It will stand still for a moment, when the two are exchanged.`,
    ...NOTHING,
  }),
  torn: (s) => ({
    means: `The engine's weights are not whole: version ${s.version} was being replaced when a push broke off. It serves nothing, and nothing resumes it.`,
    do: [
      `Push again, all of it: version ${s.target ?? "the next"} or later. The trainer's next push does it; from a checkpoint folder:`,
      { code: `weightsync push CHECKPOINT_DIR --agent ${location.origin}` },
      ...(s.rollback_to === null || s.rollback_to === undefined
        ? []
        : [`Or put version ${s.rollback_to} back, which every worker has kept:`, { code: `weightsync rollback ${location.origin}` }]),
      ...(s.workers.some((worker) => worker.checkpoint)
        ? ["Or have it load the checkpoint again that it was started with, as version 0:", { code: `weightsync reload ${location.origin}` }]
        : []),
      "Or restart it.",
    ],
  }),
  detached: (s) => ({
    means: "The agent does not reach its engine, or has not proven it yet. Nobody knows from here what the engine serves.",
    do: [
      "Is the engine running, with weightsync's worker extension and middleware? The agent joins it by itself, again and again.",
      "It may be starting: a large model loads for minutes.",
      { code: `weightsync doctor --agent ${location.origin}` },
    ],
  }),
};

function workers(s) {
  return s.workers.length === 1 ? "1 worker" : `${s.workers.length} workers`;
}

/** { name, means, do }: the items of `do` are sentences, or { code }. */
export function advice(status) {
  const known = Object.hasOwn(STATES, status.state);
  const told = known
    ? STATES[status.state](status)
    : { means: "This page does not know the state; the agent is of another version.", ...NOTHING };
  const trouble = status.journal?.trouble;
  if (trouble) told.do = [`It takes no push: its journal ${status.journal.path} cannot be written (${trouble}).`, ...told.do];
  return { name: status.state, ...told };
}
