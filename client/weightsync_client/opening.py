"""Before anything is packed: who is there, and a session that reaches all of them."""

from __future__ import annotations

from weightsync_client.attempt import Attempt
from weightsync_client.borders import Findings, merge
from weightsync_client.lending import Lending
from weightsync_client.pushed import Pushed
from weightsync_client.rendezvous import admit, open_session
from weightsync_client.session import Session
from weightsync_client.start import start


def open_for(attempt: Attempt, pushed: Pushed, wanted: int | None) -> tuple[Session, bool]:
    """A session for these weights, the last one if it still holds; all ranks call this.

    An agent that is new, or whose engine was restarted, has a rendezvous by itself where its
    workers want what workers of this session want; the others are not asked then.

    Args:
        attempt: Gets its roster and version.
        pushed: The weights.
        wanted: The version; None: the next.

    Returns:
        The session, and whether some agent is new to it.
    """
    held = attempt.held

    def key() -> str:
        session, declaration = held.session, pushed.declaration
        if session is None or session.declaration != declaration:
            return ""
        session.declaration = declaration  # which the next push knows to be the same at a glance
        if moved := session.slots.moved(pushed.source):
            # what is registered is not what the trainer has now (WS-9)
            held.moved |= moved
            return ""
        return session.key

    begun = start(attempt, key, wanted)
    _share_scales(attempt, pushed)
    session = held.session
    if session is not None and not begun.fresh:
        for url in list(session.members):
            if url not in begun.agents or url in begun.stale:
                session.drop(url)
        if not begun.stale:
            return session, False
    attempt.enter("rendezvous")
    if session is None or begun.fresh or not _admitted(attempt, session, begun.stale):
        session = _reopen(attempt, pushed)
    attempt.roster.forget([url for url in attempt.roster.urls if url not in session.members])
    held.met = True
    return session, True


def _admitted(attempt: Attempt, session: Session, urls: list[str]) -> bool:
    return admit(
        session,
        urls,
        attempt.roster,
        attempt.held.ranks,
        deadlines=attempt.settings.deadlines,
        mode=attempt.settings.mode,
        undo=attempt.undo,
    )


def _reopen(attempt: Attempt, pushed: Pushed) -> Session:
    settings = attempt.settings
    attempt.held.end_session()
    pushed.look_again()
    attempt.held.session = session = open_session(
        attempt.roster,
        attempt.held.ranks,
        pushed,
        make_transport=settings.make_transport,
        deadlines=settings.deadlines,
        ignore=settings.ignore,
        max_slot_nbytes=settings.max_slot_nbytes,
        coalesce_nbytes=settings.coalesce_nbytes,
        mode=settings.mode,
        lending=Lending(settings.lend_nbytes, frozenset(attempt.held.moved)),
        undo=attempt.undo,
    )
    return session


def _share_scales(attempt: Attempt, pushed: Pushed) -> None:
    """Agree on the scales of blocks that lie on several ranks."""
    if (quantized := pushed.quantized) is None:
        return
    attempt.enter("scales")
    deadlines = attempt.settings.deadlines
    merged = attempt.meet(
        "scales", quantized.findings, merge, kind=Findings, result=dict[str, bytes],
        work_s=deadlines.for_bytes(deadlines.write_s, quantized.form.cut_nbytes),
        decide_s=deadlines.for_bytes(deadlines.grace_s, quantized.form.cut_nbytes),
    )  # fmt: skip
    quantized.learn(merged)
