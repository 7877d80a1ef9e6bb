"""``weightsync bench``: its options, and where its figures go."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console

from weightsync.errors import InputError, WeightSyncError
from weightsync_client.bench.gpu import run_gpu
from weightsync_client.bench.gpu_options import CASES, MAY_LACK, GpuOptions
from weightsync_client.bench.loopback import LoopbackOptions, run_loopback
from weightsync_client.bench.plan import PlanOptions, run_plan
from weightsync_client.bench.view import markdown, tables
from weightsync_client.commands.common import AsJson, errors_told, print_json
from weightsync_client.demo.stack import shared_environ
from weightsync_client.signals import sigterm_as_exit

T = TypeVar("T", bound=BaseModel)
_LOOPBACK = LoopbackOptions()
_GPU = GpuOptions()
_PLAN = PlanOptions()

bench = typer.Typer(
    help="Measure pushes beside their baselines, in the same run.", no_args_is_help=True
)

Markdown = Annotated[bool, typer.Option("--markdown", help="Print tables for a document.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="OUT.png", help="Draw the figures (needs weightsync[bench]).")
]
Nbytes = Annotated[int, typer.Option(help="Bytes of the model, about.")]
Rounds = Annotated[int, typer.Option(help="Rounds that count.")]
Warmup = Annotated[int, typer.Option(help="Rounds before them.")]
Timeout = Annotated[float, typer.Option(help="Seconds for all of it.")]


@bench.command()
def loopback(
    nbytes: Nbytes = _LOOPBACK.nbytes,
    rounds: Rounds = _LOOPBACK.rounds,
    warmup: Warmup = _LOOPBACK.warmup,
    sets: Annotated[
        int, typer.Option(help="Sets of processes, started anew, that share the rounds out.")
    ] = _LOOPBACK.sets,
    timeout: Timeout = _LOOPBACK.timeout_s,
    small_pushes: Annotated[
        int, typer.Option(help="Pushes of many small tensors, for what Python costs; 0: none.")
    ] = _LOOPBACK.small_pushes,
    as_json: AsJson = False,
    as_markdown: Markdown = False,
    plot: Plot = None,
) -> None:
    """Push between two processes on this machine's CPU, over NIXL, into the embedded torch engine.

    Beside it, in turn: a raw NIXL write of the same bytes in one descriptor, a gloo broadcast of
    the same tensors, safetensors saved and loaded by the engine's own loader.

    Exit status: 0 measured (targets met or not); 1 it failed; 2 bad arguments.
    """
    with _told(as_json or as_markdown) as told, _failing("loopback", as_json=as_json):
        _check_plot(plot)
        options = _options(
            LoopbackOptions, nbytes=nbytes, rounds=rounds, warmup=warmup, sets=sets,
            timeout_s=timeout, small_pushes=small_pushes,
        )  # fmt: skip
        with _folder() as folder:
            figures = run_loopback(options, folder, shared_environ(os.environ), told)
    _show(figures.to_dict(), as_json=as_json, as_markdown=as_markdown, plot=plot)


@bench.command()
def gpu(
    rounds: Rounds = _GPU.rounds,
    warmup: Warmup = _GPU.warmup,
    case: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(CASES)}; repeat it for several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench-gpu.json, .md, .png, and for logs.")
    ] = None,
    timeout: Timeout = _GPU.timeout_s,
    device: Annotated[str, typer.Option(hidden=True)] = _GPU.device,
    as_json: AsJson = False,
    as_markdown: Markdown = False,
    plot: Plot = None,
) -> None:
    """Push between GPUs into real vLLM: a model of the shape of Qwen3-8B, and one of many experts.

    Beside it, in turn: a plain copy between the GPUs, a raw NIXL write in one descriptor, an NCCL
    broadcast, vLLM's own NCCL weight transfer.  Trainer on the first GPU, engine on the second, or
    both on the only one.  A case that fails is named, and the others go on.

    Exit status: 0 the pushes were measured; 1 they failed; 2 bad arguments, or no GPU.
    """
    with _told(as_json or as_markdown) as told, _failing("gpu", as_json=as_json):
        _check_plot(plot)
        options = _options(
            GpuOptions, rounds=rounds, warmup=warmup, cases=case or CASES, timeout_s=timeout,
            device=device,
        )  # fmt: skip
        with _folder() if out is None else nullcontext(out) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            figures = run_gpu(options, folder, shared_environ(os.environ), told)
        if out is not None:
            (out / "bench-gpu.md").write_text(markdown(figures.to_dict()))
    _show(figures.to_dict(), as_json=as_json, as_markdown=as_markdown, plot=plot)
    if ({*options.cases} - MAY_LACK) & figures.failed.keys():
        raise typer.Exit(1)


@bench.command()
def plan(
    model_config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.json",
            help="A Hugging Face config.json.  [default: 128 experts in each of 48 layers]",
        ),
    ] = None,
    trainer: Annotated[str, typer.Option(metavar="KEY=N,...", help="Its ranks.")] = _PLAN.trainer,
    inference: Annotated[
        str, typer.Option(metavar="KEY=N,...", help="The engines' workers.")
    ] = _PLAN.inference,
    rounds: Rounds = _PLAN.rounds,
    warmup: Warmup = _PLAN.warmup,
    as_json: AsJson = False,
    as_markdown: Markdown = False,
    plot: Plot = None,
) -> None:
    """Plan a push and prove it whole, for parts of a model: how the time grows with the tensors.

    Exit status: 0 measured; 1 a plan is not whole; 2 bad arguments.
    """
    with _told(as_json or as_markdown) as told, _failing("plan", as_json=as_json):
        _check_plot(plot)
        options = _options(
            PlanOptions, config_file=model_config, trainer=trainer, inference=inference,
            rounds=rounds, warmup=warmup,
        )  # fmt: skip
        figures = run_plan(options, told)
    _show(figures.to_dict(), as_json=as_json, as_markdown=as_markdown, plot=plot)


@bench.command()
def report(
    figures: Annotated[Path, typer.Argument(metavar="FIGURES.json", help="What --json printed.")],
    plot: Plot = None,
) -> None:
    """Print the tables of a benchmark that was run elsewhere, in Markdown; draw it.

    Exit status: 0 done; 2 bad arguments.
    """
    with _failing("report", as_json=False):
        _check_plot(plot)
        answer = _stored(figures)
    _show(answer, as_json=False, as_markdown=True, plot=plot)


def _stored(path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(answer, dict) or "bench" not in answer:
        raise InputError(f"{path} holds no figures of a benchmark", hint="name what --json printed")
    return answer


def _options(kind: type[T], **values: object) -> T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{name}={first['input']}: {first['msg']}", hint="see weightsync bench --help"
        ) from error


def _show(
    answer: Mapping[str, Any], *, as_json: bool, as_markdown: bool, plot: Path | None
) -> None:
    if as_json:
        print_json(dict(answer))
    elif as_markdown:
        sys.stdout.write(markdown(answer))
    else:
        console = Console()
        for table in tables(answer):
            console.print(table)
    if plot is not None:
        from weightsync_client.bench.plot import draw

        draw(answer, plot)


def _check_plot(plot: Path | None) -> None:
    """Before anything is measured.

    Raises:
        InputError: It could not be drawn.
    """
    if plot is None:
        return
    from weightsync_client.bench.plot import check_plot

    check_plot(plot)


@contextmanager
def _told(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows what runs: on a terminal in one line that changes, elsewhere in lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: _say(text) if not quiet else None
        return
    with console.status("weightsync bench") as status:
        yield lambda text: status.update(f"weightsync bench · {text}")


def _say(text: str) -> None:
    sys.stderr.write(f"weightsync bench: {text}\n")


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder; after a failure its logs stay, and are named."""
    folder = Path(tempfile.mkdtemp(prefix="weightsync-bench-"))
    logs = folder / "run" / "logs"
    keep = False
    try:
        yield folder / "run"
    except WeightSyncError:
        keep = logs.exists()
        if keep:
            _say(f"logs are in {logs}")
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _failing(name: str, *, as_json: bool) -> Iterator[None]:
    """Turns failures into messages and exit statuses; what is interrupted ends its processes."""
    with errors_told(f"bench {name}", as_json=as_json), sigterm_as_exit():
        yield
