r"""Tensor parallel: columns and rows of the linear layers; the rest is on every rank alike.

torchrun --standalone --nproc-per-node=2 tensor_parallel.py --model tiny-model --agent http://127.0.0.1:9100
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from weightsync_client import Publisher

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--agent", required=True)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--save", help="write the last weights there, as a checkpoint")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
if device == "cuda":
    torch.cuda.set_device(dist.get_node_local_rank())
mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
columns, rows = ColwiseParallel(), RowwiseParallel()
styles = {
    "self_attn.q_proj": columns,
    "self_attn.k_proj": columns,
    "self_attn.v_proj": columns,
    "self_attn.o_proj": rows,
    "mlp.gate_proj": columns,
    "mlp.up_proj": columns,
    "mlp.down_proj": rows,
}
for layer in model.model.layers:
    parallelize_module(layer, mesh, styles)
    # These are on every rank, and each rank's gradient is that of its own heads alone.
    for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
        norm.weight.register_post_accumulate_grad_hook(lambda weight: dist.all_reduce(weight.grad))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

# every rank makes a Publisher and every rank pushes; rank 0 alone speaks to the agent
with Publisher([args.agent]) as publisher:
    for step in range(args.steps):
        torch.manual_seed(step)  # tensor parallel ranks see the same tokens
        tokens = torch.randint(0, model.config.vocab_size, (2, 32), device=device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = publisher.push(model)
        if dist.get_rank() == 0:
            print(report)

if args.save:
    whole = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
        for name, t in model.state_dict().items()
    }
    if dist.get_rank() == 0:
        AutoModelForCausalLM.from_pretrained(args.model).save_pretrained(
            args.save, state_dict=whole
        )
dist.destroy_process_group()
