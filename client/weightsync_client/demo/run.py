"""The demo from the model to the proof."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from weightsync.errors import (
    EngineError,
    InputError,
    ManifestError,
    RefusedError,
    TraceError,
    WeightSyncError,
)
from weightsync_client.demo.ask import PROBE_TOKENS, Answer, Traffic, make_prompts
from weightsync_client.demo.link import TrainerLink
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Processes
from weightsync_client.demo.result import (
    EXIT_BAD_ARGUMENTS,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_REFUSED,
    DemoResult,
)
from weightsync_client.demo.stack import Stack, context_tokens, shared_environ
from weightsync_client.demo.view import PlainView, View
from weightsync_client.report import human_bytes

#: what says that the engine cannot take such weights: nothing of it has changed then
REFUSALS = (RefusedError, TraceError, ManifestError)
_TRAFFIC_END_S = 120.0


def run_demo(options: DemoOptions, view: View | None = None) -> DemoResult:
    """Run the demo: everything that it starts is ended when this returns or raises.

    What goes wrong is told by the result's ``error`` and ``exit_code``; a KeyboardInterrupt or
    SystemExit passes through.

    Args:
        options: What to do.
        view: Told of it as it goes; None: plain lines on standard error.
    """
    view = PlainView(sys.stderr) if view is None else view
    result = DemoResult()
    try:
        options.check()
        with _folder(options, result) as folder:
            (folder / "logs").mkdir()
            deadline = Deadline(options.timeout_s)
            with Processes(folder / "logs", shared_environ(os.environ)) as processes:
                view.opened(options)
                try:
                    _Demo(options, view, folder, processes, deadline, result).run()
                except InputError as error:
                    # a wrong config shows only where the model is made
                    made = (folder / "v0").exists()
                    _fail(result, error, EXIT_FAILED if made else EXIT_BAD_ARGUMENTS)
                except WeightSyncError as error:
                    _fail(result, error, EXIT_FAILED)
                finally:
                    view.close()
    except InputError as error:
        _fail(result, error, EXIT_BAD_ARGUMENTS)
    return result


class _Demo:
    def __init__(
        self,
        options: DemoOptions,
        view: View,
        folder: Path,
        processes: Processes,
        deadline: Deadline,
        result: DemoResult,
    ) -> None:
        self._options = options
        self._view = view
        self._folder = folder
        self._processes = processes
        self._deadline = deadline
        self._result = result

    def run(self) -> None:
        view, folder = self._view, self._folder
        options = self._options
        first = Stack("first", options, self._processes, self._deadline, options.replicas)
        trainer = TrainerLink(
            self._processes,
            options.config_file,
            folder,
            first.agent_urls,
            "cuda" if options.cuda else "cpu",
            options.trainer_ranks,
            self._deadline,
            options.quantization,
            options.trace_file,
            options.mode,
        )
        view.working("making a model with random weights")
        made = trainer.wait("made")
        view.done(
            f"{made['name']}, {made['parameters'] / 1e6:.1f} M parameters, "
            f"{human_bytes(made['nbytes'])}"
        )
        prompts = make_prompts(made["vocab_size"])
        context = context_tokens(made["max_positions"])

        many = options.replicas > 1
        what = f"{options.replicas} engines ({options.engine})" if many else options.engine
        agents = "their agents" if many and not options.one_agent else "the agent"
        view.working(f"starting {what} on it, and {agents}")
        first.start(folder / "v0", context)
        try:
            self._note_engines(first.wait_ready())
        except REFUSALS as error:
            # the engine's own checkpoint is too much for it: no agent lets a trainer in
            self._refused(error, old_weights_served=bool(first.answers(prompts)))
            return
        view.done(self._engine_line())
        answers = [first.answers(prompts)]
        view.answered(0, answers[0][0])

        longest = max(len(p) for p in prompts)
        try:
            with Traffic(first.engine_urls, prompts, context - longest) as traffic:
                for version in range(1, self._options.pushes + 1):
                    self._push(trainer, version)
                    answers.append(first.answers(prompts))
                    view.answered(version, answers[-1][0])
                traffic.stop(min(_TRAFFIC_END_S, self._deadline.left_s("the last completions")))
        except REFUSALS as error:
            with contextlib.suppress(EngineError):
                traffic.stop(_TRAFFIC_END_S)
            same = first.answers(prompts) == answers[0] and first.is_ready()
            self._refused(error, old_weights_served=same)
            return
        trainer.tell("save")
        trainer.wait("saved")
        trainer.finish()
        self._prove(first, answers, prompts, context, traffic)

    def _push(self, trainer: TrainerLink, version: int) -> None:
        trainer.tell(f"push {version}")
        for event in trainer.until("pushed"):
            if event["event"] == "phase":
                self._view.phase(version, event["phase"], event["seconds"])
            else:
                self._result.add_push(event["report"])
                self._view.pushed(event["report"])

    def _prove(
        self,
        first: Stack,
        answers: list[list[Answer]],
        prompts: list[list[int]],
        context: int,
        traffic: Traffic,
    ) -> None:
        """Compare with an engine that has loaded the trainer's checkpoint."""
        view, result = self._view, self._result
        view.working("starting a second engine on the checkpoint that the trainer saved")
        # once more, with no other request in the same batch
        pushed, pushed_sums = first.answers(prompts), first.checksums()
        second = Stack("second", self._options, self._processes, self._deadline)
        second.start(self._folder / "trained", context)
        first.stop()  # it is gone long before the second one needs its memory
        second.wait_ready()
        fresh = second.answers(prompts)
        view.done("a second engine, freshly loaded from the checkpoint that the trainer saved")

        (fresh_sums,) = second.checksums()
        equal = sum(
            fresh_sums.get(name) == digest for sums in pushed_sums for name, digest in sums.items()
        )
        result.bytes_equal_fresh_load = bool(fresh_sums) and all(
            sums == fresh_sums for sums in pushed_sums
        )
        result.logprobs_equal_fresh_load = pushed == fresh * len(pushed_sums)
        moves = list(pairwise([*answers[:-1], pushed]))
        moved = all(before != after for before, after in [*moves, (answers[0], pushed)])
        engines = "the engine" if len(pushed_sums) == 1 else f"{len(pushed_sums)} engines"
        answered = f"{traffic.answered} completions answered during the pushes, none failed"
        tensors = f"{equal} of {len(fresh_sums) * len(pushed_sums)} tensors of {engines}"
        checks = [
            (f"{tensors} have the fresh load's SHA-256", result.bytes_equal_fresh_load),
            (
                f"{len(pushed)} prompts × {PROBE_TOKENS} tokens have the fresh load's logprobs",
                result.logprobs_equal_fresh_load,
            ),
            ("every push moved the logprobs: the comparison could have failed", moved),
            (f"{answered}, the longest took {traffic.longest_s:.2f} s", traffic.answered > 0),
        ]
        view.proven(checks)
        failed = [text for text, holds in checks if not holds]
        if failed:
            raise EngineError("the proof failed; these do not hold: " + "; ".join(failed))
        result.exit_code = EXIT_OK

    def _note_engines(self, statuses: list[dict[str, Any]]) -> None:
        result = self._result
        workers = [worker for status in statuses for worker in status["workers"]]
        engine = statuses[0]["engines"][0]
        result.engine = f"{engine['name']} {engine['version']}"
        result.kernel_tensors = sum(w["kernel_tensors"] for w in workers)
        result.direct = sum(w["direct"] for w in workers)
        result.staged = sum(w["staged"] for w in workers)
        result.refusals = [dict(r) for w in workers for r in w["refusals"]]
        result.refused = len(result.refusals)

    def _engine_line(self) -> str:
        result = self._result
        return (
            f"{result.engine} serves it; the agent found {result.kernel_tensors} kernel tensors: "
            f"{result.direct} direct, {result.staged} staged, {result.refused} refused"
        )

    def _refused(self, error: WeightSyncError, *, old_weights_served: bool) -> None:
        """Note what was refused.

        Raises:
            EngineError: The engine does not serve what it served before.
        """
        result = self._result
        one = {"tensor": str(error.context.get("tensor", "")), "reason": error.message}
        refusals = error.context.get("refusals") or [one]
        result.refusals = [
            {"tensor": str(r["tensor"]), "reason": str(r["reason"])} for r in refusals
        ]
        result.refused = len(result.refusals)
        result.old_weights_served = old_weights_served
        self._view.refused(result.refusals, old_weights_served=old_weights_served)
        if not old_weights_served:
            raise EngineError(
                "tensors were refused, and the engine no longer answers as it did before"
            )
        _fail(result, error, EXIT_REFUSED)


def _fail(result: DemoResult, error: WeightSyncError, exit_code: int) -> None:
    result.error = str(error)
    result.exit_code = exit_code


@contextlib.contextmanager
def _folder(options: DemoOptions, result: DemoResult) -> Iterator[Path]:
    """The demo's folder; a temporary one goes at the end, unless it is wanted or tells why."""
    if options.workdir is not None:
        folder = options.workdir.resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make --workdir {folder}: {error}") from error
        result.folder = str(folder)
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="weightsync-demo-"))
    try:
        yield folder
    finally:
        if options.keep or (result.error and result.exit_code == EXIT_FAILED):
            result.folder = str(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
