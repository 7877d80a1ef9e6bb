"""The kernel tensors of decoder models: attention and MLP blocks that the families are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from weightsync.families.config import ModelConfig
from weightsync.families.model import Kernel, Source, Stage


@dataclass
class Declaration:
    """Collects kernel tensors.  ``dtype`` is that of plain tensors, ``fp8`` quantises linears."""

    dtype: str
    fp8: bool
    kernels: list[Kernel] = field(default_factory=list)

    def plain(
        self,
        stage: Stage,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: str = "",
        source_dtype: str = "",
    ) -> None:
        """A tensor that every worker has whole, under the same name on both sides."""
        source = Source(name, shape)
        self.kernels.append(
            Kernel(name, dtype or self.dtype, stage, (source,), source_dtype=source_dtype)
        )

    def vocabulary(self, stage: Stage, name: str, rows: int, columns: int) -> None:
        """An embedding or output projection: cut by rows, padded."""
        source = Source(name, (rows, columns), 0)
        self.kernels.append(Kernel(name, self.dtype, stage, (source,), vocab=True))

    def linear(
        self,
        stage: Stage,
        name: str,
        sources: Sequence[Source],
        *,
        bias: bool = False,
        experts: int = 0,
        sequence: bool = False,
    ) -> None:
        """Weights (and scales, and biases) of a linear layer; ``sources`` are its ``.weight``.

        ``name`` is the engine's, without ``.weight`` (with experts: the whole name).
        """
        weight = name if experts else f"{name}.weight"
        dtype = "float8_e4m3fn" if self.fp8 else self.dtype
        self.kernels.append(
            Kernel(weight, dtype, stage, tuple(sources), experts, sequence=sequence)
        )
        if self.fp8:
            scales = tuple(source.scales() for source in sources)
            name_inv = f"{weight}_scale_inv"
            self.kernels.append(
                Kernel(name_inv, "float32", stage, scales, experts, sequence=sequence)
            )
        if bias:
            biases = tuple(
                # what is cut by columns has one bias for all
                Source(
                    source.name.removesuffix("weight") + "bias",
                    source.shape[:1],
                    0 if source.split == 0 else None,
                    source.heads,
                    source.shared,
                )
                for source in sources
            )
            self.kernels.append(Kernel(f"{name}.bias", self.dtype, stage, biases))


def attention(
    out: Declaration,
    config: ModelConfig,
    layer: int,
    *,
    qkv_bias: bool,
    o_bias: bool,
    qk_norm: bool,
    head_dim: int | None = None,
) -> None:
    """Grouped-query attention: q, k and v in one kernel tensor."""
    prefix = f"model.layers.{layer}.self_attn"
    hidden = config.size("hidden_size")
    heads = config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head_dim = config.size("head_dim", hidden // heads) if head_dim is None else head_dim
    parts = (("q", heads, False), ("k", kv_heads, True), ("v", kv_heads, True))
    out.linear(
        layer,
        f"{prefix}.qkv_proj",
        [
            Source(f"{prefix}.{p}_proj.weight", (n * head_dim, hidden), 0, n, shared)
            for p, n, shared in parts
        ],
        bias=qkv_bias,
    )
    out.linear(
        layer,
        f"{prefix}.o_proj",
        [Source(f"{prefix}.o_proj.weight", (hidden, heads * head_dim), 1, heads)],
        bias=o_bias,
    )
    if qk_norm:
        out.plain(layer, f"{prefix}.q_norm.weight", (head_dim,))
        out.plain(layer, f"{prefix}.k_norm.weight", (head_dim,))


def latent_attention(out: Declaration, config: ModelConfig, layer: int) -> None:
    """Multi-head latent attention: the two projections down are one kernel tensor, not cut."""
    prefix = f"model.layers.{layer}.self_attn"
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    q_rank, kv_rank = config.count("q_lora_rank"), config.size("kv_lora_rank")
    rope, nope = config.size("qk_rope_head_dim"), config.size("qk_nope_head_dim")
    value = config.size("v_head_dim")
    kv_a = Source(f"{prefix}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden))

    def column(proj: str, head_rows: int, columns: int) -> None:
        name = f"{prefix}.{proj}"
        out.linear(layer, name, [Source(f"{name}.weight", (heads * head_rows, columns), 0, heads)])

    if q_rank:
        q_a = Source(f"{prefix}.q_a_proj.weight", (q_rank, hidden))
        out.linear(layer, f"{prefix}.fused_qkv_a_proj", [q_a, kv_a])
        out.plain(layer, f"{prefix}.q_a_layernorm.weight", (q_rank,))
        column("q_b_proj", nope + rope, q_rank)
    else:
        out.linear(layer, f"{prefix}.kv_a_proj_with_mqa", [kv_a])
        column("q_proj", nope + rope, hidden)
    out.plain(layer, f"{prefix}.kv_a_layernorm.weight", (kv_rank,))
    column("kv_b_proj", nope + value, kv_rank)
    out.linear(
        layer,
        f"{prefix}.o_proj",
        [Source(f"{prefix}.o_proj.weight", (hidden, heads * value), 1, heads)],
    )


def mlp(
    out: Declaration,
    prefix: str,
    layer: int,
    sizes: tuple[int, int],
    *,
    bias: bool = False,
    sequence: bool = False,
) -> None:
    """A gated MLP, ``sizes`` are (hidden, width): gate and up in one kernel tensor."""
    hidden, width = sizes
    fused = [Source(f"{prefix}.{p}_proj.weight", (width, hidden), 0) for p in ("gate", "up")]
    out.linear(layer, f"{prefix}.gate_up_proj", fused, bias=bias, sequence=sequence)
    down = Source(f"{prefix}.down_proj.weight", (hidden, width), 1)
    out.linear(layer, f"{prefix}.down_proj", [down], bias=bias, sequence=sequence)


@dataclass(frozen=True)
class Experts:
    """The experts of a family: how block and projections are called, sizes, and what is special.

    Attributes:
        block: The layer's module that holds them.
        count: Routed experts.
        width: Rows of one expert's gate and up.
        names: Checkpoint names of gate, up and down.
        score_bias: The router has ``e_score_correction_bias``.
        shared_width: Rows of the shared experts' gate; 0: there are none.
        gate_dtype: Element type that the engine keeps the router in, if not the checkpoint's.
        sequence: The shared experts are whole where the engine runs experts sequence-parallel.
    """

    block: str
    count: int
    width: int
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    score_bias: bool = False
    shared_width: int = 0
    gate_dtype: str = ""
    sequence: bool = False


def mixture(out: Declaration, layer: int, hidden: int, experts: Experts) -> None:
    """Router, routed experts (stacked by the engine) and shared experts."""
    prefix = f"model.layers.{layer}.{experts.block}"
    gate, up, down = experts.names
    out.plain(
        layer,
        f"{prefix}.gate.weight",
        (experts.count, hidden),
        dtype=experts.gate_dtype,
        source_dtype=out.dtype,
    )
    if experts.score_bias:
        bias = f"{prefix}.gate.e_score_correction_bias"
        out.plain(layer, bias, (experts.count,), dtype="float32")
    if experts.shared_width:
        sizes = (hidden, experts.shared_width)
        mlp(out, f"{prefix}.shared_experts", layer, sizes, sequence=experts.sequence)

    def stacked(kernel: str, names: Sequence[str], shape: tuple[int, int], split: int) -> None:
        sources = [
            Source(f"{prefix}.experts.{e}.{name}.weight", shape, split)
            for e in range(experts.count)
            for name in names
        ]
        out.linear(
            layer, f"{prefix}.experts.routed_experts.{kernel}", sources, experts=experts.count
        )

    stacked("w13_weight", (gate, up), (experts.width, hidden), 0)
    stacked("w2_weight", (down,), (hidden, experts.width), 1)
