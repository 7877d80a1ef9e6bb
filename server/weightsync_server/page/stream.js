// What the agent tells, over fetch: EventSource cannot send a token, and a token never goes into a URL.

/** The agent answered, but not with what was asked for. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem?.detail ?? `the agent answered ${status}`);
    this.status = status;
    this.code = problem?.code ?? "";
    this.hint = problem?.hint ?? "";
  }
}

/** GET a path of the agent; rejects with Refused, or as fetch does when nobody answers. */
export async function get(path, token, { signal, lastId = null } = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (lastId !== null) headers["Last-Event-ID"] = lastId;
  const answer = await fetch(path, { headers, signal, cache: "no-store", credentials: "omit" });
  if (answer.ok) return answer;
  throw new Refused(answer.status, await answer.json().catch(() => null));
}

/** Server-sent events of a response's body, as { id, event, data }; ends when the stream does. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const told = { id: null, event: "message", data: "" };
      for (const line of text.slice(0, end).split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) told[line.slice(0, colon)] = line.slice(colon + 2);
      }
      text = text.slice(end + 2);
      if (told.data) yield told;
    }
  }
}
