"""Compares declared layouts with what the tracer finds in vLLM's own loader, under any grid.

Run as a script: cases as JSON on stdin, one JSON answer on the last line of stdout.  One process
plays every worker in turn: vLLM's groups are told another size and rank before its model is built
on the meta device.  Nothing is computed, so it needs no other process and no kernels.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
)

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import expert_map_manager
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import utils as models_utils
from vllm.utils.torch_utils import set_default_torch_dtype

from weightsync.families import EngineGrid, ModelConfig, declare, engine_layouts
from weightsync.geometry import dst_runs, grid, strided_copy
from weightsync.layout import CopyRecord, WorkerPlace
from weightsync_server.engines import vllm_compat
from weightsync_server.engines.vllm import sees_weights
from weightsync_server.receiver.tracer import Trace, trace

_CACHE_SCALES = tuple(f".attn.{x}_scale" for x in ("q", "k", "v", "prob"))


def engine_config(config: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
        load_format="dummy",
    ).create_engine_config()


def become(vllm_config: Any, engine: EngineGrid, place: WorkerPlace) -> None:
    """Make this process look like one worker of a larger engine."""
    groups = {
        "_TP": (engine.tp, place.tp),
        "_DP": (engine.dp, place.dp),
        "_PP": (engine.pp, place.pp),
        "_EP": (engine.tp * engine.dp, place.dp * engine.tp + place.tp),
    }
    for name, (size, rank) in groups.items():
        group = getattr(parallel_state, name)
        if group is None:  # vLLM makes the experts' group for models that have some
            group = copy.copy(parallel_state._TP)
            setattr(parallel_state, name, group)
        group.world_size, group.rank_in_group, group.rank = size, rank, rank
        group.ranks = list(range(size))
    parallel = vllm_config.parallel_config
    parallel.tensor_parallel_size = engine.tp
    parallel.data_parallel_size, parallel.data_parallel_rank = engine.dp, place.dp
    parallel.pipeline_parallel_size = engine.pp
    parallel.enable_expert_parallel = engine.expert_parallel
    # vLLM remembers by id() which layers a model lacks, and ids come again
    models_utils._model_to_pp_missing_layer_names.clear()
    compilation = vllm_config.compilation_config
    for registry in ("static_forward_context", "static_all_moe_layers"):
        if hasattr(compilation, registry):
            getattr(compilation, registry).clear()


def as_map(records: list[CopyRecord], numel: int) -> dict[str, Any]:
    """For every element of a region its checkpoint tensor (-1: none) and element there."""
    names = sorted({r.tensor for r in records})
    owner, index = np.full(numel, -1), np.zeros(numel, dtype=np.int64)
    for r in records:
        dims = list(zip(r.shape, r.dst_strides, strict=True))
        there = grid(r.dst_offset, dims).ravel()
        runs = strided_copy(r.shape, 0, (0,) * len(r.shape), r.dst_offset, r.dst_strides)
        assert runs is not None
        first, length = dst_runs(runs)
        assert np.size(first) * length == there.size
        owner[there] = names.index(r.tensor)
        index[there] = grid(r.src_offset, list(zip(r.shape, r.src_strides, strict=True))).ravel()
    return {"names": names, "owner": owner, "index": index}


def differences(declared: Any, twin: torch.nn.Module, traced: Trace) -> list[str]:
    found: list[str] = []
    # The scales of an fp8 cache are no weights: no checkpoint of these families has them.
    params = {n: p for n, p in twin.named_parameters() if not n.endswith(_CACHE_SCALES)}
    regions = {region.name: region for region in declared.regions}
    if missing := sorted(params.keys() ^ regions.keys()):
        found.append(f"kernel tensors on one side alone: {missing}")
    traced_by: dict[str, list[CopyRecord]] = {}
    for c in traced.copies:
        traced_by.setdefault(c.param, []).append(
            CopyRecord(
                c.tensor, c.src.shape, c.src.offset, c.src.strides, 0, c.dst.offset, c.dst.strides
            )
        )
    for k, region in enumerate(declared.regions):
        param = params.get(region.name)
        if param is None:
            continue
        if (region.shape, region.dtype) != (
            tuple(param.shape),
            str(param.dtype).removeprefix("torch."),
        ):
            found.append(f"{region.name}: {region.shape} {region.dtype}, {param.shape}")
            continue
        mine = as_map([r for r in declared.records if r.region == k], param.numel())
        theirs = as_map(traced_by.get(region.name, []), param.numel())
        if mine["names"] != theirs["names"]:
            found.append(f"{region.name}: from {mine['names']}, traced {theirs['names']}")
        elif not (
            (mine["owner"] == theirs["owner"]).all() and (mine["index"] == theirs["index"]).all()
        ):
            found.append(f"{region.name}: other elements")
        size = region.nbytes // max(1, param.numel())
        free = np.zeros(param.numel(), dtype=bool)
        for start, stop in region.untouched:
            free[start // size : stop // size] = True
        if not (free == (theirs["owner"] < 0)).all():
            found.append(f"{region.name}: other untouched elements")
    if set(declared.skipped) != set(traced.skipped):
        found.append(f"skipped: {set(declared.skipped) ^ set(traced.skipped)}")
    return found


def main() -> None:
    # The map of experts is read while the model is built and loaded: it needs real memory.
    on_meta = expert_map_manager.determine_expert_map

    def determine_expert_map(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return on_meta(*args, **kwargs)

    expert_map_manager.determine_expert_map = determine_expert_map
    # Kernels are chosen when a layer is built, and this machine may have none for fp8.
    fp8.init_fp8_linear_kernel = lambda **_: None
    fp8.select_fp8_moe_backend = lambda **_: (None, None)
    answers = []
    ready = False
    for case in json.load(sys.stdin):
        model = declare(ModelConfig(case["config"]), wire_dtype=case["wire_dtype"])
        engine = EngineGrid(**case["grid"])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            vllm_config = engine_config(case["config"], folder)
            if not ready:
                with set_current_vllm_config(vllm_config):
                    parallel_state.init_distributed_environment(
                        1, 0, f"file://{tempfile.mkdtemp()}/rendezvous", 0, "gloo"
                    )
                    parallel_state.initialize_model_parallel(1, 1)
                ready = True
            found: list[str] = []
            for layout in engine_layouts(model, engine):
                become(vllm_config, engine, layout.place)
                with (
                    torch.no_grad(),
                    set_default_torch_dtype(torch.bfloat16),
                    set_current_vllm_config(vllm_config),
                ):
                    with torch.device("meta"):
                        twin = initialize_model(vllm_config=vllm_config)
                    traced = trace(twin, lambda m, w: m.load_weights(w), model.manifest)
                found += [f"{layout.place}: {d}" for d in differences(layout, twin, traced)]
        attention = [m for m in twin.modules() if vllm_compat.is_attention(m)]
        answers.append(
            {
                "workers": engine.workers,
                "copies": len(traced.copies),
                "found": found,
                "attention": len(attention),
                "renewed": sum(map(sees_weights, attention)),
            }
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
