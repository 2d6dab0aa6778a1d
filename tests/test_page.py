"""The page: its files and events, and in a real browser a chat by keyboard alone, its stop, and lanes that move."""

import asyncio
import importlib.util
import shutil
from contextlib import asynccontextmanager

import pytest

from aspec.generation.params import SamplingParams
from aspec.generation.sampler import Sampler
from aspec.generation.sequence import Sequence as TokenSequence
from aspec.generation.text.tokenizer import TextStream, Tokenizer
from aspec.observe.snapshot import Snapshot
from aspec.options import DEMO
from aspec.serving.http.page.files import PATHS
from aspec.serving.http.page.live import LEVELS, NUM_CELLS, measured
from aspec.serving.http.service import State
from tests.serving import served
from tests.tool_templates import QWEN

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "def main(argv):"}]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SLOW = {"device_memory": 30 << 20, "link_rate": 30e6, "max_batch": 2}  # weights stream, some tokens a second


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """The demo target with a chat template."""
    folder = tmp_path_factory.mktemp("page") / "target"
    shutil.copytree(DEMO / "target", folder)
    (folder / "chat_template.jinja").write_text(QWEN)
    return folder


# -- without a browser -----------------------------------------------------------------------------------------


async def test_the_page_needs_no_key_and_runs_nothing_of_others(talking):
    async with served(talking, key="secret", opened=False) as server:
        for path in PATHS:
            answer = await server.ask(path)
            assert answer.status == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert b"//" not in answer.body.replace(b"// ", b""), "no address of another server"
        assert (await server.ask("/live")).status == 401


async def test_live_events_are_the_dashboard_s_snapshot(talking):
    async with served(talking, DEMO / "draft", most=6, max_batch=1) as server:
        await server.ask(CHAT, {"messages": ASK})
        asked = asyncio.create_task(server.ask("/live"))
        await asyncio.sleep(0.6)
        server.service.stop()
        events = (await asked).events
        server.service.state = State.READY
    first, last = events[0], events[-1]
    assert len(events) > 1
    assert (first["state"], first["chats"], first["tokens"]) == ("ready", True, 6)
    assert {lane["name"] for lane in last["lanes"]} >= {"target", "draft"}
    assert all(len(lane["cells"]) == NUM_CELLS and 0 <= lane["share"] <= 1 for lane in last["lanes"])
    assert any(level for lane in first["lanes"] for level in lane["cells"])
    assert all(level is None or 0 <= level <= LEVELS for lane in first["lanes"] for level in lane["cells"])
    assert sum(first["accepted"]) > 0


def test_an_engine_that_has_not_worked_yet_can_be_shown():
    assert measured(Snapshot(3.0, "load"))["lanes"] == []


def test_all_but_the_last_token_of_a_round_were_proposed():
    params = SamplingParams(max_new_tokens=6)
    text = TextStream(Tokenizer.load(DEMO / "target"), stop=())
    tokens = Tokenizer.load(DEMO / "target").encode("def main(argv): return 1 + 2 - 3")
    sequence = TokenSequence(0, [5], 1, params, Sampler(params), text, frozenset({0}), 6)
    for drawn in (tokens[:1], tokens[1:4], tokens[4:9]):
        sequence.commit(drawn)
    found = [(said, drafted) for said, _, _, drafted in sequence.take_pieces()]
    assert found[0][1] == 0
    assert found[1][0][found[1][1] :] == sequence.text._tokenizer.decode(tokens[3:4])
    assert found[2][0][found[2][1] :] == "", "the limit cut the round: all of it was proposed"


@pytest.mark.slow
async def test_a_stream_tells_what_was_drafted(talking):
    """Without a draft nothing; with one the same text, and about the share of tokens that was accepted."""
    body = {"messages": ASK, "stream": True, "stream_options": {"include_drafted": True}, "max_tokens": 30}
    texts, shares = [], []
    for draft in (None, DEMO / "draft"):
        async with served(talking, draft, max_batch=1) as server:
            choices = [event["choices"][0] for event in (await server.ask(CHAT, body)).events]
            said = [(one["delta"]["content"], one["drafted"]) for one in choices if "drafted" in one]
            assert all(0 <= drafted <= len(text) for text, drafted in said)
            texts.append("".join(text for text, _ in said))
            shares.append(sum(drafted for _, drafted in said) / len(texts[-1]))
            plain = (await server.ask(CHAT, {**body, "stream_options": {}})).events
            assert not any("drafted" in event["choices"][0] for event in plain)
    assert texts[0] == texts[1]
    assert shares[0] == 0 < shares[1] < 1


# -- in a browser ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def browsing(server, width, *, scheme="light", at=None):
    """A page of a real browser that shows the server; every request must be to it, and no script may fail."""
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("no browser: expected playwright (pip) and chromium (apt)")
    from playwright.async_api import async_playwright

    home, wrong = f"http://127.0.0.1:{server.port}/", []
    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = await browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on(
                "request",
                lambda request: None if request.url.startswith((home, "data:")) else wrong.append(request.url),
            )
            await page.goto(home)
            yield page
            assert not wrong
        finally:
            await browser.close()


async def lanes(page):
    """What each lane's strip shows."""
    return await page.evaluate("[...document.querySelectorAll('canvas')].map(one => one.toDataURL())")


@pytest.mark.slow
async def test_a_chat_by_keyboard_alone_on_a_narrow_screen(talking):
    async with served(talking, DEMO / "draft", most=24, **SLOW) as server:
        expected = (await server.ask(CHAT, {"messages": ASK})).json["choices"][0]["message"]["content"]
        async with browsing(server, 360, scheme="dark") as page:
            await page.keyboard.type("def main(argv):")  # the message has the focus
            await page.keyboard.press("Enter")
            await page.wait_for_selector(".body .drafted", timeout=60_000)
            before = await lanes(page)
            await page.wait_for_selector(".note", timeout=60_000)
            assert await lanes(page) != before, "lanes move"
            assert await page.inner_text(".assistant .body") == expected
            assert await page.locator(".assistant .sampled").count() > 0
            note = await page.inner_text(".note")
            assert "24 tokens" in note
            assert "% drafted" in note
            assert "cut at its length" in note
            assert {"disk", "target", "draft"} <= set(await page.locator(".lane .name").all_inner_texts())
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360
            order = []
            for _ in range(6):
                await page.keyboard.press("Tab")
                order.append(await page.evaluate("document.activeElement.id"))
            assert order[:3] == ["send", "temperature", "tokens"], order


@pytest.mark.slow
async def test_escape_and_the_button_stop_an_answer(talking):
    async with served(talking, DEMO / "draft", most=400, **SLOW) as server, browsing(server, 1100) as page:
        for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
            await page.fill("#text", "import os")
            await page.keyboard.press("Enter")
            await page.wait_for_selector(".message:last-child .body:not(:empty)", timeout=60_000)
            await page.wait_for_selector("#bottleneck:not(:empty):not(:has-text('idle'))")
            assert server.service.num_open == 1
            await stop()
            await page.wait_for_selector("#stop[disabled]")
            assert (await page.locator(".note").last.inner_text()).startswith("stopped")
            async with asyncio.timeout(20):
                await server.service.idle.wait()
        await page.click("#new")
        assert await page.inner_text("#log") == ""


@pytest.mark.slow
async def test_a_key_is_asked_for_and_a_model_without_a_template_continues_a_text():
    options = {"most": 8, "key": "secret", "max_batch": 1}
    async with served(DEMO / "target", DEMO / "draft", **options) as server, browsing(server, 800) as page:
        await page.wait_for_selector("#lock[open]")
        await page.fill("#key", "secret")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#text-label:has-text('continue')")
        await page.fill("#text", "def main(argv):")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".note")
        headers = {"authorization": "Bearer secret", "content-type": "application/json"}
        whole = await server.ask("/v1/completions", {"prompt": "def main(argv):"}, **headers)
        assert await page.inner_text(".assistant .body") == whole.json["choices"][0]["text"].rstrip("\n")
