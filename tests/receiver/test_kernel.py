"""Looks at kernel tensors, which the engine stands still for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsync.errors import IdentityError
from weightsync_server.receiver.kernel import Identity, Places, flat_bytes


class Counted(nn.Parameter):
    """A parameter whose class is asked about each look at it, as vLLM's are."""

    looks = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Counted.looks += 1
        return torch.Tensor.__torch_function__.__func__(cls, func, types, args, kwargs or {})


@pytest.fixture
def model():
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in made:
        layer.weight = Counted(layer.weight.detach(), requires_grad=False)
    return made


@pytest.fixture
def places(model):
    return Places(model, {name: Identity.of(t) for name, t in model.named_parameters()})


def test_a_check_of_places_asks_no_class_of_the_engines(model, places):
    Counted.looks = 0
    places.check()
    assert Counted.looks == 0
    assert isinstance(model[1].weight, Counted)


def replaced(model):
    model[1].weight = Counted(torch.zeros(4, 4), requires_grad=False)


def with_other_memory(model):
    model[1].weight.data = torch.zeros(4, 4)


def transposed(model):
    model[1].weight.data = model[1].weight.data.t()


def gone(model):
    del model[1]._parameters["weight"]


def in_another_module(model):
    model[1] = nn.Linear(4, 4)


def in_a_module_that_was_renamed(model):
    model._modules["2"] = model._modules.pop("1")


@pytest.mark.parametrize(
    "moved", [replaced, with_other_memory, transposed, gone, in_another_module,
              in_a_module_that_was_renamed],
)  # fmt: skip
def test_a_tensor_that_moved_is_named(model, places, moved):
    moved(model)
    with pytest.raises(IdentityError, match=r"1\.weight changed"):
        places.check()


def test_another_object_in_the_same_place_is_no_move(model, places):
    model[1].weight = Counted(model[1].weight.detach(), requires_grad=False)
    places.check()
    model[1].weight.data = torch.zeros(4, 4)
    with pytest.raises(IdentityError):
        places.check()


def test_the_bytes_of_a_parameter_are_a_plain_view_of_it(model):
    flat = flat_bytes(model[0].weight)
    assert type(flat) is torch.Tensor
    assert flat.data_ptr() == model[0].weight.data_ptr()
    flat.zero_()
    assert not model[0].weight.any()
