"""The agent's settings: one frozen model, read from flags and the environment here only."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from weightsync import __version__
from weightsync.errors import InputError
from weightsync.protocol import Seconds
from weightsync.tokens import check_token, read_tokens
from weightsync_server.same_host import is_loopback

ENV_PREFIX = "WEIGHTSYNC_AGENT_"
#: the token is the trainer's too, so its variable has no prefix of the agent's
ENV_TOKEN = "WEIGHTSYNC_TOKEN"  # noqa: S105 - a variable's name


def _address(url: str) -> str:
    if re.fullmatch(r"https?://[^/?#\s]+", url) is None:
        raise ValueError(f"{url!r} is no engine's address: write it as http://HOST:PORT")
    return url


EngineUrl = Annotated[str, AfterValidator(_address)]


class AgentSettings(BaseModel):
    """What one agent is told.

    Each field is a flag, ``--engine-url``, and a variable of the environment,
    ``WEIGHTSYNC_AGENT_ENGINE_URL``; the flag wins.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    engine_url: Annotated[tuple[EngineUrl, ...], Field(min_length=1)]
    """Address of the engine's API server, http://HOST:PORT; several engines: given several times,
    or with commas between."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs a token."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 9100
    """Port to listen on; 0: any free one."""
    token_file: Path | None = None
    """File that holds the bearer token that callers must send (or WEIGHTSYNC_TOKEN), and in a
    second line the one that it replaces; read again whenever it changes."""
    tls_cert: Path | None = None
    """PEM file with the agent's certificate and its chain: it then speaks https.  Read again when
    it changes, as the two below."""
    tls_key: Path | None = None
    """PEM file with the certificate's key; None: it is in the same file."""
    tls_client_ca: Path | None = None
    """PEM file with the CA that signs callers' certificates: whoever has none is not heard."""
    insecure_http: bool = False
    """Listen on more than loopback without TLS: whoever can listen on that network can read the
    token, and push with it."""
    probe_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """With TLS: port of a plain listener on the same address that answers /healthz and /readyz
    alone; 0: it listens on loopback only."""
    journal: Path | None = None
    """File that tells a restarted agent what was under way (default: one for these engines in
    $XDG_STATE_HOME/weightsync or ~/.local/state/weightsync)."""
    require_push: bool = False
    """An engine is not ready with the weights that it was started with, only after a push."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What to log."""
    log_format: Literal["text", "json"] = "text"
    """How each line of the log is written; json: one object a line."""
    engine_poll_s: Seconds = 1.0
    """Seconds between two looks at the engine."""
    engine_probe_timeout_s: Seconds = 5.0
    """Seconds that one look may take; three silent ones in a row and the engine counts as gone."""
    attach_timeout_s: Seconds = 600.0
    """Seconds that joining the engine may take: its workers compare bytes with the checkpoint."""
    attach_backoff_max_s: Seconds = 30.0
    """Longest pause, in seconds, between two attempts to join the engine."""
    engine_timeout_s: Seconds = 60.0
    """Seconds for calls to the engine that bring no deadline of their own."""
    push_idle_timeout_s: Seconds = 120.0
    """Seconds without a call after which a push is given up.  A repeated /begin_update counts."""
    max_body_nbytes: Annotated[int, Field(ge=1024)] = 256 << 20
    """Bytes that the body of a request may have."""
    max_unpacked_nbytes: Annotated[int, Field(ge=1024)] = 1 << 30
    """Bytes that a packed record in a body may have once inflated."""
    shadow_device: Literal["same", "cpu"] = "same"
    """Where pushes in shadow mode land: in the memory that the engine's weights are in, or in the
    host's, which is locked in place for a GPU."""
    max_shadow_nbytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of shadow that a worker may take; what does not fit is written directly, while the
    engine is paused. None: all of it, or no push."""
    require_shadow: bool = False
    """An engine without room for a shadow of all its weights is refused when it is joined, not at
    the first push in shadow mode."""
    heartbeat_s: Seconds = 15.0
    """Seconds between two signs of life on /events."""
    shutdown_timeout_s: Seconds = 3.0
    """Seconds that running requests get to finish when the agent is told to stop."""
    token: SecretStr | None = None
    """The bearer token; from WEIGHTSYNC_TOKEN or the token file, never from a flag."""

    @pydantic.field_validator("engine_url", mode="before")
    @classmethod
    def _split_urls(cls, given: object) -> object:
        texts = (given,) if isinstance(given, str) else given
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            return given
        return tuple(url.strip().rstrip("/") for text in texts for url in text.split(","))

    @pydantic.model_validator(mode="after")
    def _tls_fits_together(self) -> AgentSettings:
        if self.tls_cert is None and (self.tls_key or self.tls_client_ca or self.probe_port):
            raise ValueError("tls_key, tls_client_ca and probe_port need tls_cert")
        return self

    @pydantic.model_validator(mode="after")
    def _shadow_is_whole_or_partial(self) -> AgentSettings:
        if self.require_shadow and self.max_shadow_nbytes is not None:
            raise ValueError("require_shadow is of all weights, max_shadow_nbytes of a part")
        return self

    @pydantic.field_validator("engine_url", mode="after")
    @classmethod
    def _no_url_twice(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(urls)) < len(urls):
            raise ValueError("an engine is named twice")
        return urls


def load_settings(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ
) -> AgentSettings:
    """Settings from flags (None: the process's) and the environment.

    Raises:
        InputError: A value, a variable or a flag is wrong, or the token is missing.
        SystemExit: argparse's, after ``--help`` or a flag that it does not know.
    """
    values: dict[str, object] = {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
    }
    if "token" in values:
        raise InputError(f"{ENV_PREFIX}TOKEN is no setting", hint=f"the token is in {ENV_TOKEN}")
    values |= vars(_parser().parse_args(argv))
    try:
        settings = AgentSettings.model_validate(values)
        token = _token(settings, environ)
    except pydantic.ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(
            f"the agent's settings are wrong: {what}", hint="weightsync-agent --help lists them"
        ) from error
    if token is None and not is_loopback(settings.host):
        raise InputError(
            f"the agent would listen on {settings.host} without a token",
            hint=f"set {ENV_TOKEN} or --token-file, or listen on 127.0.0.1",
        )
    if settings.tls_cert is None and not (settings.insecure_http or is_loopback(settings.host)):
        raise InputError(
            f"the agent would listen on {settings.host} without TLS, and get its token in clear",
            hint="set --tls-cert and --tls-key; or --insecure-http, where nobody else can listen "
            "on that network or something in front of the agent speaks TLS",
        )
    return settings.model_copy(update={"token": token})


def _token(settings: AgentSettings, environ: Mapping[str, str]) -> SecretStr | None:
    if settings.token_file is not None:
        return SecretStr(read_tokens(settings.token_file)[0])
    value = environ.get(ENV_TOKEN)
    if not value:
        return None
    check_token(value, ENV_TOKEN)
    return SecretStr(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weightsync-agent",
        description="The daemon beside an inference engine: trainers push weights through it.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"weightsync {__version__}")
    for name, field in AgentSettings.model_fields.items():
        if name == "token":
            continue
        default = "" if field.is_required() else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            parser.add_argument(flag, help=text, action="store_true")
            continue
        action = "append" if name == "engine_url" else "store"
        parser.add_argument(flag, metavar="VALUE", help=text, action=action)
    return parser
