r"""Expert parallel: every rank has some of the experts of each layer, and all of the rest.

transformers 5 keeps a layer's experts in one parameter, checkpoints have a tensor an expert: each
rank finds out by itself which of those it has.

    $ torchrun --standalone --nproc-per-node=2 expert_parallel.py \
          --model tiny-model --agent http://127.0.0.1:9100
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
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
mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("ep",))

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
for layer in model.model.layers:
    experts = layer.mlp.experts
    for name, whole in list(experts.named_parameters()):  # [expert, out, in]
        setattr(experts, name, torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))

# every rank makes a Publisher and every rank pushes; rank 0 alone speaks to the agent
with Publisher([args.agent]) as publisher:
    for step in range(args.steps):
        # Here your trainer sends tokens to the ranks of their experts, and takes a step.
        torch.manual_seed(step)  # what is replicated changes alike on all ranks
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.add_(torch.randn_like(local), alpha=0.02)
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
