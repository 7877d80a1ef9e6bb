"""``weightsync push``, ``verify`` and ``explain``: a checkpoint folder and a live fleet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from weightsync.errors import InputError
from weightsync.logs import log_to_stderr
from weightsync_client.commands.common import (
    EXIT_NO,
    Agents,
    AsJson,
    CheckpointDir,
    Ignore,
    LogFormat,
    TokenFile,
    TraceFile,
    errors_told,
    new_fleet,
    print_json,
    read_token,
    tls_of_command,
)
from weightsync_client.commands.fleet import Mode, PushModes
from weightsync_client.control import Fleet
from weightsync_client.explain import Explanation, Part, explain
from weightsync_client.report import human_bytes
from weightsync_client.settings import Deadlines
from weightsync_client.signals import sigterm_as_exit

#: tensors that differ which are named to a person
_SHOWN = 20
#: a pause is shortest where all of a model fits; but a node need not have the model's size free
_PUSH_SLOT_NBYTES = 4 << 30
#: what verify packs at a time: nobody waits for it, so it need not hold the model
_VERIFY_SLOT_NBYTES = 1 << 30


def push(
    checkpoint: CheckpointDir,
    agents: Agents,
    version: Annotated[
        int | None, typer.Option(min=1, help="Newer than every engine's.  [default: the next]")
    ] = None,
    mode: Annotated[
        PushModes,
        typer.Option(help="shadow: the engines serve while the weights are written beside theirs."),
    ] = PushModes.direct,
    pause_mode: Annotated[Mode, typer.Option(help="What happens to running requests.")] = Mode.keep,
    max_slot_bytes: Annotated[
        int,
        typer.Option(
            min=4096,
            help="Bound of the memory that weights are packed in.  For a model that needs more, "
            "engines wait for the files to be read again, too.",
        ),
    ] = _PUSH_SLOT_NBYTES,
    check_finite: Annotated[
        bool, typer.Option(help="Refuse weights that are NaN or infinite.")
    ] = True,
    ignore: Ignore = None,
    trace: TraceFile = None,
    log_format: Annotated[
        LogFormat | None,
        typer.Option(help="Log each phase on stderr, as text or as one JSON object a line."),
    ] = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Push a checkpoint folder into every engine of a fleet, whole or not at all.

    Exit status: 0 every engine serves it; 1 the push failed; 2 bad arguments, or no checkpoint for
    these engines; 3 an engine refused tensors; 4 an agent does not answer, or does not take the
    token; 130 and 143 ended by Ctrl-C and by SIGTERM.  After all but 0 the message tells what every
    engine has now.
    """
    with errors_told("push", as_json=as_json):
        from weightsync_client.checkpoint import CheckpointSource
        from weightsync_client.publisher import Publisher
        from weightsync_client.trace import check_trace_file

        check_trace_file(trace)
        source = CheckpointSource(checkpoint)
        shown = sys.stderr.isatty() and not as_json and log_format is None
        if log_format is not None:
            log_to_stderr(log_format.value)
        with (
            Publisher(
                agents,
                token=read_token(token_file) or "",
                verify=tls_of_command(),
                mode=mode.value,
                pause_mode=pause_mode.value,
                max_slot_bytes=max_slot_bytes,
                check_finite=check_finite,
                ignore=ignore or (),
                progress="terminal" if shown else "off" if log_format is None else "log",
                group=None,
            ) as publisher,
            sigterm_as_exit(),
        ):
            report = publisher.push(source, version)
        if trace is not None:
            report.trace(trace)
        if as_json:
            print_json(report.to_dict())
        elif not shown:
            typer.echo(str(report))


def verify(
    checkpoint: CheckpointDir,
    agents: Agents,
    ignore: Ignore = None,
    max_slot_bytes: Annotated[
        int, typer.Option(min=4096, help="Bound of the memory that weights are packed in.")
    ] = _VERIFY_SLOT_NBYTES,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether every engine serves exactly this checkpoint, all bytes of it.

    Engines go on serving.  It makes a rendezvous, so the next push of a trainer makes a new one.

    Exit status: 0 equal; 1 an engine holds something else, or nothing could be said; 2 bad
    arguments, or no checkpoint for these engines; 3 an engine refused tensors; 4 an agent does not
    answer, or does not take the token; 130 ended by Ctrl-C.
    """
    with errors_told("verify", as_json=as_json):
        from weightsync_client.checkpoint import CheckpointSource
        from weightsync_client.publisher import make_nixl
        from weightsync_client.verify import verify as compare

        deadlines = Deadlines()
        source = CheckpointSource(checkpoint)
        with new_fleet(agents, token_file, deadlines) as fleet:
            verdicts = compare(
                fleet,
                source,
                make_transport=make_nixl,
                deadlines=deadlines,
                ignore=ignore or (),
                max_slot_nbytes=max_slot_bytes,
            )
    equal = all(v.equal for v in verdicts)
    if as_json:
        print_json({"equal": equal, "agents": [v.to_dict() for v in verdicts]})
    for verdict in () if as_json else verdicts:
        what = "equal" if verdict.equal else f"{len(verdict.differs)} differ"
        typer.echo(
            f"{verdict.url}: version {verdict.version}, {verdict.kernel_tensors} kernel tensors "
            f"compared: {what}"
        )
        for found in verdict.differs[:_SHOWN]:
            typer.echo(
                f"  {found.place} {found.kernel_tensor}: {found.what} "
                f"(from {', '.join(found.checkpoint_tensors)})"
            )
        if (more := len(verdict.differs) - _SHOWN) > 0:
            typer.echo(f"  and {more} more: --json has all")
    raise typer.Exit(0 if equal else EXIT_NO)


def explain_command(
    tensor: Annotated[
        str, typer.Argument(metavar="TENSOR", help="Name of a checkpoint or a kernel tensor.")
    ],
    agents: Agents,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of safetensors with the names and shapes that are pushed.  "
            "[default: the engine's own, where it is here]",
        ),
    ] = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Tell where each byte of a tensor comes from and goes to, in every worker.

    It makes a rendezvous, so the next push of a trainer makes a new one.

    Exit status: 0 told; 1 an engine could not tell; 2 bad arguments, or no such tensor; 3 an engine
    refused tensors; 4 an agent does not answer, or does not take the token.
    """
    with errors_told("explain", as_json=as_json):
        from weightsync.checkpoint import Checkpoint
        from weightsync_client.answers import ask_layouts
        from weightsync_client.policy import Roster

        deadlines = Deadlines()
        with new_fleet(agents, token_file, deadlines) as fleet:
            folder = _engines_folder(fleet, deadlines) if checkpoint is None else checkpoint
            manifest = Checkpoint(folder).manifest()
            asked = Roster(fleet)
            answers = ask_layouts(asked, manifest, 1, timeout_s=deadlines.rendezvous_s)
            workers = [(a.url, layout) for a in answers for layout in a.layouts()]
        found = explain(tensor, manifest, workers)
        if as_json:
            print_json(found.to_dict())
        else:
            _print_explanation(found)


def _engines_folder(fleet: Fleet, deadlines: Deadlines) -> Path:
    """What the first agent's engine was told to load, if that is a folder here.

    Raises:
        InputError: It is not.
    """
    told: dict[str, Any] = fleet.agents[0].get("/status", timeout_s=deadlines.status_s)
    models = [str(e.get("model", "")) for e in told.get("engines", ())]
    if not models or not Path(models[0]).is_dir():
        raise InputError(
            f"the engine's own checkpoint ({', '.join(models) or 'unknown'}) is no folder here",
            hint="name one with the same names and shapes: --checkpoint DIR",
        )
    return Path(models[0])


def _print_explanation(found: Explanation) -> None:
    """In lines, not in a table: names are long, and people search for them."""
    lines: dict[str, list[str]] = {}
    agents = {part.agent for part in found.parts} | {gap.agent for gap in found.untouched}
    agents |= {agent for agent, _ in found.dropped_by}

    def of(agent: str, place: str) -> list[str]:
        return lines.setdefault(place if len(agents) == 1 else f"{agent} {place}", [])

    for part in found.parts:
        cast = "" if part.checkpoint_dtype == part.kernel_dtype else f", as {part.kernel_dtype}"
        runs = "" if part.runs == 1 else f" in {part.runs:,} runs"
        source = f"{part.checkpoint_tensor}{_indices(part)}"
        target = f"{part.kernel_tensor} bytes [{part.start:,}, {part.stop:,}){runs}"
        told = of(part.agent, part.place)
        told.append(f"{source}, {human_bytes(part.nbytes)}{cast}")
        told.append(f"  -> {target}, {part.mode}, of {part.module or 'the model'}")
    for gap in found.untouched:
        of(gap.agent, gap.place).append(
            f"{gap.kernel_tensor} bytes [{gap.start:,}, {gap.stop:,}) are left alone: padding"
        )
    for agent, place in found.dropped_by:
        of(agent, place).append("its loader takes the tensor and drops it")
    for worker, told in lines.items():
        typer.echo("\n  ".join([worker, *told]))
    if not lines:
        typer.echo(f"{found.tensor} has no bytes")


def _indices(part: Part) -> str:
    if part.box is None:
        return f" elements {part.src_offset:,} + {list(part.src_strides)}"
    return f"[{', '.join(f'{lo}:{hi}' for lo, hi in part.box)}]"
