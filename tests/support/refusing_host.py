"""The torch engine, but a load finishes wide layers, and those that serve were not finished.

No way of writing them can be proven, so the receiver has to refuse them.
"""

from __future__ import annotations

import sys

from torch import nn

from weightsync_server.engines import torch_engine, torch_host


def finish(self, module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and module.out_features > module.in_features:
        module.weight.data.mul_(2)


if __name__ == "__main__":
    torch_engine.TorchAdapter.finish = finish
    sys.exit(torch_host.main())
