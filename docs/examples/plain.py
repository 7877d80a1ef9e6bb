r"""One process, one module: train, push, repeat.

python plain.py --model tiny-model --agent http://127.0.0.1:9100
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from weightsync_client import Publisher

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--agent", required=True)
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--save", help="write the last weights there, as a checkpoint")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

with Publisher([args.agent]) as publisher:
    for _ in range(args.steps):
        tokens = torch.randint(0, model.config.vocab_size, (2, 32))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(publisher.push(model))

if args.save:
    model.save_pretrained(args.save)
