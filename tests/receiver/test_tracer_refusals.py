"""What is no copy is refused, by name of tensor and operation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.receiver.toys import (
    Bag,
    Pairs,
    agree,
    bag,
    by_name,
    each,
    into_p,
    traced,
    weights_of,
)
from weightsync.errors import ManifestError, TraceError
from weightsync.manifest import Manifest, TensorSpec


def part_zeroed(t: torch.Tensor) -> torch.Tensor:
    t[1:].zero_()
    return t


def part_overwritten(t: torch.Tensor) -> torch.Tensor:
    t[1:].copy_(torch.zeros(4, device=t.device))
    return t


def listed(t: torch.Tensor) -> torch.Tensor:
    made = torch.zeros_like(t)
    torch._foreach_add_([made], [t])
    return made


ARITHMETIC = {
    "negated exponent": (lambda t: -torch.exp(t), "exp"),
    "scaled": (lambda t: t * 2, "mul"),
    "product with itself": (lambda t: t @ t, "mm"),
    "rolled": (lambda t: t.roll(1, 0), "roll"),
    "gathered": (lambda t: t[torch.tensor([2, 0, 1, 3])], "index"),
    "scaled in place": (lambda t: t.mul_(2), "mul_"),
    "a part zeroed in place": (part_zeroed, "zero_"),
    "a copy, a part of it zeroed": (lambda t: part_zeroed(t.clone()), "zero_"),
    "a part overwritten": (part_overwritten, "copy_"),
    "seen as integers": (lambda t: t.view(torch.int32).float(), "_to_copy"),
    "summed into a temporary": (lambda t: torch.zeros(4, 4, device=t.device).add_(t), "add_"),
    "a listed update": (listed, "_foreach_add_"),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_refused_and_names_tensor_and_operation(name):
    compute, operation = ARITHMETIC[name]
    with pytest.raises(TraceError, match=rf"writes p from .*A_log.*{operation}"):
        traced(bag(p=(4, 4)), into_p(compute), weights_of(A_log=(4, 4)))


@pytest.mark.parametrize("join", [torch.add, lambda a, b: torch.cat([a, b])[:4]])
def test_joined_weights_are_refused_and_all_named(join):
    def load(module: nn.Module, tensors: Pairs) -> None:
        (_, a), (_, b) = tensors
        module.p.data.copy_(join(a, b))

    with pytest.raises(TraceError, match=r"first, second through aten\.(add|cat)"):
        traced(bag(p=(4,)), load, weights_of(first=(4,), second=(4,)))


@pytest.mark.parametrize(
    "update",
    [
        lambda p, t: p.add_(t),
        lambda p, t: p.mul_(2),
        lambda p, t: p.index_copy_(0, torch.tensor([3, 2, 1, 0]), t),
        lambda p, t: p.__setitem__(torch.tensor([3, 2, 1, 0]), t),
        lambda p, t: torch.add(p, t, out=p),
        lambda p, t: torch._foreach_copy_([p], [t]),
        lambda p, t: p.uniform_(),
    ],
)
def test_updates_of_a_parameter_that_are_no_copy_are_refused(update):
    load = each(lambda m, _, t: update(m.p.data, t))
    with pytest.raises(TraceError, match="changes p in place with aten"):
        traced(bag(p=(4,)), load, weights_of(w=(4,)))


@pytest.mark.parametrize(
    "replace",
    [
        lambda m, t: setattr(m.p, "data", t),
        lambda m, t: setattr(m, "p", nn.Parameter(t, requires_grad=False)),
        lambda m, t: setattr(m, "b", t),
        lambda m, t: m.register_buffer("new", t),
        lambda m, t: delattr(m, "p"),
    ],
)
def test_putting_another_tensor_in_place_is_refused(replace):
    def model() -> nn.Module:
        made = Bag(p=torch.empty(4))
        made.register_buffer("b", torch.empty(4))
        return made

    with pytest.raises(TraceError, match=r"in place of (p|b|new)"):
        traced(model, each(lambda m, _, t: replace(m, t)), weights_of(w=(4,)))


@pytest.mark.parametrize("keep", [lambda t: t, lambda t: {"w": t * 2}, lambda t: [t.float()]])
def test_a_weight_kept_outside_of_parameters_is_refused(keep):
    load = each(lambda m, _, t: setattr(m, "cache", keep(t)))
    with pytest.raises(TraceError, match=r"keeps w in the model\.cache"):
        traced(bag(p=(4,)), load, weights_of(w=(4,)))


def test_a_temporary_that_is_filled_whole_is_a_copy():
    def through(t: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(6, 4, device=t.device)
        made.copy_(t.t())
        return made.view(8, 3)

    agree(bag(p=(8, 3)), into_p(through), weights_of(w=(4, 6)))


def test_a_temporary_that_is_filled_in_part_is_refused():
    def through(t: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(8, device=t.device)
        made[:4].copy_(t)
        return made

    with pytest.raises(TraceError, match="w through copy_ into a part of a temporary"):
        traced(bag(p=(8,)), into_p(through), weights_of(w=(4,)))


def test_a_loaders_own_tables_are_really_filled():
    def load(module: nn.Module, tensors: Pairs) -> None:
        order = torch.zeros(2, dtype=torch.int64)
        order.copy_(torch.tensor([1, 0]))
        for (_, t), k in zip(tensors, order.tolist(), strict=True):
            module.p.data[k].copy_(t)

    agree(bag(p=(2, 3)), load, weights_of(a=(3,), b=(3,)))


def test_a_view_as_another_dtype_is_refused_on_either_side():
    both = each(lambda m, _, t: m.p.data.view(torch.int16).copy_(t.view(torch.int16)))
    with pytest.raises(TraceError, match="a view of w"):
        traced(bag(p=(4,)), both, weights_of(w=(4,)))


def test_copying_one_parameter_to_another_is_refused():
    def load(module: nn.Module, tensors: Pairs) -> None:
        for _, t in tensors:
            module.a.data.copy_(t)
            module.b.data.copy_(module.a.data)

    with pytest.raises(TraceError, match="writes b from the parameter a"):
        traced(bag(a=(4,), b=(4,)), load, weights_of(w=(4,)))


def test_an_unknown_name_is_a_manifest_error_that_names_it():
    with pytest.raises(
        ManifestError, match=r"refuses lm_tail \(float32 \[3\]\): KeyError"
    ) as error:
        traced(bag(p=(4,)), by_name, weights_of(p=(4,), lm_tail=(3,), q=(3,)))
    assert error.value.context["tensor"] == "lm_tail"


def test_a_wrong_shape_is_a_manifest_error_that_names_it():
    with pytest.raises(ManifestError, match=r"refuses p .*shape of p"):
        traced(bag(p=(4,)), by_name, weights_of(p=(5,)))


def test_a_loader_that_collects_first_still_gets_the_right_tensor_blamed():
    def load(module: nn.Module, tensors: Pairs) -> None:
        by_name(module, dict(tensors).items())

    with pytest.raises(ManifestError, match="refuses bad "):
        traced(bag(p=(4,)), load, weights_of(bad=(4,), p=(4,)))


def test_a_name_twice_is_a_manifest_error():
    spec = TensorSpec("w", "float32", (4,))
    with pytest.raises(ManifestError, match="twice"):
        Manifest.of([spec, spec])
