"""The page at ``/``: its files, and what a person sees of it in Chromium."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.browser import browser
from weightsync.errors import VerifyError

FOLDER = Path(__file__).resolve().parents[2] / "server" / "weightsync_server" / "page"
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>&amp; \u202e 'quoted'"
)
#: what a page that is fine never logs: errors of scripts, and what its policy has blocked
BAD_LOG = ("error", "warning")


# ---------------------------------------------------------------- files


async def test_the_page_comes_without_a_token_and_may_load_nothing_from_elsewhere(
    make_agent, engine
):
    agent = await make_agent(engine.url, token="t0ken")
    for path in ("/", *(f"/page/{file.name}" for file in FOLDER.iterdir())):
        answer = await agent.http.get(path, headers={"Authorization": ""})
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await agent.http.get("/")).headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/page/", "/page/nothing.js", "/page/..%2fsecret.py", "/page/%2e%2e/agent"):
        assert (await agent.http.get(path)).status_code == 404, path
    assert (await agent.http.get("/status", headers={"Authorization": ""})).status_code == 401


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda f: f.name)
def test_its_files_name_no_other_host_and_make_no_markup_of_text(file):
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
    assert not re.search(r"\sstyle=|\son[a-z]+=|javascript:", text)


def colours(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", css))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(scheme):
    light, dark = (FOLDER / "page.css").read_text().split("@media (prefers-color-scheme: dark)")
    names = colours(light if scheme == "light" else dark)

    def contrast(one: str, other: str) -> float:
        bright, dim = sorted((luminance(names[one]), luminance(names[other])), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    for text in ("text", "quiet", "link", "good", "warn", "busy", "bad"):
        for ground in ("card", "ground"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for tone in ("good", "warn", "busy", "bad", "none"):
        assert contrast(tone, f"{tone}-wash") >= 4.5
        assert contrast("text", f"{tone}-wash") >= 7
    for phase in ("pause", "begin", "write", "commit", "resume", "abort", "close"):
        assert contrast(phase, "card") >= 2, phase  # a figure in words is beside every bar


# ---------------------------------------------------------------- in the browser


@pytest_asyncio.fixture
async def open_page():
    """Opens an agent's page; at the end nothing of it may have failed."""
    logged: list[str] = []
    async with browser() as chrome:

        async def make(agent, **options):
            page = await chrome.new_page(**options)
            page.set_default_timeout(15_000)
            page.on("pageerror", lambda error: logged.append(str(error)))
            page.on("dialog", lambda dialog: logged.append(f"dialog: {dialog.message}"))
            page.on(
                "console",
                lambda m: (
                    logged.append(m.text)
                    if m.type in BAD_LOG and "Failed to load resource" not in m.text
                    else None
                ),
            )
            page.on(
                "request",
                lambda r: None if r.url.startswith(agent.url) else logged.append(r.url),
            )
            await page.goto(agent.url + "/")
            return page

        yield make
    assert logged == []


async def sees(page, selector: str, text: str) -> None:
    """Wait until it is there to be read."""
    await page.locator(selector, has_text=text).first.wait_for()


@pytest.mark.browser
async def test_a_push_is_seen_phase_by_phase_without_a_reload(agent, trainer, open_page):
    page = await open_page(agent)
    await sees(page, "#state-name", "ready · version 0")
    await sees(page, "#link", "live")
    await sees(page, "#pushes", "None yet")
    t = await trainer(agent).rendezvous()
    await t.pause()
    await sees(page, "#state-name", "paused by a push")
    await t.begin(7)
    await sees(page, "#state-name", "receiving · version 0 → 7")
    await sees(page, ".words", "write running")
    width = "document.querySelector('.runs')?.getBoundingClientRect().width ?? 0"
    first = await page.evaluate(width)
    async with asyncio.timeout(15):
        while await page.evaluate(width) <= first:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the bar of a phase that runs grows
    await t.commit(7)
    await t.resume()
    await sees(page, "#state-name", "ready · version 7")
    await sees(page, "[data-outcome=committed]", "v7")
    words = await page.locator(".words").inner_text()
    assert re.search(r"paused \S+ m?s · 24 B · .*B/s · 1 rank", words), words
    assert re.search(r"pause .* · begin .* · write .* · commit .* · resume ", words), words
    assert await page.title() == "ready · version 7 · weightsync"
    # what a screen reader is told of, and in which manner
    status = page.get_by_role("status")
    assert await status.get_attribute("aria-live") == "polite"
    assert "version 7" in await status.inner_text()
    # nothing but text tells the figures, and keys reach what can be pressed
    await page.get_by_role("button", name="Compute").focus()
    await page.keyboard.press("Enter")
    await sees(page, "#checksums", "1 kernel tensors of version 7")
    await sees(page, "#checksums code", "00" * 32)
    # by hand
    await agent.post("/pause")
    await sees(page, "#state-name", "paused by hand")
    await sees(page, "#state-do code", f"weightsync resume {agent.url}")


@pytest.mark.browser
async def test_a_push_in_shadow_mode_shows_when_the_engine_served_and_the_way_back(
    agent, engine, trainer, open_page
):
    page = await open_page(agent)
    t = trainer(agent)
    await t.init(mode="shadow")
    await t.connect()
    ranks = t.ranks("digests", [b"d" * 16, b"e" * 16])
    for version in (1, 2):
        t.push_id = f"p{version}"
        await t.begin(version, mode="shadow")
        if version == 1:
            await sees(page, "#state-name", "shadowing · version 0 → 1")
        await agent.post("/prepare_commit", **t.step, version=version, ranks=ranks)
        await t.pause()
        if version == 2:
            engine.client.fail["commit"] = VerifyError("the exchange broke off")
            worker = engine.client.workers[0]
            worker.dirty, worker.rollback_to = True, 1
        await t.commit(version, ranks=[], expect=200 if version == 1 else 409)
        if version == 1:
            await t.resume()
            await sees(page, "[data-outcome=committed]", "prepare")
            pale = page.locator(".track .serving")
            assert [await p.get_attribute("data-phase") for p in await pale.all()] == [
                "begin", "write", "prepare",
            ]  # fmt: skip
            await sees(page, "#legend", "pale: the engine serves")
    await sees(page, "#state-name", "torn")
    await sees(page, "#state-do", f"weightsync rollback {agent.url}")


@pytest.mark.browser
async def test_what_an_engine_says_is_text_and_a_torn_engine_tells_what_to_do(
    make_engine, make_agent, trainer, open_page
):
    engine = await make_engine(workers=4)
    engine.client.model_path = HOSTILE
    engine.client.fail["commit"] = VerifyError(HOSTILE, hint="push again " + "x" * 300)
    agent = await make_agent(engine.url)
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(3)
    await t.commit(3, expect=409)
    await agent.agent.service.journal.flush()
    agent.agent.service.journal.trouble = HOSTILE
    page = await open_page(agent, viewport={"width": 390, "height": 844}, color_scheme="dark")
    await sees(page, "#state-name", "torn")
    await sees(page, "#state-do", "Push again, all of it: version 3 or later")
    await sees(page, "#state-do .cause", HOSTILE)
    await sees(page, "#state-do > p", f"cannot be written ({HOSTILE})")
    await sees(page, "#errors .detail", HOSTILE)
    await sees(page, "#engines", HOSTILE)
    await sees(page, "[data-outcome=torn] .words", "commit")
    assert await page.locator(".phase.failed").count() == 1
    assert await page.locator("#workers tbody tr", has_text="not whole").count() == 4
    await page.get_by_text("4 tensors cannot be pushed").click()
    await sees(page, "#workers details", "odd.weight")
    assert await page.locator("img, script:not([src])").count() == 0
    assert "torn" in await page.title()
    # on a phone nothing is cut off
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await page.evaluate(wide) <= 0


@pytest.mark.browser
async def test_the_token_is_asked_for_kept_in_the_tab_and_never_in_an_address(
    make_agent, engine, open_page
):
    agent = await make_agent(engine.url, token="t0ken")
    page = await open_page(agent)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.get_by_label("Bearer token").fill("wrong")
    await page.keyboard.press("Enter")
    await sees(page, "#token-why", "missing or wrong")
    assert not await page.locator("#main").is_visible()
    await page.get_by_label("Bearer token").fill("t0ken")
    await page.get_by_role("button", name="Look").click()
    await sees(page, "#state-name", "ready · version 0")
    await sees(page, "#link", "live")
    await page.reload()
    await sees(page, "#state-name", "ready · version 0")
    assert await page.evaluate("localStorage.length + document.cookie.length") == 0
    await page.get_by_role("button", name="Forget the token").click()
    await page.get_by_label("Bearer token").wait_for()
    assert await page.evaluate("sessionStorage.length") == 0
    assert asked
    assert not [url for url in asked if "t0ken" in url]


@pytest.mark.browser
async def test_an_agent_that_is_gone_is_told_at_once_and_found_again(make_agent, engine, open_page):
    agent = await make_agent(engine.url)
    page = await open_page(agent)
    await sees(page, "#link", "live")
    port = agent.running.port
    await agent.stop()
    await sees(page, "#link", "lost the agent")
    assert "lost" in await page.title()
    assert await page.get_by_role("alert").inner_text() == "Lost the agent"
    await sees(page, "#state-name", "ready")  # what it said last is still there
    await make_agent(engine.url, port=port)
    await sees(page, "#link", "live")
    await sees(page, "#state-name", "ready")  # it may have seen the new one join its engine
    assert await page.title() == "ready · version 0 · weightsync"
