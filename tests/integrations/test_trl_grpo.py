"""TRL's GRPO trainer generates with a real vLLM, not in development mode, and pushes to it."""

from __future__ import annotations

import pytest

from tests.integrations import doc
from tests.integrations.vllm_stack import running
from tests.support.cli import invoke
from tests.support.models import new_model

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.vllm,
    pytest.mark.nixl,
    pytest.mark.timeout(580),
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("trl")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{k}": k for k in range(510)} | {"<pad>": 510, "<eos>": 511}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def test_grpo_trains_on_what_vllm_generates_with_the_weights_that_it_pushed(tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = new_model("qwen3", seed=31)
    with running(tmp_path, monkeypatch, dev_mode=False) as stack:
        args = GRPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2,
            num_generations=2, max_completion_length=8, learning_rate=0.01, report_to=[],
            save_strategy="no", use_cpu=True, bf16=False, logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, use_vllm=True, vllm_mode="server",
            vllm_server_base_url=stack.server.url, vllm_importance_sampling_correction=False,
        )  # fmt: skip

        def reward(completions, **_):
            return [float(len(set(text.split()))) for text in completions]

        names = {
            "GRPOTrainer": GRPOTrainer, "model": model, "reward": reward, "args": args,
            "dataset": Dataset.from_list([{"prompt": f"t{k} t{k + 1}"} for k in range(4)]),
            "tokenizer": tokenizer(),
        }  # fmt: skip
        code = doc.block("TRL and transformers", "python", 1)
        # a last sync, of what the last step made
        code += "    trainer.vllm_generation.sync_weights()\n"
        trainer = doc.run(code, monkeypatch, agent=stack.agent.url, **names)["trainer"]
        assert trainer.state.global_step == 2
        assert stack.get("/status")["version"] == 3
        model.save_pretrained(tmp_path / "trained")
        agent = ("--agent", stack.agent.url, "--token-file", stack.token)
        same = invoke("verify", tmp_path / "trained", *agent)
        assert same.code == 0, same.out + same.err
        assert invoke("verify", stack.checkpoint, *agent).code == 1
