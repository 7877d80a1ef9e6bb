"""TLS: who is believed, who is heard, and what stays open to those without a certificate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
import time
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from tests.support.certificates import Authority
from weightsync.certificates import ends_at
from weightsync.errors import AgentUnreachableError, InputError
from weightsync_client.control import Fleet, Look
from weightsync_client.doctor.remote import _certificate, tls_files
from weightsync_client.doctor.remote import agents as doctor_agents
from weightsync_client.membership import members_of, server_name_of
from weightsync_client.settings import Deadlines, TlsFiles
from weightsync_client.tls import tls_context, tls_hint
from weightsync_server.agent.app import Agent
from weightsync_server.agent.cli import AgentServer, listen, listen_aside
from weightsync_server.agent.settings import AgentSettings, load_settings
from weightsync_server.agent.tls import Certificates

TOKEN = "token-" + "t" * 26
ENGINE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def files(authority):
    return authority.issue("agent", "127.0.0.1", "fleet.test")


@pytest.fixture(scope="module")
def trainer_files(authority):
    return authority.issue("trainer")


class TlsAgent:
    """An agent with TLS, and what reaches it."""

    def __init__(self, agent: Agent, running, side) -> None:
        self.agent = agent
        self.running = running
        self.port = running.port
        self.url = f"https://127.0.0.1:{running.port}"
        self.side_url = f"http://127.0.0.1:{side.getsockname()[1]}"

    async def status(self, **tls) -> dict:
        """``/status`` as a trainer gets it."""

        def ask() -> dict:
            deadlines = Deadlines(connect_s=3, grace_s=0.5)
            verify = tls_context(**tls)
            with Fleet([self.url], token=TOKEN, deadlines=deadlines, verify=verify) as fleet:
                return fleet.agents[0].get("/status", timeout_s=3)

        return await asyncio.to_thread(ask)


@pytest.fixture
async def start(engine, fakes, files, monkeypatch):
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.delenv(f"WEIGHTSYNC_{name}_FILE", raising=False)

    class Server(AgentServer, fakes.QuietServer):
        """Without signal handlers."""

    made = []

    async def start(**options) -> TlsAgent:
        settings = AgentSettings(
            engine_url=engine.url, port=0, token=SecretStr(TOKEN), engine_poll_s=0.05,
            shutdown_timeout_s=1, tls_cert=files[0], tls_key=files[1], **options,
        )  # fmt: skip
        agent = Agent(settings, fakes.SECRET)
        sock, side = listen(settings), listen_aside(settings)
        agent.listens_at(*side.getsockname()[:2])
        running = await fakes.Running(Server(agent, side), sock).started()
        made.append(TlsAgent(agent, running, side))
        return made[-1]

    yield start
    for one in made:
        await one.running.stop()


async def until_ready(agent: TlsAgent, **tls) -> None:
    async with asyncio.timeout(8):
        while (await agent.status(**tls))["state"] != "ready":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# ---------------------------------------------------------------- the agent


async def test_an_agent_with_tls_joins_its_engine_and_answers_those_who_know_its_ca(
    start, authority, monkeypatch
):
    agent = await start()
    await until_ready(agent, verify=authority.pem)  # its workers answered through the side door
    monkeypatch.setenv("WEIGHTSYNC_CA_FILE", str(authority.pem))
    assert (await agent.status())["state"] == "ready"


async def test_an_agent_whose_ca_is_unknown_gets_no_token(start, authority, tmp_path):
    agent = await start()
    with pytest.raises(AgentUnreachableError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        await agent.status(verify=Authority(tmp_path, "other").pem)
    assert "WEIGHTSYNC_CA_FILE" in caught.value.hint
    with pytest.raises(AgentUnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
        await agent.status()


async def test_who_shows_no_certificate_of_the_clients_ca_is_not_heard(
    start, authority, trainer_files, tmp_path
):
    agent = await start(tls_client_ca=authority.pem)
    await until_ready(agent, verify=authority.pem, cert=trainer_files)
    with pytest.raises(AgentUnreachableError) as caught:
        await agent.status(verify=authority.pem)
    assert "--cert-file" in caught.value.hint
    with pytest.raises(AgentUnreachableError):
        await agent.status(verify=authority.pem, cert=Authority(tmp_path, "other").issue("x"))


async def test_the_side_door_answers_probes_and_workers_alone(start, authority):
    agent = await start(tls_client_ca=authority.pem)
    async with httpx.AsyncClient(base_url=agent.side_url, trust_env=False) as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code in {200, 503}
        assert (await http.post("/internal/reply", json={})).status_code == 401
        http.headers["Authorization"] = f"Bearer {TOKEN}"
        for path in ("/status", "/metrics", "/events", "/openapi.json", "/"):
            assert (await http.get(path)).status_code == 401, path
        assert (await http.post("/pause", json={})).status_code == 401


async def test_plain_http_to_a_port_with_tls_tells_what_to_write(start):
    agent = await start()

    def ask() -> None:
        with Fleet(
            [agent.url.replace("https", "http")], token=None, deadlines=Deadlines(grace_s=0.5)
        ) as fleet:
            fleet.agents[0].get("/status", timeout_s=3)

    with pytest.raises(AgentUnreachableError) as caught:
        await asyncio.to_thread(ask)
    assert "https://" in caught.value.hint


async def test_what_a_proxy_header_says_does_not_change_who_calls(start):
    agent = await start()
    assert not agent.running.server.config.proxy_headers
    assert not agent.running.server._side.config.proxy_headers


async def test_agents_that_a_dns_name_stands_for_show_certificates_of_that_name(
    start, authority, monkeypatch
):
    agent = await start()
    agents = f"dns:https://fleet.test:{agent.port}"

    def resolve(host: str, port: int, **_: object) -> list:
        assert (host, port) == ("fleet.test", agent.port)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    with monkeypatch.context() as patched:
        patched.setattr("weightsync_client.membership._lookup", resolve)
        urls = members_of(agents, timeout_s=5)()
    assert urls == (agent.url,)

    def ask(name: str) -> dict:
        verify = tls_context(authority.pem)
        deadlines = Deadlines(grace_s=0.5)
        with Fleet(
            urls, token=TOKEN, deadlines=deadlines, verify=verify, server_name=name
        ) as fleet:
            return fleet.agents[0].get("/status", timeout_s=3)

    assert server_name_of(agents) == "fleet.test"
    assert (await asyncio.to_thread(ask, "fleet.test"))["state"]
    with pytest.raises(AgentUnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
        await asyncio.to_thread(ask, "other.test")
    assert server_name_of([agent.url]) is None


async def test_the_doctor_tells_when_a_certificate_ends_and_that_a_token_goes_in_clear(
    start, authority
):
    agent = await start()

    def ask() -> dict:
        verify = tls_context(authority.pem)
        with Fleet([agent.url], token=TOKEN, deadlines=Deadlines(), verify=verify) as fleet:
            return {f.id: f for f in doctor_agents(fleet)}

    found = await asyncio.to_thread(ask)
    assert found["agent.reachable"].severity == "ok"
    assert found["agent.tls"].severity == "warn"  # the certificates of these tests last an hour
    assert found["agent.tls"].what == "its certificate ends in 0 days"

    old, _ = authority.issue("old", hours=-1)
    told = {f.id: f for f in tls_files(TlsFiles(authority.pem, old))}
    assert (told["tls.ca"].severity, told["tls.certificate"].severity) == ("warn", "fail")
    assert told["tls.certificate"].what.endswith("old.pem has ended")

    seen = Look("", None)
    assert _certificate("http://127.0.0.1:9100", seen).severity == "ok"
    assert "in clear" in _certificate("http://node-1:9100", seen).what


# ---------------------------------------------------------------- certificates that are renewed


@pytest.mark.parametrize(
    ("address", "hours", "hint"),
    [("127.0.0.1", -1, "renew the agent's"), ("10.9.8.7", 1, "for other names")],
)
def test_why_a_certificate_is_not_believed_is_told(authority, address, hours, hint):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*authority.issue("wrong", address, hours=hours))
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    agent = server.wrap_bio(here, there, server_side=True)
    trainer = tls_context(authority.pem).wrap_bio(there, here, server_hostname="127.0.0.1")
    for side in (trainer, agent):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        trainer.do_handshake()
    assert hint in tls_hint(caught.value)


async def test_a_renewed_certificate_is_used_without_a_restart(
    start, authority, files, tmp_path, caplog
):
    kept = [(file, shutil.copy2(file, tmp_path)) for file in files]
    agent = await start()
    server = agent.running.server

    def serial() -> int:
        pem = ssl.get_server_certificate(("127.0.0.1", agent.port), timeout=3)
        return hash(pem)

    try:
        first = await asyncio.to_thread(serial)
        authority.issue("agent", "127.0.0.1")
        server._certificates.renew(server.config.ssl)
        second = await asyncio.to_thread(serial)
        assert first != second
        files[0].write_text("no certificate")
        with caplog.at_level(logging.ERROR):
            server._certificates.renew(server.config.ssl)
        assert "cannot be used" in caplog.text
        ends = ends_at(Path(kept[0][1]))
        metric = server._agent.metrics.registry.get_sample_value(
            "weightsync_certificate_ends_timestamp_seconds", {"file": "certificate"}
        )
        assert metric is not None
        assert 0 <= metric - ends < 60, "the renewed one's, issued seconds after the first"
        assert abs(metric - time.time() - 3600) < 60
        assert await asyncio.to_thread(serial) == second
    finally:
        for file, copy in kept:
            os.replace(copy, file)  # noqa: PTH105


def test_an_agent_does_not_start_with_certificates_that_do_not_fit(authority, files):
    other = authority.issue("other", "127.0.0.1")
    for cert, key in ((files[0], other[1]), (authority.folder / "none.pem", None)):
        settings = AgentSettings(engine_url=ENGINE, tls_cert=cert, tls_key=key)
        with pytest.raises(InputError, match="cannot use the TLS files"):
            Certificates(settings, print)


def test_an_agent_warns_of_a_certificate_that_ends_soon(authority, files, caplog):
    told = {}
    settings = AgentSettings(
        engine_url=ENGINE, tls_cert=files[0], tls_key=files[1], tls_client_ca=authority.pem
    )
    Certificates(settings, told.__setitem__)
    assert told == {"certificate": ends_at(files[0]), "client_ca": ends_at(authority.pem)}
    assert f"{files[0]} ends in 0.0 days" in caplog.text


# ---------------------------------------------------------------- settings


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    return str(path)


def test_beyond_loopback_it_is_tls_or_said_aloud(files, token_file):
    argv = ["--engine-url", ENGINE, "--host", "0.0.0.0", "--token-file", token_file]
    with pytest.raises(InputError, match="without TLS") as caught:
        load_settings(argv, {})
    assert "--insecure-http" in caught.value.hint
    assert load_settings([*argv, "--insecure-http"], {}).insecure_http
    assert load_settings(argv, {"WEIGHTSYNC_AGENT_INSECURE_HTTP": "true"}).insecure_http
    with_tls = load_settings([*argv, "--tls-cert", str(files[0]), "--tls-key", str(files[1])], {})
    assert not with_tls.insecure_http


@pytest.mark.parametrize("flag", ["--tls-key", "--tls-client-ca", "--probe-port"])
def test_an_option_that_means_nothing_without_a_certificate_is_refused(flag):
    with pytest.raises(InputError, match="tls_cert"):
        load_settings(["--engine-url", ENGINE, flag, "1"], {})


def test_a_publisher_does_not_switch_verification_off(authority, files):
    with pytest.raises(InputError, match="verify=False"):
        tls_context(False)
    with pytest.raises(InputError, match="cannot use the TLS files"):
        tls_context(authority.folder / "none.pem")
    with pytest.raises(InputError, match="both"):
        tls_context(ssl.create_default_context(), files)
    context = ssl.create_default_context()
    assert tls_context(context) is context
