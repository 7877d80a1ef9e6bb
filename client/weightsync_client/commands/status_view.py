"""What ``weightsync status`` shows to a person, once or again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightsync.errors import WeightSyncError
from weightsync_client.report import human_bytes, human_seconds

#: of states; one that is not here is red
_COLORS = {
    "ready": "green",
    "shadowing": "green",
    "paused": "yellow",
    "receiving": "cyan",
    "torn": "bold red",
}
#: of states in which the last error says why
_TROUBLED = ("torn", "detached")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one agent answered; one of ``body`` and ``error`` is there."""

    url: str
    body: dict[str, Any] | None = None
    error: WeightSyncError | None = None

    @property
    def state(self) -> str:
        """The agent's, or why there is none."""
        if self.error is not None:
            return self.error.code
        return str((self.body or {}).get("state", "?"))


def status_table(answers: Sequence[Answer], now: float) -> Table:
    """A row an agent, below a line on all of them.

    Args:
        answers: What the agents said.
        now: Seconds since 1970, to tell how long ago something was.
    """
    table = Table(title=_summary(answers, now), title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("agent", "state", "version", "workers", "last push"):
        table.add_column(head, overflow="fold")
    for answer in answers:
        name = Text(answer.url.removeprefix("http://"))
        if answer.body is not None:
            table.add_row(name, *_cells(answer.body, now))
        else:
            table.add_row(name, Text(f"● {answer.state}", style="bold red"), "", "", "")
    return table


def watched(answers: Sequence[Answer], now: float) -> RenderableType:
    """The table, with what troubles each agent below it."""
    troubles = [f"{a.url}: {text}" for a in answers if (text := trouble(a))]
    return Group(status_table(answers, now), *(Text(t, style="red") for t in troubles))


def trouble(answer: Answer) -> str:
    """What keeps an engine from serving or from being pushed to, and what to do; else empty."""
    if answer.error is not None:
        told = [(f"{answer.error.code}: {answer.error.message}", answer.error.hint)]
    else:
        told = list(_troubles(answer))
    return "\n".join(what + (f"\n  what to do: {do}" if do else "") for what, do in told)


def _troubles(answer: Answer) -> Iterator[tuple[str, str]]:
    """Each as what is wrong, and what to do."""
    told, url = answer.body or {}, answer.url
    errors = told.get("last_errors")
    if answer.state in _TROUBLED and errors:
        code, detail, hint = (str(errors[-1].get(key, "")) for key in ("code", "detail", "hint"))
        yield f"{code}: {detail}", _ways_out(told, url) if answer.state == "torn" else hint
    if answer.state == "paused" and not told.get("pause_owner"):
        yield "paused by hand: it answers no request and takes no push", f"weightsync resume {url}"
    if told.get("syncing"):
        yield (
            "it has the weights of its start, and is told to wait for a push",
            (f"weightsync push CHECKPOINT_DIR --agent {url}, or the trainer's next push"),
        )
    if trouble := (told.get("journal") or {}).get("trouble"):
        yield (
            f"it takes no push: {trouble}",
            ("free the disk, or give the agent a --journal that it may write"),
        )
    refused = [refusal for w in told.get("workers", ()) for refusal in w.get("refusals", ())]
    if refused:
        first = f"{refused[0].get('tensor')}: {refused[0].get('reason')}"
        what = f"{len(refused)} kernel tensors cannot be pushed, as {first}"
        yield what, f"weightsync doctor --agent {url}"


def _ways_out(told: dict[str, Any], url: str) -> str:
    """Of a torn engine."""
    ways = [f"weightsync push CHECKPOINT_DIR --agent {url}, or the trainer's next push"]
    if told.get("rollback_to") is not None:
        ways.append(f"weightsync rollback {url}")
    if any(worker.get("checkpoint") for worker in told.get("workers", ())):
        ways.append(f"weightsync reload {url}")
    return "; or ".join(ways)


def _summary(answers: Sequence[Answer], now: float) -> Text:
    counts = Counter(answer.state for answer in answers)
    told = ", ".join(f"{n} {state}" for state, n in counts.most_common())
    versions = sorted({int(a.body.get("version", 0)) for a in answers if a.body is not None})
    if len(versions) > 1:
        told += f" · versions {versions[0]} to {versions[-1]}"
    return Text(f"{time.strftime('%H:%M:%S', time.localtime(now))}  {told}", style="bold")


def _cells(told: dict[str, Any], now: float) -> list[Text]:
    state = str(told.get("state", "?"))
    version = str(told.get("version", "?"))
    if told.get("target") is not None:
        version += f" → {told['target']}"
    state_text = state
    if state == "paused":
        state_text = "paused by a push" if told.get("pause_owner") else "paused by hand"
    elif told.get("syncing"):
        state_text, state = f"{state}, waits for a push", "paused"
    workers = told.get("workers", ())
    kinds = [(k, sum(int(w.get(k, 0)) for w in workers)) for k in ("direct", "staged")]
    kinds.append(("refused", sum(len(w.get("refusals", ())) for w in workers)))
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds if n)
    return [
        Text(f"● {state_text}", style=_COLORS.get(state, "red")),
        Text(version),
        Text(f"{len(workers)}" + (f" ({counts})" if counts else "")),
        Text(_last_push(told.get("last_push"), now)),
    ]


def _last_push(push: dict[str, Any] | None, now: float) -> str:
    if push is None:
        return "none yet"
    version = "?" if push.get("version") is None else push["version"]
    since_s = max(now - float(push.get("started_at", now)), 0.0)
    seconds = push.get("seconds", {})
    phases = push.get("phases", ())
    if phases and phases[-1].get("seconds") is None:
        runs_s = max(since_s - float(phases[-1].get("start_s", 0.0)), 0.0)
        return f"v{version} {phases[-1].get('phase')} for {human_seconds(runs_s)}"
    outcome = str(push.get("outcome")).replace("_", " ")
    parts = [f"v{version} {outcome} {_ago(since_s)}"]
    if "paused" in seconds:
        parts.append(f"paused {human_seconds(seconds['paused'])}")
    if push.get("nbytes") and seconds.get("write"):
        parts.append(f"{human_bytes(push['nbytes'] / seconds['write'])}/s")
    return " · ".join(parts)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
