r"""HSDP: shards within a node, replicas across nodes; the replicas share the push by bytes.

torchrun --standalone --nproc-per-node=4 hsdp.py --model tiny-model --agent http://127.0.0.1:9100
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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
mesh = init_device_mesh(
    device, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard")
)

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

# every rank makes a Publisher and every rank pushes; rank 0 alone speaks to the agent
with Publisher([args.agent]) as publisher:
    for _ in range(args.steps):
        tokens = torch.randint(0, model.config.vocab_size, (2, 32), device=device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = publisher.push(model)
        if dist.get_rank() == 0:
            print(report)

if args.save:
    whole = {name: t.full_tensor().cpu() for name, t in model.state_dict().items()}
    if dist.get_rank() == 0:
        AutoModelForCausalLM.from_pretrained(args.model).save_pretrained(
            args.save, state_dict=whole
        )
dist.destroy_process_group()
