"""Which attention layers a commit renews: those whose post-processing can see a weight."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weightsync_server.engines.vllm import sees_weights


def attention() -> nn.Module:
    """As vLLM's plain one: scales as buffers, a cache, a backend with numbers."""
    layer = nn.Module()
    layer.register_buffer("_k_scale", torch.tensor(1.0))
    layer.kv_cache = [torch.zeros(100)]
    layer._k_scale_cpu = torch.tensor(1.0)
    layer.impl = SimpleNamespace(scale=0.1, alibi_slopes=None, sinks=None)
    return layer


def absorb(layer: nn.Module) -> None:
    layer.kv_b_proj = nn.Linear(2, 2)


def absorb_aside(layer: nn.Module) -> None:
    layer.impl.kv_b_proj = nn.Linear(2, 2)


def sink(layer: nn.Module) -> None:
    layer.impl.sinks = nn.Parameter(torch.zeros(4))


def sink_copy(layer: nn.Module) -> None:
    layer.impl.sinks = torch.zeros(4)


def scale(layer: nn.Module) -> None:
    layer.k_scale = nn.Parameter(torch.zeros(()))


def test_a_plain_layer_sees_none():
    assert not sees_weights(attention())
    assert not sees_weights(nn.Module())


@pytest.mark.parametrize("held", [absorb, absorb_aside, sink, sink_copy, scale])
def test_one_that_holds_some_or_whose_backend_does_may_see_them(held: Callable):
    layer = attention()
    held(layer)
    assert sees_weights(layer)


def test_a_module_without_parameters_holds_none():
    layer = attention()
    layer.quant = nn.Identity()
    layer.impl.quant = nn.Identity()
    assert not sees_weights(layer)
