"""fp8 checkpoints for the demo, by the textbook: nothing here is shared with what a push runs.

So the checkpoint that a fresh engine loads tells whether the bytes of the push were right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- as everywhere
from safetensors import safe_open
from safetensors.torch import save_file

_BLOCK = 128
_E4M3_MAX = torch.tensor(448.0)
_FLOOR = 1e-12
#: ends of names of matrices that stay: embeddings, output head, routers
_KEPT = ("embed_tokens.weight", "lm_head.weight", "gate.weight")


def quantize_checkpoint(folder: Path) -> dict[str, Any]:
    """Rewrite a bfloat16 checkpoint with its linear weights as fp8 blocks.

    Returns:
        Its new ``config.json``.
    """
    kept = {"lm_head"}
    for file in sorted(folder.glob("*.safetensors")):
        made: dict[str, torch.Tensor] = {}
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- it is no mapping
                tensor = tensors.get_tensor(name)
                if not name.endswith(".weight") or tensor.ndim != 2 or name.endswith(_KEPT):
                    made[name] = tensor
                    if name.endswith(".gate.weight"):
                        kept.add(name.removesuffix(".weight"))
                else:
                    made[name], made[f"{name}_scale_inv"] = _blocks(tensor)
        save_file(made, file, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):  # one file is found without
        index.unlink()
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
        "modules_to_not_convert": sorted(kept),
    }
    path.write_text(json.dumps(config, indent=2))
    return config


def _blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = weight.shape
    wide = F.pad(weight.to(torch.bfloat16).float(), (0, -cols % _BLOCK, 0, -rows % _BLOCK))
    blocks = wide.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scales = (blocks.abs().amax(dim=(1, 3)) / _E4M3_MAX).clamp(min=_FLOOR)
    values = (blocks / scales[:, None, :, None]).clamp(-_E4M3_MAX, _E4M3_MAX)
    fp8 = values.flatten(2, 3).flatten(0, 1)[:rows, :cols].to(torch.float8_e4m3fn)
    return fp8.contiguous(), scales
