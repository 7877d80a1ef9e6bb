"""The conversions that weightsync brings: experts in one parameter, as transformers 5 has them.

A transformers module needs none of them (its own conversion is looked at); they are for state
dicts and for trainers' own modules with the same names.  Experts that are modules of their own, as
in transformers 4, have the checkpoint's names and pass through.
"""

from __future__ import annotations

from weightsync_client.conversion import ConversionSpec, Rule
from weightsync_client.operations import Split, Unstack


def _fused_experts(
    name: str, inner: str, outer: str, projections: tuple[str, str, str], *others: Rule
) -> ConversionSpec:
    """Experts as transformers 5 has them, [E, 2I, H] and [E, H, I], to one tensor an expert."""
    gate, up, down = (f"{{*at}}.{outer}.experts.{{e}}.{p}.weight" for p in projections)
    fused = f"{{*at}}.{inner}.experts"
    return ConversionSpec(
        name,
        (
            Rule(f"{fused}.gate_up_proj", (gate, up), (Unstack("e"), Split(0)), optional=True),
            Rule(f"{fused}.down_proj", down, Unstack("e"), optional=True),
            *others,
        ),
    )


_SILU = ("gate_proj", "up_proj", "down_proj")
SHIPPED = (
    _fused_experts("qwen3_moe", "mlp", "mlp", _SILU),
    _fused_experts("deepseek_v3", "mlp", "mlp", _SILU),
    _fused_experts("glm4_moe", "mlp", "mlp", _SILU),
    _fused_experts(
        "mixtral",
        "mlp",
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        Rule("{*at}.mlp.gate.weight", "{*at}.block_sparse_moe.gate.weight", optional=True),
    ),
)
