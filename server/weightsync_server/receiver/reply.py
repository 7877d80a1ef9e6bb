"""A worker's way of answering: HTTP to the agent on loopback, over a connection that is kept."""

from __future__ import annotations

import http.client
import logging
from urllib.parse import urlsplit

from weightsync.protocol import WorkerReply
from weightsync_server.secret import HEADER, load_secret

logger = logging.getLogger(__name__)

_TIMEOUT_S = 30.0


class ReplyLine:
    """Posts answers.  Used by one thread at a time."""

    def __init__(self) -> None:
        self._to = ""
        self._connection: http.client.HTTPConnection | None = None
        self._secret = ""

    def post(self, url: str, reply: WorkerReply) -> None:
        """Deliver one answer; what fails is logged, since the agent's next describe asks again."""
        parts = urlsplit(url)
        body = reply.model_dump_json().encode()
        try:
            status = self._posted(parts.netloc, parts.path, body)
            failure = f"HTTP {status}" if status >= http.client.BAD_REQUEST else ""
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
        if failure:
            logger.error(
                "the reply to %s could not be delivered to %s: %s", reply.call_id, url, failure
            )

    def _posted(self, to: str, path: str, body: bytes) -> int:
        if self._connection is not None and self._to == to:
            try:
                return self._exchange(self._connection, path, body)
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException):
                pass  # the agent ends what was idle; a second copy of an answer changes nothing
        # made by hand, it goes to loopback whatever proxies the engine's environment names
        self.close()
        self._to, connection = to, http.client.HTTPConnection(to, timeout=_TIMEOUT_S)
        self._connection = connection
        return self._exchange(connection, path, body)

    def _exchange(self, connection: http.client.HTTPConnection, path: str, body: bytes) -> int:
        self._secret = self._secret or load_secret()
        headers = {"Content-Type": "application/json", HEADER: self._secret}
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            answer.read()
        except BaseException:
            self.close()
            raise
        return answer.status

    def close(self) -> None:
        """End the connection; the next answer makes another."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
