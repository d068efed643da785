"""The page at / in headless Chromium: pictures, streamed answers, its words about bytes; nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import browser
import pytest
from http_server import running
from samples import Page

from vkvx import Session
from vkvx.runtime.serving.http import page
from vkvx.runtime.serving.http.app import Settings

DROP = """(() => {
  const bytes = Uint8Array.from(atob(%s), (sign) => sign.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "page.png", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
})()"""


def test_the_page_names_no_other_place() -> None:
    text = page.response().body.decode()
    assert re.findall(r"https?://|//\w+\.\w+|@import|url\(", text) == []
    policy = page.response().headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
def test_a_chat_in_a_browser(tiny_bundle: Path, pages: list[Page], tmp_path: Path) -> None:
    picture = json.dumps(base64.b64encode(pages[0].path.read_bytes()).decode())
    path = browser.find()
    assert path is not None
    with (
        Session.load(tiny_bundle, threads=1) as session,
        running(session, Settings(api_key="key")) as server,
        browser.browsing(path, tmp_path) as tab,
    ):
        tab.open(f"{server.url}/")
        tab.wait("$('model').textContent === 'give the API key' && $('more').open")
        tab.run("$('key').value = 'key'; $('key').onchange()")
        tab.wait("model === 'tiny-llava'")
        tab.run(DROP % picture)
        tab.wait("document.querySelectorAll('#chosen img').length === 1")
        tab.run("$('text').value = 'Read row 2.'; $('form').requestSubmit()")
        tab.wait("!running && messages.length === 2")
        assert tab.run("messages[1].content") == pages[0].truth.split()[1]
        facts = tab.run("document.querySelector('.assistant .facts').textContent")
        assert re.fullmatch(
            r"8 tokens, [\d.]+ tokens/s, the first after [\d.]+ s\. "
            r"576 visual tokens take 85\.0 KiB of cache, 1\.1 MiB in 16 bits",
            facts,
        ), facts
        tab.run("$('most').value = 100000; $('text').value = 'Again.'; $('form').requestSubmit()")
        tab.wait("!running && $('text').value === 'Again.'")
        assert "the model knows" in tab.run("document.querySelector('.failed .facts').textContent")
        assert tab.run("messages.length") == 2
        tab.run("$('most').value = 900; $('text').value = 'What?'; $('form').requestSubmit(); $('fresh').click()")
        tab.wait("!running")  # a chat that has begun since knows nothing of it
        assert tab.run("messages.length + document.querySelectorAll('.turn').length") == 0
        tab.run("write(addTurn('assistant', '').said, 'a <b>\\n```py\\nx = 1\\n```\\nb')")
        assert tab.run("[...document.querySelectorAll('.said > *')].map((one) => one.tagName + one.textContent)") == [
            "Pa <b>\n",
            "PREx = 1\n",
            "Pb",
        ]
        for width in (1200, 390):
            backgrounds = set()
            for dark in (False, True):
                tab.resize(width, 800, dark)
                assert tab.run("document.documentElement.scrollWidth") <= width
                assert tab.run("$('send').getBoundingClientRect().bottom") <= 800
                backgrounds.add(tab.run("getComputedStyle(document.body).backgroundColor"))
            assert len(backgrounds) == 2
        tab.problems = [one for one in tab.problems if "401" not in one and "400" not in one]
        assert tab.problems == []
