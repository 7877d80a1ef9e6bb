"""Agents and engines, asked from here: do they answer, to whom, and do they fit."""

from __future__ import annotations

import contextlib
import email.utils
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

import weightsync
from weightsync.certificates import RENEW_DAYS, ends_at
from weightsync.errors import AgentUnreachableError, AuthError, WeightSyncError
from weightsync_client.control import Agent, Fleet, Look
from weightsync_client.doctor.finding import Finding, Severity
from weightsync_client.settings import Deadlines, TlsFiles

_TIMEOUT_S = 5.0
_AGENT_PORT = 9100
#: seconds that two clocks may be apart; an HTTP date has none below one
_CLOCK_S = 5.0


def agents(fleet: Fleet) -> Iterator[Finding]:
    """Every agent of a fleet: reachable, token, versions, state, workers, clock."""
    deadlines = Deadlines(connect_s=_TIMEOUT_S, status_s=_TIMEOUT_S)
    for found in fleet.each(lambda agent: list(_agent(agent, deadlines))):
        yield from found


def _agent(agent: Agent, deadlines: Deadlines) -> Iterator[Finding]:
    where = agent.url
    reach = "the trainer steers every push through it"
    try:
        status = agent.get("/status", timeout_s=deadlines.status_s)
    except WeightSyncError as error:
        kind = "token" if isinstance(error, AuthError) else "reachable"
        if kind == "token":
            yield Finding("agent.reachable", "ok", "it answers", reach, where=where)
        down = isinstance(error, (AgentUnreachableError, AuthError))
        severity: Severity = "fail" if down else "warn"
        yield Finding(f"agent.{kind}", severity, error.message, reach, error.hint, where)
        return
    yield Finding("agent.reachable", "ok", "it answers, and takes the token", reach, where=where)
    yield _versions(status, where)
    yield _state(status, where)
    yield _journal(status, where)
    yield from _engines(status, where)
    with contextlib.suppress(WeightSyncError):
        seen = agent.look("/healthz", timeout_s=deadlines.status_s)
        yield _clock(where, seen)
        yield _certificate(where, seen)


def _versions(status: dict[str, Any], where: str) -> Finding:
    theirs, ours = str(status.get("weightsync_version")), weightsync.__version__
    same = theirs == ours
    return Finding(
        "agent.version", "ok" if same else "fail",
        f"weightsync {theirs} there" if same else f"weightsync {theirs} there, {ours} here",
        "ends of different protocols refuse each other",
        "" if same else f"pip install weightsync=={theirs}  # here, or the other one there",
        where,
    )  # fmt: skip


def _state(status: dict[str, Any], where: str) -> Finding:
    state = str(status.get("state"))
    why = "only a ready engine serves, and takes a push at once"
    last = (status.get("last_errors") or [{}])[-1]
    if state == "detached":
        what = f"detached: {last.get('detail', 'it has not reached its engine yet')}"
        fix = last.get("hint") or "start the engine with --worker-extension-cls and --middleware"
        return Finding("agent.state", "fail", what, why, fix, where)
    if state == "torn":
        what = f"torn: its weights are not whole (version {status.get('target')} did not arrive)"
        fix = f"weightsync push CHECKPOINT_DIR --agent {where}  # or the trainer's next push"
        return Finding("agent.state", "fail", what, why, fix, where)
    if state == "paused" and not status.get("pause_owner"):
        fix = f"weightsync resume {where}"
        return Finding("agent.state", "warn", "paused by hand", why, fix, where)
    return Finding("agent.state", "ok", f"{state}, version {status.get('version')}", why, "", where)


def _journal(status: dict[str, Any], where: str) -> Finding:
    why = "no push is taken before it is written down there: a restarted agent goes on from it"
    told = status.get("journal") or {}
    if not told.get("trouble"):
        return Finding("agent.journal", "ok", f"{told.get('path')} is written", why, "", where)
    fix = "df -h; df -i  # there: free the disk, or start the agent with another --journal"
    return Finding("agent.journal", "fail", str(told["trouble"]), why, fix, where)


def _engines(status: dict[str, Any], where: str) -> Iterator[Finding]:
    why = "worker extension and middleware are what a push reaches an engine by"
    workers = status.get("workers", ())
    names = ", ".join(f"{e.get('name')} {e.get('version')}" for e in status.get("engines", ()))
    if workers:
        staged = sum(int(w.get("staged", 0)) for w in workers)
        direct = sum(int(w.get("direct", 0)) for w in workers)
        what = f"{names}: {len(workers)} workers answer; {direct} tensors direct, {staged} staged"
        yield Finding("agent.workers", "ok", what, why, where=where)
        packing = (
            f"{staged} tensors are packed by the engine: each commit makes them again"
            if staged
            else "the engine packs nothing: every tensor is written in place"
        )
        yield Finding(
            "agent.packing", "ok", packing,
            "packing takes memory beside the model, and time of the pause; on CPU "
            "WEIGHTSYNC_VLLM_CPU_PLAIN=1 keeps vLLM from it",
            where=where,
        )  # fmt: skip
    for engine in status.get("engines", ()):
        for text in engine.get("warnings", ()):
            yield Finding(
                "agent.engine", "warn", str(text), "the engine itself says so",
                "see docs/engines.md", where,
            )  # fmt: skip
    refused = [(w.get("place"), r) for w in workers for r in w.get("refusals", ())]
    if refused:
        place, first = refused[0]
        yield Finding(
            "agent.refusals", "fail",
            f"{len(refused)} kernel tensors are refused, as {first['tensor']} at {place}: "
            f"{first['reason']}",
            "nothing is pushed while a tensor that it would write is unproven",
            f'curl -X POST {where}/attach -H "Authorization: Bearer $WEIGHTSYNC_TOKEN" '
            "-d '{\"proof\": \"full\"}'  # proves again, all bytes",
            where,
        )  # fmt: skip


def _clock(where: str, seen: Look) -> Finding:
    why = "logs and metrics of both ends are read side by side; pushes do not depend on it"
    try:
        then = email.utils.parsedate_to_datetime(seen.date).timestamp()
    except ValueError:
        return Finding("agent.clock", "warn", "its answers have no date", why, "date", where)
    apart_s = time.time() - then
    near = abs(apart_s) <= _CLOCK_S
    what = "clocks agree" if near else f"its clock is {apart_s:+.0f} s from this one"
    fix = "" if near else "timedatectl set-ntp true  # on both hosts"
    return Finding("agent.clock", "ok" if near else "warn", what, why, fix, where)


def _certificate(where: str, seen: Look) -> Finding:
    why = "who reads the token on its way can push weights with it"
    parts = urlsplit(where)
    if parts.scheme == "http":
        near = parts.hostname in {"localhost", "127.0.0.1", "::1"}
        return Finding(
            "agent.tls", "ok" if near else "warn",
            "no TLS, over loopback" if near else "no TLS: the token goes over the network in clear",
            why, "" if near else "--tls-cert and --tls-key there: docs/security.md", where,
        )  # fmt: skip
    if seen.certificate_ends is None:
        return Finding("agent.tls", "ok", "it speaks TLS", why, "", where)
    days = (seen.certificate_ends - time.time()) / 86_400
    soon = days < RENEW_DAYS
    what = f"its certificate ends in {days:.0f} days"
    fix = "renew it, in the same files: the agent reads them again by itself" if soon else ""
    return Finding("agent.tls", "warn" if soon else "ok", what, why, fix, where)


def tls_files(files: TlsFiles) -> Iterator[Finding]:
    """The certificates that this side was told: when they end."""
    why = "a CA that has ended believes no agent; a certificate that has ended is shown in vain"
    for name, file in (("tls.ca", files.ca), ("tls.certificate", files.cert)):
        if file is None:
            continue
        try:
            days = (ends_at(file) - time.time()) / 86_400
        except (OSError, ValueError) as error:
            fix = f"openssl x509 -noout -enddate -in {file}"
            yield Finding(name, "warn", f"cannot tell when {file} ends: {error}", why, fix)
            continue
        soon = days < RENEW_DAYS
        what = f"{file} ends in {days:.0f} days" if days > 0 else f"{file} has ended"
        yield Finding(
            name, "fail" if days <= 0 else "warn" if soon else "ok", what, why,
            "renew it: docs/security.md; a trainer reads it when it starts" if soon else "",
        )  # fmt: skip


def agent_port(port: int = _AGENT_PORT) -> Finding:
    """Whether the port that an agent listens on, unless told otherwise, is free on loopback."""
    with socket.socket() as sock:
        sock.settimeout(_TIMEOUT_S)
        taken = sock.connect_ex(("127.0.0.1", port)) == 0
    return Finding(
        "agent_port", "ok",
        f"something listens on port {port}; if it is an agent, ask it: --agent http://127.0.0.1:{port}"
        if taken
        else f"port {port} is free for an agent",
        "an agent listens there unless --port says otherwise",
    )  # fmt: skip


def engine(url: str) -> Iterator[Finding]:
    """An engine's API server: our middleware in it, and whether its own admin calls are open."""
    where = url.rstrip("/")
    why = "the agent pauses, resumes and commands the engine through our middleware"
    try:
        info = httpx.get(f"{where}/weightsync/info", timeout=_TIMEOUT_S, trust_env=False)
        paused = httpx.get(f"{where}/is_paused", timeout=_TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield Finding(
            "engine.reachable", "fail", f"it does not answer: {error}", why,
            "start it; check host and port", where,
        )  # fmt: skip
        return
    # an agent answers with problems, too, and not about the secret
    problem = info.headers.get("content-type", "").startswith("application/problem+json")
    # ours refuses other hosts by its path's name, and this one for its secret
    there = problem and ("WEIGHTSYNC_ENGINE_SECRET" in info.text or "/weightsync/" in info.text)
    yield Finding(
        "engine.middleware", "ok" if there else "fail",
        "the middleware answers (and refuses who has no secret)"
        if there
        else f"no middleware: /weightsync/info answered HTTP {info.status_code}",
        why,
        ""
        if there
        else "start the engine with --middleware "
        "weightsync_server.middleware.WeightsyncMiddleware --worker-extension-cls "
        "weightsync_server.worker.WeightsyncWorker",
        where,
    )  # fmt: skip
    yield Finding(
        "engine.worker_extension", "ok",
        "not visible from outside: agent.workers of its agent proves it (--agent)",
        "the receiver runs in every worker of the engine", "", where,
    )  # fmt: skip
    if paused.is_success:
        yield Finding(
            "engine.dev_mode", "warn", "its development mode is on: /is_paused answers",
            "whoever reaches that port can then run any method in its workers",
            "unset VLLM_SERVER_DEV_MODE  # weightsync does not need it", where,
        )  # fmt: skip
