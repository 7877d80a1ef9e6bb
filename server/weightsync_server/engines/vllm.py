"""vLLM: how it builds, loads and post-processes a model.

What differs between vLLM versions is in ``vllm_compat.py``, here is what they share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from weightsync.layout import WorkerPlace
from weightsync_server.engines import vllm_compat
from weightsync_server.engines.base import EngineAdapter

#: formats whose weights lie on disk as safetensors under the model's name
_ON_DISK = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "runai_streamer"})


def plain_cpu_weights() -> None:
    """Keep vLLM's CPU linear weights as they are loaded, so that they can be written in place.

    vLLM packs them with oneDNN otherwise.  Called before the model loads; on CPU only.
    """
    import vllm._custom_ops as ops

    ops._supports_onednn = False  # noqa: SLF001 - there is no public switch


class VllmAdapter(EngineAdapter):
    """Adapter for one vLLM worker.

    Args:
        worker: vLLM's worker, its model loaded.
    """

    name = "vllm"

    def __init__(self, worker: Any) -> None:
        import vllm

        self.version = str(vllm.__version__)
        self._worker = worker
        self._config = worker.vllm_config
        parallel = self._config.parallel_config
        rank = int(worker.rank)
        tp = int(parallel.tensor_parallel_size)
        pp = int(parallel.pipeline_parallel_size)
        expert = bool(getattr(parallel, "enable_expert_parallel", False))
        self.place = WorkerPlace(
            # the cores of a dense model all have rank 0, and only the index tells them apart
            dp=int(parallel.data_parallel_index),
            pp=rank // tp % pp,
            tp=rank % tp,
            ep=int(parallel.data_parallel_rank) * tp + rank % tp if expert else 0,
        )
        device = torch.device(worker.device)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
        )

    @property
    @override
    def live(self) -> nn.Module:
        model: nn.Module = self._worker.model_runner.get_model()
        # a compiled or graph-capturing wrapper keeps the module that holds the weights
        while hasattr(model, "runnable") and isinstance(model.runnable, nn.Module):
            model = model.runnable
        return model

    @contextlib.contextmanager
    def _as_loading(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        with (
            torch.no_grad(),
            set_default_torch_dtype(self._config.model_config.dtype),
            set_current_vllm_config(self._config),
        ):
            yield

    @override
    def new_twin(self) -> nn.Module:
        from vllm.model_executor.model_loader.utils import initialize_model

        compilation = self._config.compilation_config
        # layers enter themselves here by name; the twin's must not take the live ones' places
        registries = {
            key: getattr(compilation, key)
            for key in ("static_forward_context", "static_all_moe_layers")
            if hasattr(compilation, key)
        }
        try:
            for key, value in registries.items():
                setattr(compilation, key, type(value)())
            with self._as_loading(), vllm_compat.buildable_on_meta(), torch.device("meta"):
                twin: nn.Module = initialize_model(vllm_config=self._config)
        finally:
            for key, value in registries.items():
                setattr(compilation, key, value)
        return twin.eval()

    @override
    def load(self, twin: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        with self._as_loading():
            twin.load_weights(tensors)  # type: ignore[operator]

    @override
    def optional(self, twin: nn.Module) -> frozenset[str]:
        return frozenset(
            f"{path}.{name}"
            for path, module in twin.named_modules()
            for name in vllm_compat.idle_scales(module)
        )

    @override
    def finish(self, module: nn.Module) -> None:
        from vllm.model_executor.layers.quantization.base_config import (
            QuantizeMethodBase,
        )

        method = getattr(module, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase):
            return
        with self._as_loading():
            method.process_weights_after_loading(module)
            if (update := getattr(module, "update_param_tp_status", None)) is not None:
                update()

    @cached_property
    def _attention(self) -> list[nn.Module]:
        """What is to be renewed.

        Found once: a model keeps its modules, and the engine stands still in a refresh.
        """
        return [
            module
            for module in self.live.modules()
            if vllm_compat.is_attention(module) and sees_weights(module)
        ]

    @override
    def refresh(self) -> None:
        # attention layers keep tensors derived from others' weights (MLA's absorbed projections)
        if not self._attention:
            return
        dtype = self._config.model_config.dtype
        with self._as_loading():
            for module in self._attention:
                before = {k: v for k, v in module.__dict__.items() if isinstance(v, torch.Tensor)}
                module.process_weights_after_loading(dtype)  # type: ignore[operator]
                for key, old in before.items():
                    new = module.__dict__.get(key)
                    # captured graphs hold the old tensor: renew it in place
                    if isinstance(new, torch.Tensor) and new is not old and new.shape == old.shape:
                        old.copy_(new)
                        module.__dict__[key] = old

    @override
    def read_back(
        self, module: nn.Module, param: str, columns: torch.Tensor, width: int
    ) -> torch.Tensor | None:
        compute = getattr(module, "cpu_linear", None)
        if compute is None or param != "weight":
            return None
        dtype = self._config.model_config.dtype
        units = torch.zeros(columns.numel(), width, dtype=dtype, device=self.device)
        units[torch.arange(columns.numel(), device=self.device), columns] = 1
        with torch.no_grad():
            out: torch.Tensor = compute(units, module.weight, None)
        return out.t().to(dtype)

    @override
    def checkpoint(self) -> Path | None:
        load_format = self._config.load_config.load_format
        load_format = str(getattr(load_format, "value", load_format))
        folder = Path(str(self._config.model_config.model))
        if load_format in _ON_DISK and any(folder.glob("*.safetensors")):
            return folder
        return None


def sees_weights(attention: nn.Module) -> bool:
    """Whether what post-processes an attention layer may compute anything from weights.

    It may where the layer or its backend holds some: MLA's projections, sinks, scales of a cache.
    Where neither does it sets constants, with four launches for each layer on a GPU.
    """
    backend = list(getattr(getattr(attention, "impl", None), "__dict__", {}).values())
    return any(map(_has_weights, [attention, *vars(attention).values(), *backend])) or any(
        isinstance(value, torch.Tensor) and value.numel() > 1 for value in backend
    )


def _has_weights(value: object) -> bool:
    if isinstance(value, nn.Module):
        return next(value.parameters(), None) is not None
    return isinstance(value, nn.Parameter)


def wants_plain() -> bool:
    """Whether the engine's starter asked for unpacked CPU weights (WEIGHTSYNC_VLLM_CPU_PLAIN=1)."""
    return os.environ.get("WEIGHTSYNC_VLLM_CPU_PLAIN", "") == "1"
