r"""A trainer with layouts of its own: qkv in one matrix, the experts of a layer in one tensor.

The conversion says once what of that is which checkpoint tensor; every rank pushes its shards.

    $ torchrun --standalone --nproc-per-node=2 own_modules.py \
          --model tiny-qwen3-moe --agent http://127.0.0.1:9100
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoConfig

from weightsync_client import ConversionSpec, Publisher, Rearrange, Rule, Split, Unstack

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--agent", required=True)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--save", type=Path, help="write the last weights there, as a checkpoint")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
if device == "cuda":
    torch.cuda.set_device(dist.get_node_local_rank())
mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("shard",))

config = AutoConfig.from_pretrained(args.model)
kv = config.num_key_value_heads
layer, attention = "model.layers.{i}.", "model.layers.{i}.self_attn."
expert = layer + "mlp.experts.{e}."
qkv = [attention + f"{x}_proj.weight" for x in "qkv"]
conversion = ConversionSpec(
    "own",
    [
        Rule("{i}.qkv", qkv, Split(0, ratio=(config.num_attention_heads // kv, 1, 1))),
        Rule(
            "{i}.gate_up",  # [expert, in, gate and up]
            [expert + "gate_proj.weight", expert + "up_proj.weight"],
            [Rearrange("e in out -> e out in"), Unstack("e"), Split(0)],
        ),
        Rule(
            "{i}.down",
            expert + "down_proj.weight",
            [Rearrange("e in out -> e out in"), Unstack("e")],
        ),
    ],
)

# the weights in this trainer's layouts; here they come from a checkpoint
given = load_file(args.model / "model.safetensors")
own = {}
for i in range(config.num_hidden_layers):
    at = f"model.layers.{i}."
    own[f"{i}.qkv"] = torch.cat([given.pop(f"{at}self_attn.{x}_proj.weight") for x in "qkv"])
    gate, up, down = (
        torch.stack(
            [
                given.pop(f"{at}mlp.experts.{e}.{x}_proj.weight").t()
                for e in range(config.num_experts)
            ]
        )
        for x in ("gate", "up", "down")
    )
    own |= {f"{i}.gate_up": torch.cat([gate, up], dim=-1), f"{i}.down": down}
own |= given
sharded = {name: distribute_tensor(t.to(device), mesh, [Shard(0)]) for name, t in own.items()}

# every rank makes a Publisher and every rank pushes; rank 0 alone speaks to the agent
with Publisher([args.agent], conversion=conversion) as publisher:
    for _ in range(args.steps):
        for weight in sharded.values():  # here your trainer takes a step
            weight.to_local().add_(torch.randn_like(weight.to_local()), alpha=0.02)
        report = publisher.push(sharded)
        if dist.get_rank() == 0:
            print(report)

if args.save:
    whole = {name: t.full_tensor().cpu() for name, t in sharded.items()}
    for i in range(config.num_hidden_layers):
        at, width = f"model.layers.{i}.", config.head_dim * kv
        parts = whole.pop(f"{i}.qkv").split(
            [config.head_dim * config.num_attention_heads, width, width]
        )
        whole |= {f"{at}self_attn.{x}_proj.weight": t for x, t in zip("qkv", parts, strict=True)}
        gate, up = whole.pop(f"{i}.gate_up").chunk(2, dim=-1)
        for x, stack in (("gate", gate), ("up", up), ("down", whole.pop(f"{i}.down"))):
            for e, t in enumerate(stack):
                whole[f"{at}mlp.experts.{e}.{x}_proj.weight"] = t.t()
    if dist.get_rank() == 0:
        args.save.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in whole.items()}, args.save / "model.safetensors")
dist.destroy_process_group()
