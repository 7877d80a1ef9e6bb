"""The adapter of the embedded torch engine: a transformers model with a loader of its own.

It is the smallest real adapter, and an example for others: one worker, parameters that stay as
they were loaded, nothing derived from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from weightsync.layout import WorkerPlace
from weightsync_server.engines.base import EngineAdapter

# Checkpoints hold one matrix an expert and projection; transformers 5 fuses them in the module.
_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<proj>gate|up|down)_proj\.weight"
)


class TorchAdapter(EngineAdapter):
    """A causal language model of transformers, whole in this process.

    Args:
        model: Folder that ``save_pretrained`` wrote: ``config.json`` and safetensors.
        dtype: Element type of the live weights; None takes the checkpoint's.
        device: Where the live weights are.

    Raises:
        OSError: The folder holds no model.
        ValueError: transformers knows no causal language model for this config.
    """

    name = "torch"
    place = WorkerPlace()
    workers = 1

    def __init__(
        self, model: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        # Here, not at the top: the import takes seconds, and a taken port should show before.
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.version = transformers.__version__
        self.device = torch.device(device)
        self._folder = model
        live = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype="auto" if dtype is None else dtype
        )
        #: the model's transformers config
        self.config: Any = live.config
        self._live = cast("nn.Module", live).to(self.device).eval().requires_grad_(False)
        self._dtype = live.dtype
        self._tied = _tied_names(self._live)

    @property
    def live(self) -> nn.Module:
        """The model that serves."""
        return self._live

    def new_twin(self) -> nn.Module:
        """The same class from the same config on the meta device."""
        import transformers

        with torch.device("meta"):
            built = transformers.AutoModelForCausalLM.from_config(self.config, dtype=self._dtype)
        twin = cast("nn.Module", built).eval().requires_grad_(False)
        # from_pretrained keeps some parameters in float32 that from_config does not
        live = self._live.state_dict()
        for name, tensor in twin.state_dict(keep_vars=True).items():
            if tensor.dtype != live[name].dtype:
                tensor.data = tensor.data.to(live[name].dtype)
        return twin

    def load(self, twin: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy checkpoint tensors, named as ``save_pretrained`` names them, into ``twin``.

        A tied tensor is taken under its first name and dropped under the others.

        Raises:
            KeyError: The model has no tensor of this name.
            ValueError: The shape is not the model's.
        """
        targets = cast("Mapping[str, torch.Tensor]", twin.state_dict(keep_vars=True))
        with torch.no_grad():
            for name, tensor in tensors:
                if name in self._tied:
                    continue
                target = _target(targets, name)
                # copy_ would broadcast a wrong shape in silence
                if target.shape != tensor.shape:
                    raise ValueError(
                        f"{name}: expected shape {tuple(target.shape)}, got {tuple(tensor.shape)}"
                    )
                target.copy_(tensor)

    def finish(self, module: nn.Module) -> None:
        """Nothing to do: the model computes with its weights as they were loaded."""

    def refresh(self) -> None:
        """Nothing to do: no tensor of the model derives from its weights."""

    def read_back(
        self, module: nn.Module, param: str, columns: torch.Tensor, width: int
    ) -> torch.Tensor | None:
        """None: there are no opaque kernels here."""
        return None

    def checkpoint(self) -> Path | None:
        """The folder that the live weights were loaded from."""
        return self._folder


def _tied_names(model: nn.Module) -> frozenset[str]:
    """Every name of a shared parameter but its first."""
    first = {name for name, _ in model.named_parameters()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return frozenset(names - first)


def _target(targets: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The part of the model's tensors that the checkpoint tensor ``name`` fills."""
    if name in targets:
        return targets[name]
    match = _EXPERT.fullmatch(name)
    if match is not None:
        experts, index, proj = match["experts"], int(match["index"]), match["proj"]
        fused = targets.get(f"{experts}.{'down' if proj == 'down' else 'gate_up'}_proj")
        if fused is not None and index < fused.shape[0]:
            expert = fused.select(0, index)
            if proj == "down":
                return expert
            half = expert.shape[0] // 2
            return expert.narrow(0, 0 if proj == "gate" else half, half)
    raise KeyError(f"{name}: the model has no such tensor")
