"""One rank of the demo's training job: ``python -m weightsync_client.demo.trainer``.

It makes the model and its first checkpoint, then does what lines on its standard input say:
``push VERSION`` changes every weight and pushes, ``save`` writes the last checkpoint.  It ends when
its input does.  The environment is torchrun's.  Every rank is told the same; rank 0 writes the
checkpoints, and what happens to its standard output, a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from weightsync.errors import WeightSyncError
from weightsync_client.demo.fp8 import quantize_checkpoint
from weightsync_client.demo.model import describe_model, draw_weights, new_model
from weightsync_client.demo.sharded import gathered, join, own_device, shard
from weightsync_client.publisher import Publisher
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.report import PushReport


class Events:
    """Writes what happens, and is the publisher's progress."""

    def __init__(self, out: TextIO, rank: int, trace: Path | None = None) -> None:
        self._out = out
        self._trace = trace
        self._silent = rank > 0

    def send(self, event: str, **facts: Any) -> None:
        """One line, if this is rank 0."""
        if self._silent:
            return
        self._out.write(json.dumps({"event": event, **facts}) + "\n")
        self._out.flush()

    def started(self, phase: str, version: int) -> None:
        """A phase starts."""
        self.send("phase", phase=phase, version=version, seconds=None)

    def ended(self, phase: str, version: int, push_id: str, seconds: float, nbytes: int) -> None:
        """A phase ended well."""
        self.send("phase", phase=phase, version=version, seconds=seconds)

    def done(self, report: PushReport) -> None:
        """The push is over, well."""
        if self._trace is not None and not self._silent:
            report.trace(self._trace)
        facts = report.to_dict() | {"version": report.version}
        self.send("pushed", report=facts)

    def failed(self, phase: str, version: int, push_id: str, error: BaseException) -> None:
        """Nothing: the error itself is sent."""


def train(options: argparse.Namespace, lines: TextIO, out: Events) -> None:
    """Make version 0, then do as told until ``lines`` end.

    Raises:
        WeightSyncError: The config cannot be used, or a push failed.
    """
    first: bool = options.rank == 0
    device = own_device(options.device)
    model = new_model(options.config).to(device)
    draw_weights(model, seed=0)
    facts = describe_model(model)
    if first:
        _write(model, options, "v0")
    mesh = join(options.device)
    if mesh is not None:
        shard(model, mesh)
    out.send("made", **facts)
    spec = QuantizationSpec() if options.quantization == "fp8" else None
    with Publisher(options.agent, progress=out, quantization=spec, mode=options.mode) as publisher:
        for line in lines:
            command, *rest = line.split()
            if command == "push":
                version = int(rest[0])
                draw_weights(model, seed=version)
                publisher.push(model, version=version)
            elif command == "save":
                _save(model, options, sharded=mesh is not None)
                out.send("saved")


def _save(model: Any, options: argparse.Namespace, *, sharded: bool) -> None:
    """Write the checkpoint ``trained``; of shards, what torch itself gathers from them."""
    if sharded:
        weights = gathered(model)
        if options.rank > 0:
            return
        model = new_model(options.config)
        model.load_state_dict(weights)
    _write(model, options, "trained")


def _write(model: Any, options: argparse.Namespace, name: str) -> None:
    model.save_pretrained(options.folder / name)
    if options.quantization == "fp8":
        quantize_checkpoint(options.folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="weightsync_client.demo.trainer")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--agent", action="append", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--mode", default="direct")
    options = parser.parse_args(argv)
    options.rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with _own_stdout() as out:
        events = Events(out, options.rank, options.trace)
        try:
            train(options, sys.stdin, events)
        except WeightSyncError as error:
            logging.getLogger(__name__).exception("the trainer ends")
            problem = error.to_problem()
            # what is no JSON in the context is of use to a reader of the log alone
            events.send("failed", problem=json.loads(json.dumps(problem, default=str)))
            return 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


@contextmanager
def _own_stdout() -> Iterator[TextIO]:
    """Standard output for events alone: what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


if __name__ == "__main__":
    sys.exit(main())
