"""Looks at kernel tensors, which the engine stands still for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightsync.errors import IdentityError
from weightsync_server.receiver.kernel import Identity, check_identities, flat_bytes


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


def test_a_check_of_places_asks_no_class_of_the_engines(model):
    known = {name: Identity.of(t) for name, t in model.named_parameters()}
    Counted.looks = 0
    check_identities(model, known)
    assert Counted.looks == 0
    assert isinstance(model[1].weight, Counted)
    model[1].weight = Counted(torch.zeros(4, 4), requires_grad=False)
    with pytest.raises(IdentityError, match=r"1\.weight changed"):
        check_identities(model, known)


def test_the_bytes_of_a_parameter_are_a_plain_view_of_it(model):
    flat = flat_bytes(model[0].weight)
    assert type(flat) is torch.Tensor
    assert flat.data_ptr() == model[0].weight.data_ptr()
    flat.zero_()
    assert not model[0].weight.any()
