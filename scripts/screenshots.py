"""Pictures of the status page for docs/images: ``make screenshots``.

A real agent with the torch engine, some pushes, one that fails before it begins, two in shadow
mode, and one whose bytes are spoilt on their way, which leaves the engine torn.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.support.browser import browser  # noqa: E402
from tests.support.models import randomize  # noqa: E402
from tests.support.stack import TOKEN, Stack, new_engine  # noqa: E402
from weightsync.errors import VerifyError, WeightSyncError  # noqa: E402
from weightsync_client import Deadlines  # noqa: E402

IMAGES = ROOT / "docs" / "images"
DESK = {"width": 1120, "height": 820}
PHONE = {"width": 390, "height": 844}


def make_checkpoint(folder: Path) -> Path:
    """A model of some 100 MB, so that its pushes take as long as can be seen."""
    config = transformers.Qwen3Config(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    randomize(model, 0)
    model.save_pretrained(folder)
    return folder


async def shoot_all(url: str, shots: dict[str, dict[str, Any]]) -> None:
    """One picture a name, each with its options of the browser."""
    async with browser() as chrome:
        for name, options in shots.items():
            page = await chrome.new_page(**options)
            await page.goto(url)
            await page.fill("#token-value", TOKEN)
            await page.press("#token-value", "Enter")
            await page.wait_for_selector("#state-means:not(:empty)")
            await page.wait_for_timeout(200)
            path = IMAGES / f"{name}.png"
            await page.screenshot(path=path, animations="disabled")


def main() -> None:
    """Make all pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "tiny-model")
        engine = new_engine(checkpoint, folder / "engine.log")
        engine.start()
        engine.wait_alive()
        stack = Stack(checkpoint, folder, engine, deadlines=Deadlines())
        try:
            stack.heal()
            for _ in range(5):
                stack.push()
                time.sleep(0.5)

            def gone() -> None:
                raise WeightSyncError("the trainer is out of memory")

            stack.failing_push(WeightSyncError, at="begin", do=gone)
            with stack.new_publisher(mode="shadow", deadlines=Deadlines()) as publisher:
                for _ in range(2):
                    publisher.push(stack.weights())
            asyncio.run(
                shoot_all(
                    stack.agent.url,
                    {
                        "page-light": {"viewport": DESK, "color_scheme": "light"},
                        "page-dark": {"viewport": DESK, "color_scheme": "dark"},
                        "page-phone": {"viewport": PHONE, "color_scheme": "light"},
                    },
                )
            )
            stack.failing_push(VerifyError, at="write", do=lambda: stack.slab()[0].bitwise_xor_(1))
            asyncio.run(
                shoot_all(
                    stack.agent.url,
                    {"page-torn": {"viewport": DESK, "color_scheme": "light"}},
                )
            )
        finally:
            stack.close()
            engine.stop()


if __name__ == "__main__":
    main()
