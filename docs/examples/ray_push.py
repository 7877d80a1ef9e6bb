r"""Ray: each actor is a rank of an FSDP2 job, and pushes its shards.

python ray_push.py --model tiny-model --agent http://127.0.0.1:9100 --ranks 2

weightsync takes no part in Ray: actors find each other through torch.distributed, and the engines
through their agents. Each actor needs the agents' token, so it is handed on in its environment.
"""

import argparse
import os

import ray
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--agent", required=True)
parser.add_argument("--ranks", type=int, default=2)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--save", help="write the last weights there, as a checkpoint")
args = parser.parse_args()

GPUS = int(torch.cuda.is_available())


@ray.remote(num_gpus=GPUS, num_cpus=1)
class Trainer:
    """One rank."""

    def __init__(self, rank: int, ranks: int, model: str, agent: str) -> None:
        self.rank, self.ranks, self.path, self.agent = rank, ranks, model, agent

    def address(self) -> str:
        """Where the ranks may meet: a free port of this actor's node."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, master: str) -> None:
        """Join the job, and shard the model."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers import AutoModelForCausalLM

        from weightsync_client import Publisher

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dist.init_process_group(
            "nccl" if self.device == "cuda" else "gloo",
            init_method=f"tcp://{master}",
            rank=self.rank,
            world_size=self.ranks,
        )
        mesh = init_device_mesh(self.device, (self.ranks,), mesh_dim_names=("shard",))
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16)
        self.model = model.to(self.device)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # every actor makes a Publisher and every actor pushes
        self.publisher = Publisher([self.agent], progress="off")

    def step(self) -> str:
        """Train a little, and push."""
        tokens = torch.randint(0, self.model.config.vocab_size, (2, 32), device=self.device)
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return str(self.publisher.push(self.model))

    def end(self, save: str | None) -> None:
        """Leave the job."""
        import torch.distributed as dist
        from transformers import AutoModelForCausalLM

        self.publisher.close()
        if save:
            whole = {name: t.full_tensor().cpu() for name, t in self.model.state_dict().items()}
            if self.rank == 0:
                AutoModelForCausalLM.from_pretrained(self.path).save_pretrained(
                    save, state_dict=whole
                )
        dist.destroy_process_group()


handed_on = ("WEIGHTSYNC_TOKEN", "PYTHONPATH", "OMP_NUM_THREADS")
environ = {name: os.environ[name] for name in handed_on if name in os.environ}
ray.init(num_cpus=args.ranks, include_dashboard=False, runtime_env={"env_vars": environ})
try:
    trainers = [Trainer.remote(k, args.ranks, args.model, args.agent) for k in range(args.ranks)]
    master = ray.get(trainers[0].address.remote())
    ray.get([trainer.start.remote(master) for trainer in trainers])
    for _ in range(args.steps):
        print(ray.get([trainer.step.remote() for trainer in trainers])[0])
    ray.get([trainer.end.remote(args.save) for trainer in trainers])
finally:
    ray.shutdown()
