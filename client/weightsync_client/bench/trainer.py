"""The trainer of a benchmark: ``python -m weightsync_client.bench.trainer CONFIG DEVICE``."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightsync.errors import InputError
from weightsync.lines import serve
from weightsync_client.publisher import Publisher
from weightsync_client.source import as_source

_BLOCKING_SYNC = 4


class Trainer:
    """Answers ``make``, ``push``, ``save`` and ``close``."""

    def __init__(self, config_file: str, device: str) -> None:
        self._config_file = config_file
        self._device = device
        self._model: Any = None
        self._publisher: Publisher | None = None

    def make(self, checkpoint: str | None = None, *, blocking_sync: bool = False) -> dict[str, Any]:
        """Make the model with random weights; save it, if an engine shall load it.

        ``blocking_sync``: this process sleeps where it waits for its GPU, so that its CPU time is
        what it computes.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if self._device != "cpu" and blocking_sync:
            _block_in_sync()
        config = transformers.AutoConfig.from_pretrained(self._config_file, local_files_only=True)
        with torch.device(self._device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._model = model.eval().requires_grad_(False)
        if checkpoint is not None:
            self._model.save_pretrained(checkpoint)
        manifest = as_source(self._model).manifest()
        return {
            "nbytes": sum(tensor.nbytes for tensor in manifest),
            "names": [tensor.name for tensor in manifest],
            "shapes": [list(tensor.shape) for tensor in manifest],
        }

    def push(self, agents: Sequence[str]) -> dict[str, Any]:
        """Change every weight and push; the report, and the CPU seconds that the push took."""
        if self._publisher is None:
            self._publisher = Publisher(agents, progress="off")
        torch._foreach_neg_(list(self._model.parameters()))
        self._synchronize()
        process_s, thread_s = time.process_time(), time.thread_time()
        report = self._publisher.push(self._model)
        return {
            **report.to_dict(),
            "cpu_thread_s": time.thread_time() - thread_s,
            "cpu_process_s": time.process_time() - process_s,
        }

    def save(self, path: str) -> dict[str, float]:
        """Write the weights as one safetensors file; ``safetensors_save`` seconds."""
        self._synchronize()
        started = time.perf_counter()
        save_file(self._tensors(), path)
        return {"safetensors_save": time.perf_counter() - started}

    def close(self) -> dict[str, Any]:
        """End the publisher: its memory is free again."""
        if self._publisher is not None:
            self._publisher.close()
        return {}

    def _tensors(self) -> Mapping[str, torch.Tensor]:
        source = as_source(self._model)
        names = [tensor.name for tensor in source.manifest()]
        return {name: source.local(name, 0).detach().contiguous() for name in names}

    def _synchronize(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()


def _block_in_sync() -> None:
    """Must come before this process has a CUDA context.

    Raises:
        InputError: CUDA refuses.
    """
    # torch has loaded it: the soname finds that very copy
    name = f"libcudart.so.{(torch.version.cuda or '13').split('.')[0]}"
    code = ctypes.CDLL(name).cudaSetDeviceFlags(_BLOCKING_SYNC)
    if code:
        raise InputError(f"cudaSetDeviceFlags failed (code {code})")


def main(argv: Sequence[str]) -> int:
    """Command line of the process; returns its exit status."""
    config, device = argv
    Path(config).stat()
    trainer = Trainer(config, device)
    return serve(
        {
            "make": trainer.make,
            "push": trainer.push,
            "save": trainer.save,
            "close": trainer.close,
        }
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
