"""The trainer of a benchmark: ``python -m weightsync_client.bench.trainer CONFIG DEVICE``.

With torchrun's environment it is one rank of an FSDP2 job.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightsync.digest import Scan
from weightsync.errors import NoSessionError
from weightsync.forecast import forecast
from weightsync.lines import serve
from weightsync.plan import Job
from weightsync.protocol import PushMode
from weightsync_client.demo.fp8 import quantize_checkpoint
from weightsync_client.demo.sharded import join, own_device, shard
from weightsync_client.progress import NoProgress
from weightsync_client.publisher import Publisher
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.quantized import QuantizedSource
from weightsync_client.source import as_source

_COPY_REPEATS = 5


class _CpuClock(NoProgress):
    """CPU seconds of the process, by phase of the last push."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = 0.0

    def started(self, phase: str, version: int) -> None:
        """The clock starts."""
        self._at = time.process_time()

    def ended(self, phase: str, version: int, push_id: str, seconds: float, nbytes: int) -> None:
        """The clock stops."""
        self.seconds[phase] = time.process_time() - self._at


class Trainer:
    """Answers ``make``, ``push``, ``copy``, ``scan``, ``forecast``, ``save`` and ``close``."""

    def __init__(self, config_file: str, device: str) -> None:
        self._config_file = config_file
        self._device = device
        self._model: Any = None
        self._publisher: Publisher | None = None
        self._clock = _CpuClock()
        self._scan: Scan | None = None
        self._quantization: QuantizationSpec | None = None
        self._mode: PushMode = "direct"
        self._zero_copy_bytes: int | None = None

    def make(
        self,
        checkpoint: str | None = None,
        *,
        fp8: bool = False,
        mode: PushMode = "direct",
        zero_copy_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Make the model with random weights; save it, if an engine shall load it.

        ``fp8``: it is published, and saved, as fp8 blocks.  ``mode``: of pushes.
        ``zero_copy_bytes``: the publisher's.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()
        mesh = None
        if "RANK" in os.environ:
            kind = self._device.partition(":")[0]
            self._device = own_device(kind)
            mesh = join(kind)
        config = transformers.AutoConfig.from_pretrained(self._config_file, local_files_only=True)
        with torch.device(self._device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._model = model.eval().requires_grad_(False)
        self._quantization = QuantizationSpec() if fp8 else None
        self._mode = mode
        self._zero_copy_bytes = zero_copy_bytes
        if checkpoint is not None:
            self._model.save_pretrained(checkpoint)
            if fp8:
                quantize_checkpoint(Path(checkpoint))
        if mesh is not None:
            shard(self._model, mesh)
        source = as_source(self._model)
        manifest = source.manifest()
        spec = self._quantization
        published = manifest if spec is None else QuantizedSource(source, spec).manifest()
        return {
            "nbytes": sum(tensor.nbytes for tensor in manifest),
            "published_nbytes": sum(tensor.nbytes for tensor in published),
            "names": [tensor.name for tensor in manifest],
            "shapes": [list(tensor.shape) for tensor in manifest],
        }

    def push(self, agents: Sequence[str]) -> dict[str, Any]:
        """Change every weight and push; the report, and the CPU seconds that the push took."""
        if self._publisher is None:
            self._publisher = Publisher(
                agents, progress=self._clock, quantization=self._quantization, mode=self._mode,
                zero_copy_bytes=self._zero_copy_bytes,
            )  # fmt: skip
        torch._foreach_neg_(list(self._model.parameters()))
        self._synchronize()
        process_s, thread_s = time.process_time(), time.thread_time()
        report = self._publisher.push(self._model)
        writes = [s.seconds for s in report.spans if s.lane.startswith("write to ")]
        return {
            **report.to_dict(),
            "longest_write_s": max(writes, default=0.0),
            "cpu_write_s": self._clock.seconds.get("write", 0.0),
            "cpu_thread_s": time.thread_time() - thread_s,
            "cpu_process_s": time.process_time() - process_s,
        }

    def copy(self, nbytes: int) -> dict[str, float]:
        """Copy that many bytes within the device's memory; ``copy`` seconds, the median."""
        source, target = torch.empty(2, nbytes, dtype=torch.uint8, device=self._device)
        seconds = []
        for _ in range(_COPY_REPEATS):
            self._synchronize()
            started = time.perf_counter()
            target.copy_(source)
            self._synchronize()
            seconds.append(time.perf_counter() - started)
        return {"copy": statistics.median(seconds)}

    def scan(self, nbytes: int) -> dict[str, float]:
        """Check and digest that many bytes of bfloat16, of which none is near: ``scan`` seconds.

        They are in about as many pieces as the model has tensors.
        """
        if self._scan is None:
            values = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=self._device)
            share = nbytes // 2 // len(list(self._model.parameters()))
            pieces = [p.view(torch.uint8) for p in values.split(max(share // 64, 1) * 64)]
            self._scan = Scan(pieces, [torch.bfloat16] * len(pieces))
        self._synchronize()
        started = time.perf_counter()
        self._scan.run()
        return {"scan": time.perf_counter() - started}

    def forecast(self, nic_gbps: float, write_s: float, fill_nbytes_per_s: float) -> dict[str, Any]:
        """What ``weightsync plan`` would say of the pushes that were made, at these rates.

        Raises:
            NoSessionError: There was none.
        """
        session = None if self._publisher is None else self._publisher._held.session  # noqa: SLF001
        if session is None:
            raise NoSessionError("nothing was pushed", hint="push first")
        layouts = session._layouts  # noqa: SLF001
        job = Job.of(session.manifest, layouts, allow_skipped=["*"])
        job.prove()
        return forecast(
            job, layouts, 1, nic_gbps=nic_gbps, write_s=write_s,
            fill_nbytes_per_s=fill_nbytes_per_s,
        ).to_dict()  # fmt: skip

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


def main(argv: Sequence[str]) -> int:
    """Command line of the process; returns its exit status."""
    config, device = argv
    Path(config).stat()
    trainer = Trainer(config, device)
    return serve(
        {
            "make": trainer.make,
            "push": trainer.push,
            "copy": trainer.copy,
            "scan": trainer.scan,
            "forecast": trainer.forecast,
            "save": trainer.save,
            "close": trainer.close,
        }
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
