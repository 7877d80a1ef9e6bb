"""The embedded engine's own loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.support.models import KINDS, Kind, make_model, new_model
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync.worker_messages import AttachBody
from weightsync_server.engines.torch_engine import TorchAdapter
from weightsync_server.receiver.receiver import Receiver

FOUR_KINDS = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    return {kind: make_model(kind, tmp_path_factory.mktemp(kind), seed=1) for kind in KINDS}


def materialised_twin(adapter: TorchAdapter) -> torch.nn.Module:
    twin = adapter.new_twin()
    twin.to_empty(device="cpu")
    twin.tie_weights()
    for parameter in twin.parameters():
        parameter.fill_(float("nan"))
    return twin


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@FOUR_KINDS
def test_loading_the_checkpoint_gives_from_pretraineds_bytes(kind, folders):
    adapter = TorchAdapter(folders[kind])
    twin = materialised_twin(adapter)

    adapter.load(twin, load_file(folders[kind] / "model.safetensors").items())

    loaded, live = dict(twin.named_parameters()), dict(adapter.live.named_parameters())
    assert loaded.keys() == live.keys()
    for name, parameter in live.items():
        assert bytes_of(loaded[name]) == bytes_of(parameter), name


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPTNeoXConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4,
        ),
        transformers.MixtralConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_names_and_layouts_that_only_the_checkpoint_has_find_their_place(config, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = load_file(tmp_path / "model.safetensors")
    assert checkpoint.keys() - model.state_dict().keys()
    adapter = TorchAdapter(tmp_path)
    twin = materialised_twin(adapter)

    adapter.load(twin, checkpoint.items())

    loaded = dict(twin.named_parameters())
    for name, parameter in adapter.live.named_parameters():
        assert bytes_of(loaded[name]) == bytes_of(parameter), name


@FOUR_KINDS
def test_a_twin_has_the_live_models_names_shapes_and_dtypes_but_no_memory(kind, folders):
    adapter = TorchAdapter(folders[kind])
    twin = adapter.new_twin()

    def declared(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tensor.shape, tensor.dtype) for name, tensor in named}

    assert type(twin) is type(adapter.live)
    assert declared(twin) == declared(adapter.live)
    assert {tensor.device.type for tensor in twin.parameters()} == {"meta"}


def test_parameters_kept_in_another_dtype_keep_it_in_the_twin(folders):
    adapter = TorchAdapter(folders["qwen3"])
    adapter.live.model.norm.float()

    twin = adapter.new_twin()

    assert twin.model.norm.weight.dtype == torch.float32
    assert twin.lm_head.weight.dtype == torch.bfloat16


def test_a_tied_lm_head_is_dropped(folders):
    adapter = TorchAdapter(folders["llama_tied"])
    twin = materialised_twin(adapter)
    embedding = torch.full((512, 256), 2.0, dtype=torch.bfloat16)

    adapter.load(twin, [("model.embed_tokens.weight", embedding), ("lm_head.weight", -embedding)])

    assert torch.equal(twin.lm_head.weight, embedding)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3", "model.layers.2.mlp.up_proj.weight"),
        ("qwen3", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.8.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.side_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_up_proj.weight"),
    ],
)
def test_a_name_that_the_model_lacks_is_a_key_error_with_the_name(kind, name, folders):
    adapter = TorchAdapter(folders[kind])
    with pytest.raises(KeyError, match=name.replace(".", r"\.")):
        adapter.load(adapter.new_twin(), [(name, torch.empty(128, 256, device="meta"))])


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("qwen3", "model.norm.weight", (1,)),
        ("qwen3", "lm_head.weight", (256, 512)),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.gate_proj.weight", (256, 256)),
        ("qwen3_moe", "model.layers.0.mlp.experts.0.down_proj.weight", (128, 256)),
    ],
)
def test_a_wrong_shape_is_a_value_error_even_where_it_would_broadcast(kind, name, shape, folders):
    adapter = TorchAdapter(folders[kind])
    with pytest.raises(ValueError, match=rf"{name}.*expected.*got \({shape[0]},"):
        adapter.load(adapter.new_twin(), [(name, torch.empty(shape, device="meta"))])


def test_a_new_twin_leaves_the_live_model_as_it_was(folders):
    adapter = TorchAdapter(folders["qwen3"])
    before = {name: tensor.data_ptr() for name, tensor in adapter.live.named_parameters()}

    adapter.new_twin()

    assert {name: tensor.data_ptr() for name, tensor in adapter.live.named_parameters()} == before
    assert torch.get_default_dtype() == torch.float32


def test_two_seeds_differ_in_every_parameter():
    one, two = new_model("qwen3_moe", 1), dict(new_model("qwen3_moe", 2).named_parameters())
    assert all(not torch.equal(tensor, two[name]) for name, tensor in one.named_parameters())


@FOUR_KINDS
def test_the_receiver_proves_every_parameter_direct(kind, folders):
    adapter = TorchAdapter(folders[kind])
    receiver = Receiver(adapter, lambda: InMemoryTransport(Fabric()))

    reply = receiver.attach(AttachBody(proof="full"))

    assert reply.refusals == []
    assert reply.kernel_tensors == reply.direct == len(list(adapter.live.parameters()))
