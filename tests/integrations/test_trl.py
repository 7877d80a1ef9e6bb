"""TRL's own classes, with a torch engine behind an agent where they expect a vLLM server."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.integrations import doc
from tests.support.models import new_model
from tests.support.stack import TOKEN, Stack
from weightsync.errors import InputError, NonFiniteError
from weightsync_client import Publisher

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.nixl,
    # of packages that say what they will change next
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("trl")


@pytest.fixture
def publisher(stack: Stack):
    with Publisher([stack.agent.url], token=TOKEN, progress="off") as publisher:
        yield publisher


def rows(count: int) -> list[dict[str, list[int]]]:
    tokens = torch.randint(0, 512, (count, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]


def settings(folder):
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, logging_strategy="no",
        disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
    )  # fmt: skip


def train(model, folder, callback):
    from datasets import Dataset
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=model, args=settings(folder), train_dataset=Dataset.from_list(rows(6)),
        processing_class=tiny_tokenizer(), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return trainer


def tiny_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{k}": k for k in range(510)} | {"<pad>": 510, "<eos>": 511}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def test_trls_sft_trainer_pushes_before_training_and_after_each_second_step(
    stack, publisher, tmp_path
):
    from weightsync_client.integrations.trl import WeightsyncCallback

    model = new_model("qwen3", seed=21)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = stack.status()["version"]
    callback = WeightsyncCallback(publisher, every_steps=2)
    trainer = train(model, tmp_path, callback)
    assert trainer.state.global_step == 3
    assert [report.version for report in callback.reports] == [before + 1, before + 2]
    held = stack.held()
    publisher.push(first)
    assert stack.held().sha256 != held.sha256  # it had learned something by then
    model_now = publisher.push(model)
    stack.assert_holds(model.state_dict(), model_now.version)


def test_what_the_engine_has_after_training_is_what_was_trained(stack, publisher, tmp_path):
    from weightsync_client.integrations.trl import WeightsyncCallback

    model = new_model("qwen3", seed=22)
    callback = WeightsyncCallback(publisher, before_training=False)
    train(model, tmp_path, callback)
    assert len(callback.reports) == 3
    stack.assert_holds(model.state_dict(), callback.reports[-1].version)


def test_the_pages_example_of_the_callback_runs(stack, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import SFTTrainer

    model = new_model("qwen3", seed=27)
    names = {
        "SFTTrainer": SFTTrainer, "model": model, "args": settings(tmp_path),
        "dataset": Dataset.from_list(rows(6)), "tokenizer": tiny_tokenizer(),
    }  # fmt: skip
    before = stack.status()["version"]
    code = doc.block("TRL and transformers", "python")
    doc.run(code, monkeypatch, agent=stack.agent.url, **names)
    stack.assert_holds(model.state_dict(), before + 4)


def test_a_push_that_fails_ends_the_training_with_its_error(stack, publisher, tmp_path):
    from weightsync_client.integrations.trl import WeightsyncCallback

    model = new_model("qwen3", seed=23)
    held = stack.held()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        train(model, tmp_path, WeightsyncCallback(publisher))
    stack.assert_serves(held)
    with pytest.raises(InputError, match="every_steps"):
        WeightsyncCallback(publisher, every_steps=0)


@pytest.fixture
def generation(stack: Stack):
    """TRL's own link to its vLLM server, constructed as its GRPO and RLOO trainers do."""
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    def make(model):
        return VLLMGeneration(
            model=model, accelerator=Accelerator(cpu=True), processing_class=tiny_tokenizer(),
            mode="server", server_base_url=stack.engine.url,
        )  # fmt: skip

    return make


def test_trls_weight_sync_to_a_server_goes_through_the_publisher(stack, publisher, generation):
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration

    from weightsync_client.integrations.trl import server_weights

    before = VLLMGeneration.sync_weights, VLLMClient.init_communicator
    model = new_model("qwen3", seed=24)
    with server_weights(publisher):
        link = generation(model)  # no NCCL, no development mode: this server has neither
        version = stack.status()["version"]
        link.sync_weights()
        link.sync_weights()
    assert (VLLMGeneration.sync_weights, VLLMClient.init_communicator) == before
    stack.assert_holds(model.state_dict(), version + 2)


def test_weights_that_are_never_whole_are_refused_before_anything_is_sent(
    stack, publisher, generation
):
    from weightsync_client.integrations.trl import server_weights

    with server_weights(publisher):
        link = generation(new_model("qwen3", seed=25))
        held = stack.held()
        for backend, name in (
            (SimpleNamespace(is_zero3=True, fsdp_version=None), "ZeRO-3"),
            (SimpleNamespace(is_zero3=False, fsdp_version=1), "FSDP1"),
        ):
            link._dist = backend
            with pytest.raises(InputError, match=name):
                link.sync_weights()
    stack.assert_serves(held)


def test_an_adapter_is_merged_for_the_push_and_stays_apart_in_the_trainer(
    stack, publisher, generation
):
    peft = pytest.importorskip("peft")
    from weightsync_client.integrations.trl import server_weights

    base = new_model("qwen3", seed=26)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    apart = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with server_weights(publisher):
        generation(model).sync_weights()
    stack.assert_holds(merged, stack.status()["version"])
    # PEFT takes the adapter out again in bf16, which rounds
    torch.testing.assert_close(model.state_dict(), apart, rtol=0.02, atol=0.01)
