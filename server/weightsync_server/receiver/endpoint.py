"""The door of a worker: one command in, one reply out, by HTTP to the agent on loopback."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from weightsync.codec import pack, unpack
from weightsync.errors import EngineError, InputError, WeightSyncError
from weightsync.protocol import WorkerCommand, WorkerReply, faults
from weightsync.topology import cuda_address
from weightsync.transport.base import Transport
from weightsync.worker_messages import (
    AbortBody,
    AttachBody,
    BeginBody,
    CommitBody,
    ConnectBody,
    LayoutBody,
    PrepareBody,
    RollbackBody,
    VerifyBody,
)
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.receiver import Receiver
from weightsync_server.receiver.reply import ReplyLine

logger = logging.getLogger(__name__)


def nixl_transport(device: torch.device | None = None) -> Transport:
    """A NIXL transport with a fresh name; it uses the network cards near ``device``.

    Writers of the same host may map what it registers on a GPU.
    """
    from weightsync.transport.cuda_ipc import CudaIpcTransport
    from weightsync.transport.nixl import NixlTransport

    return CudaIpcTransport(NixlTransport(gpu=cuda_address(device)))


def named_transport(
    device: torch.device | None = None, environ: Mapping[str, str] = os.environ
) -> Transport:
    """The transport that ``WEIGHTSYNC_TRANSPORT`` names (``nixl`` where it is unset or empty).

    Raises:
        InputError: It names none.
        TransportError: It cannot be loaded.
    """
    name = environ.get("WEIGHTSYNC_TRANSPORT") or "nixl"
    if name == "nixl":
        return nixl_transport(device)
    if name != "ucxx":
        raise InputError(f"WEIGHTSYNC_TRANSPORT is {name!r}", hint="nixl or ucxx")
    from weightsync.transport.ucxx import UcxxTransport

    return UcxxTransport(gpu=cuda_address(device))


class WorkerEndpoint:
    """Answers the agent's commands for one worker.

    Args:
        adapter: The engine's ways; its model must be loaded.
        new_transport: Makes a transport with a name that was never used; default: the one that
            ``WEIGHTSYNC_TRANSPORT`` names.
    """

    def __init__(
        self, adapter: EngineAdapter, new_transport: Callable[[], Transport] | None = None
    ) -> None:
        if new_transport is None:
            new_transport = partial(named_transport, adapter.device)
        self.receiver = Receiver(adapter, new_transport)
        self._line = ReplyLine()

    def call(self, command: str) -> None:
        """Run one :class:`WorkerCommand` (JSON) and post its :class:`WorkerReply`.

        Called on the worker's own thread by the engine's fan-out; never raises for what the
        command did, since the reply tells.

        Raises:
            InputError: The command is none, so there is nobody to reply to.
        """
        try:
            message = WorkerCommand.model_validate_json(command)
        except ValidationError as error:
            raise InputError(f"not a worker command: {faults(error)}") from error
        adapter = self.receiver.adapter
        adapter.place = dataclasses.replace(adapter.place, engine=message.engine)
        body, problem = "", None
        try:
            result = self._run(message)
            body = "" if result is None else pack(result)
        except WeightSyncError as error:
            logger.warning("%s failed: %s", message.op, error)
            problem = error.to_problem()
        except Exception as error:
            logger.exception("%s failed", message.op)
            problem = EngineError(
                f"{message.op} failed at {adapter.place}: {type(error).__name__}: {error}",
                hint="the engine's log has the traceback",
            ).to_problem()
        reply = WorkerReply(
            call_id=message.call_id,
            place=str(adapter.place),
            instance=self.receiver.instance,
            body=body,
            problem=problem,
        )
        self._line.post(message.reply_url, reply)

    def _run(self, message: WorkerCommand) -> Any:
        r = self.receiver
        own = message.body_for(str(r.adapter.place))
        match message.op:
            case "describe":
                return r.describe()
            case "attach":
                return r.attach(unpack(own, AttachBody))
            case "layout":
                return r.layout(unpack(own, LayoutBody))
            case "connect":
                return r.connect(unpack(own, ConnectBody))
            case "begin":
                return r.begin(unpack(own, BeginBody))
            case "prepare":
                return r.prepare(unpack(own, PrepareBody))
            case "commit":
                return r.commit(unpack(own, CommitBody))
            case "abort":
                return r.abort(unpack(own, AbortBody))
            case "rollback":
                return r.rollback(unpack(own, RollbackBody))
            case "reload":
                return r.reload()
            case "close":
                return r.close()
            case "checksums":
                return r.checksums()
            case "verify":
                return r.verify(unpack(own, VerifyBody))
