"""The agent's certificates: checked before it listens, read again when they are renewed."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightsync.certificates import RENEW_DAYS, ends_at
from weightsync.errors import InputError
from weightsync_server.agent.settings import AgentSettings

log = logging.getLogger(__name__)


class Certificates:
    """Certificate, key and the CA of clients, as files that somebody may renew.

    Args:
        settings: Names the files.
        tell: Hears when what a file holds ends: ``certificate`` or ``client_ca``, and the time
            in seconds since 1970; again after each renewal.

    Raises:
        InputError: A file cannot be read, is not what it should be, or they do not fit together.
    """

    def __init__(self, settings: AgentSettings, tell: Callable[[str, float], None]) -> None:
        self._tell = tell
        self._cert, self._key = settings.tls_cert, settings.tls_key
        self._client_ca = settings.tls_client_ca
        self._seen = self._signature()
        if self._cert is not None:
            try:
                self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
                self._tell_ends()
            except (OSError, ssl.SSLError, ValueError) as error:
                names = ", ".join(map(str, self._files))
                raise InputError(
                    f"cannot use the TLS files {names}: {error}",
                    hint="PEM files: the certificate with its chain, its key without a passphrase, "
                    "and the CA of the clients",
                ) from error

    @property
    def options(self) -> dict[str, Any]:
        """What uvicorn is told."""
        if self._cert is None:
            return {}
        return {
            "ssl_certfile": self._cert,
            "ssl_keyfile": self._key,
            "ssl_ca_certs": self._client_ca,
            "ssl_cert_reqs": ssl.CERT_NONE if self._client_ca is None else ssl.CERT_REQUIRED,
        }

    def renew(self, context: ssl.SSLContext) -> None:
        """Give connections to come what the files hold now, if that changed and can be used."""
        seen = self._signature()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(context)
            log.info("the TLS files were read again")
            self._tell_ends()
        except (OSError, ssl.SSLError, ValueError) as error:
            log.error("the TLS files have changed and cannot be used: %s", error)

    def _tell_ends(self) -> None:
        for name, file in (("certificate", self._cert), ("client_ca", self._client_ca)):
            if file is None:
                continue
            try:
                ends = ends_at(file)
            except ValueError as error:  # OpenSSL takes it, and that is what counts
                log.warning("cannot tell when %s ends: %s", file, error)
                continue
            self._tell(name, ends)
            days = (ends - time.time()) / 86_400
            if days < 0:
                log.error("%s has ended, and nobody gets through: write a renewed one there", file)
            elif days < RENEW_DAYS:
                log.warning("%s ends in %.1f days: write a renewed one there", file, days)

    @property
    def _files(self) -> list[Path]:
        return [f for f in (self._cert, self._key, self._client_ca) if f is not None]

    def _load(self, context: ssl.SSLContext) -> None:
        if self._cert is not None:
            # without a passphrase of ours OpenSSL would ask the terminal for one
            context.load_cert_chain(self._cert, self._key, password="")
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)

    def _signature(self) -> list[tuple[int, int]]:
        found = []
        for file in self._files:
            try:
                stat = file.stat()
            except OSError:
                continue
            found.append((stat.st_mtime_ns, stat.st_ino))
        return found
