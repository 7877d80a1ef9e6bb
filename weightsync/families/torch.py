"""How the embedded torch engine keeps a declared model: as transformers does, on one worker."""

from __future__ import annotations

from weightsync.dtypes import itemsize
from weightsync.errors import InputError
from weightsync.families.model import Kernel, Model
from weightsync.families.strides import numel_of, row_major
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout, WorkerPlace

#: modules that transformers calls otherwise than checkpoints do
_RENAMED = {"mixtral": (".block_sparse_moe.", ".mlp.")}


def torch_layout(model: Model) -> WorkerLayout:
    """The layout of the torch engine's only worker.

    Every checkpoint tensor is a parameter of its own, but for the experts: all of a layer are two
    parameters.  Regions have made-up addresses.

    Raises:
        InputError: An fp8 model, which transformers does not run.
    """
    regions: list[KernelRegion] = []
    records: list[CopyRecord] = []
    old, new = _RENAMED.get(model.family, ("", ""))
    for kernel in model.kernels:
        if kernel.dtype.startswith("float8"):
            raise InputError("the torch engine has no fp8 weights", hint="use --wire-dtype bf16")
        each = len(kernel.sources) // kernel.experts if kernel.experts else 1
        groups = [kernel.sources] if kernel.experts else [(source,) for source in kernel.sources]
        for sources in groups:
            name = _expert_name(kernel) if kernel.experts else sources[0].name
            shape = sources[0].shape
            if kernel.experts:
                shape = (kernel.experts, shape[0] * each, *shape[1:])
            offset = 0
            for source in sources:
                strides = row_major(source.shape)
                records.append(
                    CopyRecord(source.name, source.shape, 0, strides, len(regions), offset, strides)
                )
                offset += numel_of(source.shape)
            # the router's precision is an engine's own choice
            dtype = kernel.source_dtype or kernel.dtype
            nbytes = numel_of(shape) * itemsize(dtype)
            if old:
                name = name.replace(old, new)
            regions.append(KernelRegion(name, dtype, shape, nbytes, "direct", 0))
    return WorkerLayout(WorkerPlace(), tuple(regions), tuple(records))


def _expert_name(kernel: Kernel) -> str:
    block, _, kind = kernel.name.partition(".routed_experts.")
    return f"{block}.{'gate_up_proj' if kind.startswith('w13') else 'down_proj'}"
