"""Two steps of a push in one call: a trainer with one agent saves a way there and back.

Each is the call that it also is by itself: carried out, remembered and repeated as such.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic

from weightsync.errors import WeightSyncError
from weightsync.protocol import StepResponse
from weightsync.state import AgentState, step
from weightsync.state_events import BeginAsked, CommitAsked, PauseAsked, Paused

Call = Callable[[], Awaitable[StepResponse]]


async def pause_and(
    state: AgentState, event: BeginAsked | CommitAsked, pause: Call, call: Call
) -> StepResponse:
    """Pause the engine for a push, and begin or commit it.

    Raises:
        WeightSyncError: ``step`` of its context tells whose it is: ``pause``, ``begin`` or
            ``commit``.  What the state refuses of either is refused before the engine is paused.
    """
    name = "begin" if isinstance(event, BeginAsked) else "commit"
    taken, failing = monotonic(), "pause"
    try:
        state = step(state, PauseAsked(event.push_id)).state
        failing = name
        step(step(state, Paused(event.push_id)).state, event)
        failing = "pause"
        paused = await pause()
        failing, after_s = name, monotonic() - taken
        return joined(paused, await call(), after_s)
    except WeightSyncError as error:
        error.context["step"] = failing
        raise


def joined(first: StepResponse, second: StepResponse, after_s: float) -> StepResponse:
    """One answer to a call that was two; the second began ``after_s`` seconds after the first."""
    later = [s.model_copy(update={"start_s": round(s.start_s + after_s, 6)}) for s in second.spans]
    return second.model_copy(
        update={"seconds": first.seconds | second.seconds, "spans": [*first.spans, *later]}
    )
