"""vLLM's own weight transfer over NCCL, to be timed beside a push.  Both ends are vLLM's code.

``python -m weightsync_server.engines.vllm_nccl engine|trainer MODEL``: two processes that answer
commands.  MODEL is a folder with a config; the weights are random.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from weightsync.lines import serve

_WORLD = 2


class EngineEnd:
    """vLLM in this process; its one worker receives."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._llm: Any = None

    def load(self) -> dict[str, Any]:
        """Start the engine, as the one that is pushed to was started."""
        from vllm import LLM

        self._llm = LLM(
            model=self._model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=256,
            load_format="dummy",
            gpu_memory_utilization=0.3,
            kv_cache_memory_bytes=1 << 30,
            compilation_config={"mode": 0, "cudagraph_mode": "FULL"},
            enable_prefix_caching=False,
            weight_transfer_config={"backend": "nccl"},
        )
        return {}

    def init(self, port: int) -> dict[str, Any]:
        """Meet the trainer."""
        info = {
            "master_address": "127.0.0.1",
            "master_port": port,
            "rank_offset": 1,
            "world_size": _WORLD,
        }
        self._llm.init_weight_transfer_engine({"init_info": info})
        return {}

    def update(
        self, names: Sequence[str], shapes: Sequence[Sequence[int]], *, packed: bool
    ) -> dict[str, float]:
        """Seconds of one transfer, from its start to the end of the engine's loading."""
        info = {
            "names": list(names),
            "dtype_names": ["bfloat16"] * len(names),
            "shapes": [list(shape) for shape in shapes],
            "packed": packed,
        }
        started = time.perf_counter()
        self._llm.start_weight_update(is_checkpoint_format=True)
        self._llm.update_weights({"update_info": info})
        self._llm.finish_weight_update()
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - started}


class TrainerEnd:
    """The weights, and vLLM's sender."""

    def __init__(self) -> None:
        self._group: Any = None
        self._tensors: dict[str, torch.Tensor] = {}

    def init(
        self, port: int, names: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Make the weights and meet the engine."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        torch.cuda.set_device(0)
        self._tensors = {
            name: torch.empty(tuple(shape), dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
            for name, shape in zip(names, shapes, strict=True)
        }
        info = {"master_address": "127.0.0.1", "master_port": port, "world_size": _WORLD}
        self._group = NCCLWeightTransferEngine.trainer_init(info)
        return {}

    def send(self, *, packed: bool) -> dict[str, Any]:
        """Send all weights once."""
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerSendWeightsArgs,
            NCCLWeightTransferEngine,
        )

        NCCLWeightTransferEngine.trainer_send_weights(
            iter(self._tensors.items()),
            NCCLTrainerSendWeightsArgs(group=self._group, packed=packed),
        )
        torch.cuda.synchronize()
        return {}


def main(argv: Sequence[str]) -> int:
    """Command line of the process; returns its exit status."""
    role, model = argv
    if role == "trainer":
        trainer = TrainerEnd()
        return serve({"init": trainer.init, "send": trainer.send})
    # the worker is in this very process, so that one clock sees all
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = EngineEnd(model)
    return serve({"load": engine.load, "init": engine.init, "update": engine.update})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
