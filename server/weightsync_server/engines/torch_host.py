"""The embedded torch engine as a process: a small inference host around a transformers model.

``python -m weightsync_server.engines.torch_host --model DIR --port 8000``

weightsync's middleware and receiver are always in it: no options bring them in, as with vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import uvicorn
from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, ValidationError

from weightsync.errors import AuthError, DeadlineError
from weightsync_server.engines.torch_app import EngineClient, Limits, create_app
from weightsync_server.engines.torch_decoder import Decoder, Token

if TYPE_CHECKING:
    from weightsync_server.engines.torch_engine import TorchAdapter

_SHUTDOWN_S = 5
_log = logging.getLogger(__name__)


class HostSettings(BaseModel):
    """What the process is started with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: DirectoryPath
    """Folder that save_pretrained wrote: the weights to begin with."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """Port to listen on; 0 takes a free one, which the log names."""
    device: str = "cpu"
    """Where the weights live, as torch names it."""
    request_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """The longest that a completion may take, its wait for a paused engine included."""


class _Server(uvicorn.Server):
    """Ends the requests that a paused engine holds before it waits for open connections."""

    decoder: Decoder

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(self.decoder.pause("abort")), _SHUTDOWN_S)
        await super().shutdown(sockets)


def serve(settings: HostSettings) -> None:
    """Load the model and answer requests until SIGTERM or SIGINT.

    Raises:
        AuthError: The secret that is shared with the agent is too short or not private.
        OSError: The port is taken, or the folder holds no model.
        ValueError: transformers knows no causal language model for the folder's config.
    """
    # A taken port shows now, not after the model was loaded.
    with _bound_socket(settings.host, settings.port) as listener:
        import torch

        from weightsync_server.engines.torch_engine import TorchAdapter
        from weightsync_server.middleware import WeightsyncMiddleware
        from weightsync_server.receiver.endpoint import WorkerEndpoint
        from weightsync_server.secret import load_secret

        secret = load_secret()
        adapter = TorchAdapter(settings.model, device=settings.device)
        endpoint = WorkerEndpoint(adapter)

        def next_token(token_ids: Sequence[int]) -> Token:
            with torch.inference_mode():
                ids = torch.tensor([token_ids], device=adapter.device)
                logits = adapter.live(input_ids=ids, use_cache=False).logits[0, -1]
                logprobs = torch.log_softmax(logits.float(), dim=-1)
                best = int(logprobs.argmax())
                return Token(best, float(logprobs[best]), endpoint.receiver.version)

        decoder = Decoder(next_token)
        client = EngineClient(
            decoder,
            {"weightsync_call": endpoint.call},
            model_path=str(settings.model),
            engine_version=adapter.version,
        )
        app = create_app(decoder, client, limits(adapter, settings.request_timeout_s))
        app.add_middleware(WeightsyncMiddleware, secret=secret)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S
        )
        server = _Server(config)
        server.decoder = decoder
        _log.info("serving %s on http://%s:%d", settings.model, *listener.getsockname()[:2])
        try:
            server.run(sockets=[listener])
        finally:
            try:
                decoder.close(timeout_s=_SHUTDOWN_S)
            except DeadlineError as error:
                _log.error("%s", error)
            else:
                endpoint.receiver.close()


def limits(adapter: TorchAdapter, request_timeout_s: float) -> Limits:
    """What the model can answer, from its own config."""
    config = adapter.config.get_text_config()
    return Limits(
        vocab_size=config.vocab_size,
        model_len=getattr(config, "max_position_embeddings", sys.maxsize),
        request_timeout_s=request_timeout_s,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the process; returns its exit status."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Before uvicorn takes the signal and after it gave it back, it ends the process in good order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(_parse(argv))
    except (OSError, ValueError, AuthError) as error:
        _log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _parse(argv: Sequence[str] | None) -> HostSettings:
    parser = argparse.ArgumentParser(prog="weightsync_server.engines.torch_host")
    for name, field in HostSettings.model_fields.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), required=field.is_required(), default=field.default
        )
    try:
        return HostSettings.model_validate(vars(parser.parse_args(argv)))
    except ValidationError as error:
        parser.error(str(error))


def _bound_socket(host: str, port: int) -> socket.socket:
    """A bound socket; uvicorn listens on it once the model is there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol unnamed, asyncio leaves TCP_NODELAY off and every answer waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
