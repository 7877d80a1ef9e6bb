from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightsync.errors import AgentUnreachableError, InputError, ManifestError
from weightsync_client import ModuleSource, Publisher, StateDictSource
from weightsync_client.checkpoint import CheckpointSource
from weightsync_client.source import as_source


class Subclass(torch.Tensor):
    pass


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> object:
        return {"scale": 1}

    def set_extra_state(self, state: object) -> None: ...


def test_module_source_names_parameters_and_persistent_buffers_alone() -> None:
    module = nn.BatchNorm1d(4)
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    names = [t.name for t in ModuleSource(module).manifest()]
    assert names == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_tied_weights_are_aliases_and_views_of_one_storage_are_not() -> None:
    weight = torch.randn(6, 4)
    source = StateDictSource({"a": weight, "tied": weight, "head": weight[:3], "t": weight.t()})
    aliases = {t.name: t.alias_of for t in source.manifest()}
    assert aliases == {"a": "", "tied": "a", "head": "", "t": ""}


def test_a_checkpoint_dtype_applies_to_floating_tensors_only() -> None:
    source = StateDictSource({"w": torch.ones(2), "n": torch.ones(2).long()}, dtype=torch.bfloat16)
    assert [t.dtype for t in source.manifest()] == ["bfloat16", "int64"]


def test_names_lose_what_torch_compile_puts_in_front() -> None:
    compiled = torch.compile(nn.Linear(2, 2))
    assert [t.name for t in ModuleSource(compiled).manifest()] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("name", "tensors", "error", "says"),
    [
        ("subclass", {"w": torch.ones(2).as_subclass(Subclass)}, InputError, "is a Subclass"),
        ("meta", {"w": torch.ones(2, device="meta")}, InputError, "no dense values"),
        ("sparse", {"w": torch.eye(3).to_sparse()}, InputError, "no dense values"),
        ("text", {"w": "x"}, InputError, "is a str, not a tensor"),
        ("complex", {"w": torch.ones(2, dtype=torch.complex64)}, ManifestError, "does not travel"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(
    name: str, tensors: dict[str, torch.Tensor], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        StateDictSource(tensors)


def test_extra_state_is_not_dropped_silently() -> None:
    with pytest.raises(InputError, match="_extra_state"):
        ModuleSource(WithExtraState(2, 2))


def test_only_weights_can_be_pushed() -> None:
    with pytest.raises(InputError, match="cannot take weights from a int"):
        as_source(3)
    with pytest.raises(InputError, match="pairs of a name and a tensor, got a Tensor"):
        as_source([torch.ones(2)])


def test_pairs_from_a_generator_are_a_source() -> None:
    source = as_source((f"w{i}", torch.full((2,), i)) for i in range(3))
    assert [t.name for t in source.manifest()] == ["w0", "w1", "w2"]
    assert torch.equal(source.local("w2", 0), torch.full((2,), 2))


def test_a_name_twice_and_no_tensors_at_all_are_refused() -> None:
    publisher = Publisher(["http://127.0.0.1:9"], progress="off")
    with pytest.raises(ManifestError, match="twice in the manifest: w"):
        publisher.push([("w", torch.ones(2)), ("w", torch.ones(3))])
    with pytest.raises(AgentUnreachableError):  # looked for first: another rank may have some
        publisher.push({})


@pytest.mark.parametrize(
    "agents",
    [[], ["127.0.0.1:9100"], ["ftp://host"], ["http://a:1", "http://a:1/"], ["http://a:x"], [""]],
)
def test_addresses_that_are_none_are_refused(agents: list[str]) -> None:
    with pytest.raises(InputError):
        Publisher(agents, progress="off")


def test_a_checkpoint_folder_is_mapped_and_not_copied(tmp_path):
    weights = {"a": torch.randn(64, 32), "b": torch.arange(6, dtype=torch.int64)}
    save_file(weights, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    assert [(t.name, t.dtype, t.shape) for t in source.manifest()] == [
        ("a", "float32", (64, 32)), ("b", "int64", (6,)),
    ]  # fmt: skip
    first, again = source.local("a", 0), source.local("a", 0)
    assert torch.equal(first, weights["a"])
    assert first.data_ptr() == again.data_ptr()
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        CheckpointSource(tmp_path)
