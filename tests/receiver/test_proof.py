"""What an engine's post-processing may do to a module, and what comes of it: never wrong bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.receiver.finishing import (
    KINDS,
    Linear,
    Net,
    closure_over_copy,
    closure_over_weight,
    engine,
    fill_buffer,
    keep_a_view,
    keep_derived_flag,
    keep_derived_number,
    keep_packed_copy,
    kind_of,
    nothing,
    on_linear,
    pad,
    repack_in_place,
    served,
    swap_data,
    weights,
)
from tests.receiver.toys import (
    Bag,
    Pairs,
    ToyAdapter,
    Weights,
    by_name,
    new_pair,
)
from weightsync.errors import RefusedError


@pytest.mark.parametrize("proof", ["windows", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_after_a_push_the_engine_serves_what_a_fresh_load_would(name, proof, tmp_path):
    change, kind = KINDS[name]
    adapter = engine(change, tmp_path)
    receiver, trainer = new_pair(adapter, proof=proof)
    assert receiver._attachment.proofs.refusals == {}
    assert kind_of(receiver) == kind
    assert kind_of(receiver, "norm") == "direct"
    reply = trainer.rendezvous(weights())
    assert {r.name: r.mode for r in reply.layout.regions} == {
        "lin.weight": "staged" if kind == "staged" else "direct",
        "norm.weight": "direct",
    }
    # more than once: nothing of the push before may shine through
    for version in (1, 2, 3):
        trainer.push(weights(version), version)
        assert served(adapter.live) == served(adapter.fresh(weights(version)))


@pytest.mark.parametrize("name", KINDS)
def test_without_a_checkpoint_the_first_push_proves_the_later_ones(name):
    change, kind = KINDS[name]
    adapter = engine(change, None)
    receiver, trainer = new_pair(adapter)
    reply = trainer.rendezvous(weights(1))
    assert {r.mode for r in reply.layout.regions} == {"staged"}
    trainer.push(weights(1), 1)
    assert served(adapter.live) == served(adapter.fresh(weights(1)))
    assert kind_of(receiver) == kind
    assert receiver._attachment.proofs.refusals == {}
    trainer.rendezvous(weights(2))
    for version in (2, 3):
        trainer.push(weights(version), version)
        assert served(adapter.live) == served(adapter.fresh(weights(version)))


@pytest.mark.parametrize("keep", [keep_a_view, closure_over_weight, swap_data, repack_in_place])
def test_a_staged_write_never_lands_in_memory_that_serves(keep, tmp_path):
    def finish(m: Linear) -> None:
        keep(m)
        m.weight = nn.Parameter(m.weight.data.view(4, 9), requires_grad=False)

    adapter = engine(finish, tmp_path)
    receiver, trainer = new_pair(adapter)
    assert kind_of(receiver) == "staged"
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    before = {k: v for k, v in served(adapter.live).items() if not k.startswith("norm")}
    trainer.fill(weights(2))
    trainer.begin(2)
    trainer.send(2)
    assert before.items() <= served(adapter.live).items()


def test_a_repack_in_place_is_seen_where_the_checkpoint_cannot_show_it(tmp_path):
    """Equal rows look the same whatever is done to their order; the next weights do not."""
    ones = {"lin.weight": torch.ones(6, 6), "norm.weight": torch.ones(6)}
    adapter = ToyAdapter(Net, start=ones, finish=on_linear(repack_in_place), folder=tmp_path)
    receiver, trainer = new_pair(adapter, proof="full")
    assert kind_of(receiver) == "staged"
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    assert served(adapter.live) == served(adapter.fresh(weights(1)))


def test_staging_keeps_its_padding_clean_when_finishing_works_in_place(tmp_path):
    """Rows 4 and 5 are no weights; a transpose in place moves weights there, in a copy only."""

    def load(module: nn.Module, tensors: Pairs) -> None:
        for name, t in tensors:
            if name == "lin.weight":
                module.lin.weight.data[:4].copy_(t[:4])
                module.lin.weight.data[4:].zero_()
            else:
                by_name(module, [(name, t)])

    finish = on_linear(repack_in_place)
    adapter = ToyAdapter(Net, start=weights(), load=load, finish=finish, folder=tmp_path)
    _, trainer = new_pair(adapter)
    trainer.rendezvous(weights())
    for version in (1, 2):
        trainer.push(weights(version), version)
        assert served(adapter.live) == served(adapter.fresh(weights(version)))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_flag_that_depends_on_the_weights_follows_them(sign, tmp_path):
    def signed(version: int) -> Weights:
        made = weights(version)
        made["lin.weight"][0, 0] = sign * (-1) ** version
        return made

    finish = on_linear(keep_derived_flag)
    adapter = ToyAdapter(Net, start=signed(0), finish=finish, folder=tmp_path)
    receiver, trainer = new_pair(adapter)
    assert kind_of(receiver) == "renewed"
    trainer.rendezvous(weights())
    for version in (1, 2, 3):
        trainer.push(signed(version), version)
        assert served(adapter.live) == served(adapter.fresh(signed(version)))


def test_padding_filled_with_a_constant_that_staging_lacks_is_refused(tmp_path):
    def load(module: nn.Module, tensors: Pairs) -> None:
        for name, t in tensors:
            if name == "lin.weight":
                module.lin.weight.data[:4].copy_(t[:4])
                module.lin.weight.data[4:].fill_(1.0)
            else:
                by_name(module, [(name, t)])

    adapter = ToyAdapter(
        Net, start=weights(), load=load, finish=on_linear(repack_in_place), folder=tmp_path
    )
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match=r"lin\.weight"):
        trainer.rendezvous(weights())


def emptied(m: Linear) -> None:
    packed = m.weight.data.t().contiguous()
    m.compute = lambda x: x @ packed
    m.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def columns_of(module: nn.Module, param: str, columns: torch.Tensor) -> torch.Tensor | None:
    if not hasattr(module, "compute"):
        return None
    return module.compute(torch.eye(6)[columns]).t()


def test_an_emptied_parameter_is_staged_where_it_can_be_read_back(tmp_path):
    adapter = engine(emptied, tmp_path, read_back=columns_of)
    receiver, trainer = new_pair(adapter, proof="full")
    assert kind_of(receiver) == "staged"
    trainer.rendezvous(weights())
    for version in (1, 2):
        trainer.push(weights(version), version)
        assert served(adapter.live) == served(adapter.fresh(weights(version)))


def test_an_emptied_parameter_that_cannot_be_read_back_is_refused(tmp_path):
    adapter = engine(emptied, tmp_path)
    before = served(adapter.live)
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match=r"weight is emptied .* cannot be read back") as error:
        trainer.rendezvous(weights())
    assert [r["tensor"] for r in error.value.context["refusals"]] == ["lin.weight"]
    assert served(adapter.live) == before


def test_an_opaque_kernel_that_computes_with_other_weights_is_refused(tmp_path):
    adapter = engine(emptied, tmp_path, read_back=columns_of)
    adapter.live.lin.compute = lambda x: x * 2
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match="the engine computes with another weight"):
        trainer.rendezvous(weights())


def test_an_object_that_holds_other_tensors_than_a_fresh_loads_is_refused(tmp_path):
    adapter = engine(closure_over_copy, tmp_path)
    other = torch.zeros(6, 6)
    adapter.live.lin.compute = lambda x: x @ other
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match="compute of a fresh load holds other tensors"):
        trainer.rendezvous(weights())


class Method:
    def __init__(self) -> None:
        self.kept: object = None
        self.cache: dict[str, torch.Tensor] = {}


class WithMethod(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.quant_method = Method()


class MethodNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lin = WithMethod()


@pytest.mark.parametrize(
    ("keep", "what"),
    [
        (lambda m: setattr(m.quant_method, "kept", m.weight.data.clone()), "quant_method.kept"),
        (lambda m: setattr(m.quant_method, "kept", [m.weight.t() * 2]), "quant_method.kept"),
        (lambda m: m.quant_method.cache.update(w=m.weight.data.clone()), "quant_method.cache"),
        (lambda m: m.cache.update(w=m.weight.data.clone()), "cache"),
        (lambda m: setattr(m.child, "note", m.weight.data.clone()), "submodule child.note"),
        (lambda m: m.add_module("packed", Bag(w=m.weight.data.t().clone())), "submodule packed"),
    ],
)
def test_state_that_the_module_does_not_own_is_refused(keep, what, tmp_path):
    adapter = ToyAdapter(MethodNet, start=weights(), finish=on_linear(keep), folder=tmp_path)
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match=what):
        trainer.rendezvous(weights())


def test_post_processing_that_fails_on_a_copy_is_refused(tmp_path):
    def fail(module: Linear) -> None:
        raise ValueError("no such kernel")

    adapter = engine(nothing, tmp_path)
    adapter._finish = on_linear(fail)
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match="ValueError: no such kernel"):
        trainer.rendezvous(weights())


def test_proving_changes_nothing_in_the_live_engine(tmp_path):
    def finish(m: Linear) -> None:
        fill_buffer(m)
        keep_packed_copy(m)
        keep_derived_number(m)

    adapter = engine(finish, tmp_path)
    before = served(adapter.live)
    receiver, _ = new_pair(adapter, proof="full")
    receiver.checksums()
    assert served(adapter.live) == before


# ------------------------------------------------------------------ captured graphs


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "repack in place",
        "keep a packed copy",
        "keep a view",
        "fill a buffer",
        "make a new parameter",
        "repack in new memory",
    ],
)
def test_with_captured_graphs_every_tensor_stays_where_it_is(name, tmp_path):
    change, _ = KINDS[name]
    adapter = engine(change, tmp_path, replaceable=False)
    _, trainer = new_pair(adapter)
    lin = adapter.live.lin
    held = [
        *lin.parameters(),
        *lin.buffers(),
        *(v for v in vars(lin).values() if torch.is_tensor(v)),
    ]
    addresses = [t.data_ptr() for t in held]
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    now = [
        *lin.parameters(),
        *lin.buffers(),
        *(v for v in vars(lin).values() if torch.is_tensor(v)),
    ]
    assert [t.data_ptr() for t in now] == addresses
    assert served(adapter.live) == served(adapter.fresh(weights(1)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (closure_over_copy, "sets compute, which captured graphs keep"),
        (keep_derived_number, "sets scale, which captured graphs keep"),
        (keep_derived_flag, "sets flag, which captured graphs keep"),
    ],
)
@pytest.mark.parametrize("corner", [3.0, -3.0])
def test_with_captured_graphs_what_cannot_be_renewed_in_place_is_refused(
    change, reason, corner, tmp_path
):
    start = weights()
    start["lin.weight"][0, 0] = corner
    adapter = ToyAdapter(
        Net, start=start, finish=on_linear(change), folder=tmp_path, replaceable=False
    )
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match=reason):
        trainer.rendezvous(weights())


def test_with_captured_graphs_another_shape_than_a_fresh_loads_is_refused(tmp_path):
    adapter = engine(pad, tmp_path, replaceable=False)
    adapter.live.lin.weight = nn.Parameter(torch.zeros(6, 9), requires_grad=False)
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match=r"\(6, 8\).*\(6, 9\)"):
        trainer.rendezvous(weights())
