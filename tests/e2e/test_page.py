"""The page of an agent beside a real engine."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.browser import browser
from tests.support.stack import TOKEN, Stack


@pytest.mark.browser
@pytest.mark.nixl
async def test_the_page_shows_a_push_into_a_real_engine_as_it_happens(stack: Stack) -> None:
    async with browser() as chrome:
        page = await chrome.new_page()
        page.set_default_timeout(20_000)
        await page.goto(stack.agent.url)
        await page.get_by_label("Bearer token").fill(TOKEN)
        await page.keyboard.press("Enter")
        await page.locator("#link", has_text="live").wait_for()
        report = await asyncio.to_thread(stack.push)
        row = page.locator("[data-outcome=committed]", has_text=report.push_id)
        await row.wait_for()
        assert f"v{report.version}" in await row.inner_text()
        assert "MB" in await row.inner_text()
        await page.locator("#state-name", has_text=f"version {report.version}").wait_for()
        await page.get_by_role("button", name="Compute").click()
        await page.locator("#checksums", has_text="25 kernel tensors").wait_for()
        await page.get_by_label("Filter by name").fill("layers.1.")
        names = await page.locator("#checksums tbody th").all_inner_texts()
        assert len(names) > 5
        assert all("layers.1." in name for name in names)
