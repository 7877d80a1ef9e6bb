"""The ``weightsync`` command."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import weightsync
from weightsync.errors import InputError
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_client.bench.command import bench
from weightsync_client.commands.common import (
    EXIT_INPUT,
    TLS_FILES,
    AsJson,
    TraceFile,
    print_json,
)
from weightsync_client.commands.doctor import doctor
from weightsync_client.commands.fleet import PushModes, pause, reload, resume, rollback, status
from weightsync_client.commands.weights import explain_command, push, verify
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.run import run_demo
from weightsync_client.demo.view import PlainView, TerminalView, View
from weightsync_client.plan_command import plan
from weightsync_client.settings import TlsFiles
from weightsync_client.signals import sigterm_as_exit

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weightsync {weightsync.__version__}, protocol {PROTOCOL_VERSION}")
        raise typer.Exit


@app.callback()
def certificates(
    ca_file: Annotated[
        Path | None,
        typer.Option(help="CA of the agents' certificates.  [default: WEIGHTSYNC_CA_FILE]"),
    ] = None,
    cert_file: Annotated[
        Path | None,
        typer.Option(help="Certificate for agents that want one.  [default: WEIGHTSYNC_CERT_FILE]"),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="Its key, if not in the same file.  [default: WEIGHTSYNC_KEY_FILE]"),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Tell it, and exit."),
    ] = False,
) -> None:
    """Carry new weights into live inference engines: whole or not at all."""
    TLS_FILES.set(TlsFiles(ca_file, cert_file, key_file))


class Engine(StrEnum):
    """Engines that the demo can start."""

    vllm = "vllm"
    torch = "torch"


class Where(StrEnum):
    """Devices that the demo can use."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Quantized(StrEnum):
    """What the demo's engines can serve."""

    none = "none"
    fp8 = "fp8"


@app.command()
def demo(
    engine: Annotated[
        Engine, typer.Option(help="vllm: a real vLLM server; torch: the small one of weightsync.")
    ] = Engine.vllm,
    model_config: Annotated[
        Path | None,
        typer.Option(
            metavar="HF_CONFIG.json",
            help="Any Hugging Face config.json; the weights are random.  [default: a tiny Qwen3]",
        ),
    ] = None,
    pushes: Annotated[int, typer.Option(min=1, max=1000, help="How often all weights change.")] = 3,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed/--plain",
            help="Whether vLLM on CPU packs its linear weights: staged pushes, else direct ones.",
        ),
    ] = True,
    device: Annotated[
        Where, typer.Option(help="Where engine and trainer keep the weights.")
    ] = Where.auto,
    tp: Annotated[int, typer.Option(min=1, max=64, help="Workers (tensor parallel).")] = 1,
    pp: Annotated[int, typer.Option(min=1, max=64, help="Pipeline stages.")] = 1,
    dp: Annotated[int, typer.Option(min=1, max=64, help="Data-parallel copies in an engine.")] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Workers share out the experts.")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Engines that are pushed to.")] = 1,
    one_agent: Annotated[
        bool, typer.Option("--one-agent", help="All engines behind one agent.  [default: one each]")
    ] = False,
    trainer_ranks: Annotated[
        int, typer.Option(min=1, max=64, help="Trainer processes; FSDP2 shards the weights.")
    ] = 1,
    quantization: Annotated[
        Quantized,
        typer.Option(help="fp8: the engine serves fp8 blocks, the trainer keeps bfloat16."),
    ] = Quantized.none,
    mode: Annotated[
        PushModes,
        typer.Option(
            help="shadow: the engine serves while new weights are written beside its own."
        ),
    ] = PushModes.direct,
    as_json: AsJson = False,
    workdir: Annotated[
        Path | None,
        typer.Option(help="New or empty folder for checkpoints and logs, which stay there."),
    ] = None,
    trace: TraceFile = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary folder.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1, max=86_400, help="Seconds for the whole demo.")
    ] = 600,
) -> None:
    """Push new weights into a running engine, and prove that it serves exactly them.

    Makes a random model, starts an engine on it and an agent beside it; a trainer process changes
    every weight and pushes, while completions are asked for.  Then a second engine loads the
    checkpoint that the trainer saved: the SHA-256 of every kernel tensor and the logprobs of
    generation have to be equal.

    Exit status: 0 all of that holds; 1 something failed; 2 bad arguments, or a config that no
    model can be made from; 3 the engine refused tensors, and still serves its old weights; 130
    and 143 ended by Ctrl-C and by SIGTERM.
    """
    options = DemoOptions(
        engine=engine.value,
        config_file=model_config,
        pushes=pushes,
        packed=packed,
        device=device.value,
        tp=tp,
        pp=pp,
        dp=dp,
        expert_parallel=expert_parallel,
        replicas=replicas,
        one_agent=one_agent,
        trainer_ranks=trainer_ranks,
        quantization=quantization.value,
        mode=mode.value,
        workdir=workdir,
        trace_file=trace,
        keep=keep,
        timeout_s=timeout,
    )
    try:
        with sigterm_as_exit():
            result = run_demo(options, _view(as_json=as_json))
    except KeyboardInterrupt:
        sys.stderr.write("weightsync demo: interrupted; all its processes are ended\n")
        raise typer.Exit(130) from None
    if result.error:
        sys.stderr.write(f"weightsync demo: {result.error}\n")
    if result.folder:
        sys.stderr.write(f"weightsync demo: logs and checkpoints are in {result.folder}\n")
    if as_json and result.exit_code == EXIT_INPUT:
        print_json({"error": InputError(result.error).to_problem()})
    elif as_json:
        print_json(result.to_dict())
    raise typer.Exit(result.exit_code)


app.command(name="plan")(plan)
app.add_typer(bench, name="bench")
for _command in (status, pause, resume, rollback, reload, push, verify, doctor):
    app.command()(_command)
app.command(name="explain")(explain_command)


def main() -> None:
    """Entry point of ``weightsync``."""
    app()


def _view(*, as_json: bool) -> View:
    if as_json:
        return PlainView(sys.stderr)
    return TerminalView(Console()) if sys.stdout.isatty() else PlainView(sys.stdout)
