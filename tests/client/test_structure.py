"""What is known of a model is used again only where it still is true."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_world import mesh_of, shard
from reference import Agent
from test_push import arrived
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

from weightsync_client import ConversionSpec, LocalShard, Publisher, Rule, Unstack
from weightsync_client.modules import take_apart
from weightsync_client.pushed import Pushed
from weightsync_client.structure import PreparedSource, Structure, Structures

Make = Callable[..., Publisher]


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False), nn.LayerNorm(8))
    model[1].weight = model[0].weight
    return model.to(torch.bfloat16)


def seen(known: Structures, model: Any, conversion: Any = "auto") -> Pushed:
    pushed = Pushed(model, conversion, None, known)
    assert pushed.declaration
    return pushed


def prepared(known: Structures, model: Any, conversion: Any = "auto") -> bool:
    return isinstance(seen(known, model, conversion).given, PreparedSource)


def same(pushed: Pushed, model: Any, conversion: Any = "auto") -> bool:
    """Whether it is what a first look at the model would give."""
    fresh = Pushed(model, conversion)
    return pushed.declaration == fresh.declaration and all(
        torch.equal(pushed.given.local(name, k), fresh.given.local(name, k))
        and pushed.given.local(name, k).data_ptr() == fresh.given.local(name, k).data_ptr()
        for name, boxes in fresh.given.holdings().items()
        for k in range(len(boxes))
    )


@pytest.mark.parametrize("kind", ["module", "mapping", "views", "shards", "converted"])
def test_a_second_look_gives_what_a_first_one_gives(kind: str) -> None:
    flat = torch.randn(64)
    spec = ConversionSpec("stacked", [Rule("x", "x.{k}", Unstack("k"))])
    model, conversion = {
        "module": (tied(), "auto"),
        "mapping": ({"a": torch.randn(4, 4), "b": torch.randn(3).half()}, "auto"),
        "views": ({"a": flat[:32].view(4, 8), "b": flat[32:].view(8, 4).T}, "auto"),
        "shards": ({"a": LocalShard(torch.randn(2, 4), (4, 4), (2, 0))}, "auto"),
        "converted": ({"x": torch.randn(3, 4, 4)}, spec),
    }[kind]
    known = Structures()
    assert not prepared(known, model, conversion)
    again = seen(known, model, conversion)
    assert isinstance(again.given, PreparedSource)
    assert same(again, model, conversion)
    assert again.declaration is seen(known, model, conversion).declaration


def test_what_a_rendezvous_looked_at_is_what_the_next_pushes_know() -> None:
    model, known = tied(), Structures()
    first = seen(known, model).declaration
    pushed = seen(known, model)
    assert pushed.declaration is first
    pushed.look_again()
    assert not isinstance(pushed.given, PreparedSource)
    assert pushed.declaration is not first
    assert seen(known, model).declaration is pushed.declaration  # compared in every push


def test_shards_of_fsdp2_are_known_by_what_this_rank_has() -> None:
    with mesh_of(1, (2,)) as mesh:
        model = tied()
        fully_shard(model, mesh=mesh)
        known = Structures()
        assert not prepared(known, model)
        again = seen(known, model)
        assert isinstance(again.given, PreparedSource)
        assert same(again, model)
        whole = torch.randn(8, 4)
        tensors = {"w": shard(whole, mesh, Shard(0))}
        known = Structures()
        assert not prepared(known, tensors)
        assert prepared(known, tensors)
        tensors["w"] = shard(whole, mesh, Replicate())
        assert not prepared(known, tensors)


def test_new_memory_of_the_same_form_is_read_where_it_is_now() -> None:
    model = tied()
    known = Structures()
    before = seen(known, model).given.local("0.weight", 0).data_ptr()
    marks = {seen(known, model).given.mark}
    held = model[0].weight.data
    model[0].weight.data = torch.randn(16, 8).to(torch.bfloat16)
    again = seen(known, model)
    assert isinstance(again.given, PreparedSource)
    assert same(again, model)
    assert before == held.data_ptr() != again.given.local("0.weight", 0).data_ptr()
    assert again.given.mark not in marks


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[2], "weight", nn.Parameter(torch.ones(4, 2).bfloat16())),
        lambda m: m[2].to(torch.float32),
        lambda m: m.append(nn.Linear(2, 2)),
        lambda m: setattr(m[1], "weight", nn.Parameter(m[1].weight.detach().clone())),
        lambda m: m[2].register_buffer("more", torch.ones(3)),
        lambda m: setattr(m[0].weight, "data", torch.ones(8, 16).bfloat16().T),
    ],
    ids=["shape", "dtype", "module", "untied", "buffer", "strides"],
)
def test_another_form_is_looked_at_anew(change: Callable[[nn.Module], object]) -> None:
    model = tied()
    known = Structures()
    seen(known, model)
    change(model)
    pushed = seen(known, model)
    assert not isinstance(pushed.given, PreparedSource)
    assert same(pushed, model)
    assert same(seen(known, model), model)


def test_tensors_that_share_memory_otherwise_are_looked_at_anew() -> None:
    flat = torch.randn(64)
    known = Structures()
    seen(known, {"a": flat[:32], "b": flat[:32]})
    pushed = seen(known, {"a": flat[:32], "b": flat[:32].clone()})
    assert not isinstance(pushed.given, PreparedSource)
    assert [t.alias_of for t in pushed.declaration.tensors] == ["", ""]


def test_another_model_of_the_same_form_and_what_is_no_model_are_looked_at() -> None:
    known = Structures()
    seen(known, tied())
    assert not prepared(known, tied())
    for _ in range(2):
        assert not prepared(known, iter([("a", torch.ones(2))]))
    for _ in range(2):
        assert not prepared(known, {"a": torch.ones(2), "empty": torch.ones(0)})


def tree(model: nn.Module) -> tuple[list[object], list[torch.Tensor]] | None:
    form: list[object] = []
    tensors: list[torch.Tensor | None] = []
    plain = take_apart(model, form, tensors)
    return (form, [t for t in tensors if t is not None]) if plain else None


def test_a_module_taken_apart_has_the_tensors_of_its_state_dict() -> None:
    model = nn.Sequential(tied(), nn.BatchNorm1d(4), nn.Linear(2, 2, bias=False))
    model[1].register_buffer("passing", torch.ones(3), persistent=False)
    model[2].register_module("none", None)
    found, wanted = tree(model), model.state_dict(keep_vars=True)
    assert found is not None
    assert [*map(id, found[1])] == [*map(id, wanted.values())]
    assert tree(model) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[1], "bias", None),
        lambda m: setattr(m, "0", m[1]),
        lambda m: m.__setattr__("2", nn.Identity()),
        lambda m: m[1].register_module("none", None),
        lambda m: m[0].register_buffer("kept", torch.ones(1)),
        lambda m: m[0]._non_persistent_buffers_set.clear(),
        lambda m: m[1].register_parameter("kept", None),
    ],
    ids=["no bias", "another class", "child", "no child", "buffer", "persistent", "no parameter"],
)
def test_another_tree_has_another_form(change: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    model[0].register_buffer("passing", torch.ones(1), persistent=False)
    before = Structures()
    assert not prepared(before, model)
    assert prepared(before, model)
    change(model)
    assert not prepared(before, model)


class Own(nn.Linear):
    def get_extra_state(self) -> torch.Tensor:
        return torch.ones(3)


@pytest.mark.parametrize("way", ["hook", "pre_hook", "class", "instance"])
def test_a_module_that_saves_in_its_own_way_is_asked(way: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2) if way == "class" else nn.Linear(2, 2))
    assert (tree(model) is None) == (way == "class")
    if way == "hook":
        model[1].register_state_dict_post_hook(lambda *_: None)
    if way == "pre_hook":
        model[1].register_state_dict_pre_hook(lambda *_: None)
    if way == "instance":
        model[1].state_dict = lambda **_: {}
    assert tree(model) is None


def reachable(start: object) -> list[object]:
    found: dict[int, object] = {}
    todo = [start]
    while todo:
        one = todo.pop()
        if id(one) not in found and not isinstance(one, type | ModuleType):
            found[id(one)] = one
            todo += gc.get_referents(one)
    return list(found.values())


def test_what_is_known_keeps_no_weight_in_memory() -> None:
    known = Structures()
    model = tied()
    seen(known, model)
    assert prepared(known, model)
    held = reachable(known.__dict__)
    assert any(isinstance(one, PreparedSource | Structure) for one in held)
    assert not any(isinstance(one, torch.Tensor | nn.Module) for one in held)


def test_pushes_of_a_known_model_land_whole(agent: Agent, make_publisher: Make) -> None:
    publisher = make_publisher(agent, zero_copy_bytes=0)
    model = tied()
    for k in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        if k == 2:  # memory of its own, of the same form
            model[2].weight.data = torch.randn(8).to(torch.bfloat16)
        publisher.push(model)
        state = {n: t for n, t in model.state_dict().items() if n != "1.weight"}
        assert arrived(agent, state)
    model[0].weight.data = torch.randn(8, 16).to(torch.bfloat16).T  # of another form
    publisher.push(model)
    assert arrived(agent, {"0.weight": model[0].weight.detach()})
    assert agent.calls.count("/init_transfer") == 1
