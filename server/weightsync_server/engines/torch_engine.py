"""The adapter of the embedded torch engine: a transformers model with a loader of its own.

It is the smallest real adapter, and an example for others: one worker, parameters that stay as
they were loaded, nothing derived from them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightsync.checkpoint import Checkpoint
from weightsync.layout import WorkerPlace
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.engines.torch_fp8 import SCALES, grid, keep_blocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements of a parameter's storage, counted from the parameter's first."""

    parameter: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        whole = tensors[self.parameter]
        if self.shape == whole.shape and self.strides == whole.stride():
            return whole
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.offset)


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

    def __init__(
        self, model: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        # Here, not at the top: the import takes seconds, and a taken port should show before.
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.version = transformers.__version__
        self.device = torch.device(device)
        self._folder = model
        #: the model's transformers config
        self.config: Any = transformers.AutoConfig.from_pretrained(model)
        fp8 = getattr(self.config, "quantization_config", None) is not None
        if fp8:  # transformers would turn the blocks into bfloat16 where there is no GPU
            del self.config.quantization_config
            live = transformers.AutoModelForCausalLM.from_config(
                self.config, dtype=self.config.dtype if dtype is None else dtype
            )
        else:
            live = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype="auto" if dtype is None else dtype
            )
            self.config = live.config
        self._live = cast("nn.Module", live).to(self.device).eval().requires_grad_(False)
        self._dtype = live.dtype
        self._tied = _tied_names(self._live)
        self._parts = _checkpoint_parts(self._live, self._live.state_dict())
        self._blocks: frozenset[str] = frozenset()
        if fp8:
            self._load_blocks(Checkpoint(model))

    def _load_blocks(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint of fp8 blocks: what has scales there is kept as blocks.

        Raises:
            ValueError: A tensor is missing.
        """
        names = {t.name for t in checkpoint.manifest()}
        scaled = {n.removesuffix(SCALES) for n in names if n.endswith(SCALES)}
        self._blocks = frozenset(part.parameter for n, part in self._parts.items() if n in scaled)
        grids = {
            name: torch.empty(grid(t.shape) if name in self._blocks else t.shape, device="meta")
            for name, t in self._live.state_dict().items()
        }
        for name, part in _checkpoint_parts(self._live, grids).items():
            if part.parameter in self._blocks:
                # the conversion may drop dims of size 1, which a weight has not and its grid has
                shape = grid(self._parts[name].shape)
                kept = iter(s for n, s in zip(part.shape, part.strides, strict=True) if n > 1)
                strides = tuple(next(kept) if n > 1 else 1 for n in shape)
                self._parts[name + SCALES] = _Part(
                    part.parameter + SCALES, shape, strides, part.offset
                )
        keep_blocks(self._live, self._blocks)
        needed = {n for n, part in self._parts.items() if part.parameter not in self._tied}
        if missing := sorted(needed - names):
            raise ValueError(f"{checkpoint.folder} has no {', '.join(missing[:4])}")
        specs = checkpoint.manifest()
        self.load(self._live, ((t.name, checkpoint.flat(t.name).view(t.shape)) for t in specs))

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
        keep_blocks(twin, self._blocks)
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
                part = self._parts.get(name)
                if part is None:
                    raise KeyError(f"{name}: the model has no such tensor")
                if part.parameter in self._tied:
                    continue
                target = part.of(targets)
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


def _checkpoint_parts(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, _Part]:
    """The part of a state dict's tensors that each checkpoint tensor fills, by checkpoint name.

    transformers 5 lays some modules out in another way than checkpoints (the experts of a layer
    in one tensor, other names) and converts when it saves.  That conversion is run on meta tensors,
    whose storages tell where its results come from.  What it computes is not in the answer.
    """
    metas = {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        for name, t in tensors.items()
    }
    made: Mapping[str, torch.Tensor] = metas
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        pass  # transformers 4: modules are laid out as checkpoints are
    else:
        try:
            with torch.no_grad(), _KeepViews():  # type: ignore[no-untyped-call]
                made = revert_weight_conversion(model, dict(metas))
        except RuntimeError as error:
            # an operation that needs a contiguous input met a view
            logger.warning("only tensors named as in the module can be loaded: %s", error)
    owners = {t.untyped_storage()._cdata: name for name, t in metas.items()}
    return {
        name: _Part(owner, tuple(t.shape), t.stride(), int(t.storage_offset()))
        for name, t in made.items()
        if (owner := owners.get(t.untyped_storage()._cdata)) is not None
    }


class _KeepViews(TorchDispatchMode):
    """Lets copies that only make a view contiguous be that view, so that it can be found again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.clone:
            return torch.ops.aten.alias(args[0])
        return func(*args, **(kwargs or {}))
