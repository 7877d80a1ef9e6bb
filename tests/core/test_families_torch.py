from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.support.families import CONFIGS
from weightsync.families import ModelConfig, declare
from weightsync.families.torch import torch_layout
from weightsync.layout import CopyRecord
from weightsync_server.engines.torch_engine import TorchAdapter
from weightsync_server.receiver.tracer import trace


@pytest.mark.parametrize("name", CONFIGS)
def test_the_torch_engine_s_layout_is_what_its_loader_does(name: str, tmp_path: Path) -> None:
    values = {k: v for k, v in CONFIGS[name].items() if k not in {"model_type", "architectures"}}
    config = transformers.AutoConfig.for_model(CONFIGS[name]["model_type"], **values)
    transformers.utils.logging.disable_progress_bar()
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    built.save_pretrained(tmp_path)
    adapter = TorchAdapter(tmp_path)
    twin = adapter.new_twin()
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())

    layout = torch_layout(model := declare(ModelConfig(CONFIGS[name])))
    traced = trace(twin, adapter.load, model.manifest)

    assert not traced.skipped
    found = {
        (c.param, CopyRecord(c.tensor, c.src.shape, c.src.offset, c.src.strides, 0,
                             c.dst.offset, c.dst.strides))
        for c in traced.copies
    }  # fmt: skip
    declared = {
        (layout.regions[r.region].name,
         CopyRecord(r.tensor, r.shape, r.src_offset, r.src_strides, 0, r.dst_offset, r.dst_strides))
        for r in layout.records
    }  # fmt: skip
    assert declared == found
    for region in layout.regions:
        assert region.shape == tuple(tensors[region.name].shape)
        assert region.dtype == str(tensors[region.name].dtype).removeprefix("torch.")
    assert {n for n, _ in twin.named_parameters()} <= {r.name for r in layout.regions}
