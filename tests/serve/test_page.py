"""The page at /, in a headless Chromium that is driven through its debugging pipe."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Live

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


class Browser:
    """One tab."""

    def __init__(self, profile: Path) -> None:
        inward, self._to = os.pipe()
        self._from, outward = os.pipe()
        self._numbers = itertools.count(1)
        self._held = b""
        self.events: list[dict[str, Any]] = []
        arguments = [
            "bash", "-c", f'exec "$@" 3<&{inward} 4>&{outward}', "bash", str(CHROMIUM), "--headless", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            arguments, pass_fds=(inward, outward), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(inward)
        os.close(outward)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol; its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        os.write(
            self._to, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            more = os.read(self._from, 1 << 16)
            assert more, "the browser has gone"
            self._held += more
        message, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(message))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> Any:
        """Until it is true."""
        started = time.monotonic()
        while not (value := self.evaluate(expression)):
            assert time.monotonic() - started < seconds, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key; modifiers: 1 Alt, 8 Shift."""
        code = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}.get(key, ord(key[0].upper()))
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers, windowsVirtualKeyCode=code, **text
            )

    def screenshot(self, name: str) -> None:
        """For a person to look at: into the directory that FOMOE_SCREENSHOTS names."""
        folder = os.environ.get("FOMOE_SCREENSHOTS")
        if folder:
            data = self.call("Page.captureScreenshot", format="png")["data"]
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(data))

    def problems(self) -> list[Any]:
        """What the page complained about."""
        self.evaluate("0")
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def close(self) -> None:
        """End it."""
        os.close(self._to)
        os.close(self._from)
        self._process.kill()
        self._process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path / "profile")
    browser.call("Emulation.setDeviceMetricsOverride", width=1100, height=750, deviceScaleFactor=1, mobile=False)
    yield browser
    browser.close()


def visit(browser: Browser, url: str) -> None:
    browser.call("Page.navigate", url=url)
    browser.wait_for("document.readyState === 'complete' && typeof greet === 'function'")


DONE = "!document.querySelector('.at-work') && document.querySelectorAll('.assistant').length"
SAID = "document.querySelector('.assistant:last-child .said').textContent"


def test_page_and_script_are_served(live: Live) -> None:
    page, script = live.get("/"), live.get("/page.js")
    assert page.headers["content-type"].startswith("text/html") and "<script src=" in page.text
    assert script.headers["content-type"].startswith("text/javascript")
    for text in (page.text, script.text):  # all of it is here
        assert "https://" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "innerHTML" not in script.text


@pytest.mark.slow
def test_a_conversation(live: Live, browser: Browser) -> None:
    visit(browser, live.url)
    browser.wait_for("document.getElementById('model').textContent === 'demo'")
    browser.evaluate("document.getElementById('most').value = 24")
    browser.type("The river was")
    browser.press("Enter")
    browser.wait_for(DONE)
    first = browser.evaluate(SAID)
    want = {"messages": [{"role": "user", "content": "The river was"}], "max_tokens": 24}
    assert first == live.post("/v1/chat/completions", want).json()["choices"][0]["message"]["content"]
    assert "24 tokens" in browser.evaluate("document.querySelector('.assistant .about').textContent")
    browser.press("r", modifiers=1)
    browser.wait_for(DONE)
    assert browser.evaluate(SAID) == first
    browser.type("And <b>then</b>?")
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('.assistant').length === 2")
    browser.wait_for(DONE)
    assert browser.evaluate("document.querySelectorAll('.user')[1].textContent") == "And <b>then</b>?"
    assert browser.evaluate("document.querySelectorAll('.again').length") == 1
    browser.press("m", modifiers=1)
    browser.wait_for("document.getElementById('dram').textContent.endsWith('%')")
    assert browser.evaluate("document.getElementById('exact').textContent") == "exact"
    assert browser.evaluate("document.getElementById('speed').textContent").endswith("tok/s")
    assert browser.evaluate("document.getElementById('per-token').textContent").endswith("/token")
    assert browser.evaluate("document.getElementById('stall').textContent").endswith("%")
    assert browser.evaluate("document.getElementById('swaps').textContent") == "off"
    check_map(browser, live)
    browser.screenshot("light")
    browser.evaluate("document.getElementById('theme').click()")
    browser.screenshot("dark")
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.screenshot("narrow")
    browser.press("n", modifiers=1)
    assert browser.evaluate("document.querySelectorAll('.assistant').length") == 0
    assert browser.problems() == []


def check_map(browser: Browser, live: Live) -> None:
    """Every expert is a pixel in its tier's colour, and keys tell of a layer."""
    layers = live.get("/machine").json()["layers"]
    assert browser.evaluate("[map.width, map.height]".replace("map", "document.getElementById('map')")) == [
        len(layers[0]["tiers"]), len(layers),
    ]  # fmt: skip
    pixel = "Array.from(document.getElementById('map').getContext('2d').getImageData({}, {}, 1, 1).data)"
    resident = layers[1]["tiers"].index("d")
    green = browser.evaluate(pixel.format(resident, 1))
    assert green[3] > 80 and green[1] > green[2], green
    about = "document.getElementById('map-about').textContent"
    assert f"{len(layers)} layers" in browser.evaluate(about)
    browser.evaluate("document.getElementById('map').focus()")
    browser.press("ArrowDown")
    assert browser.evaluate(about).startswith(f"layer {layers[0]['layer']}: 0 in VRAM, {layers[0]['dram']} in DRAM")
    browser.press("ArrowUp")
    assert "layers" in browser.evaluate(about)
    browser.evaluate("document.getElementById('text').focus()")


@pytest.mark.slow
def test_stop(live: Live, browser: Browser) -> None:
    visit(browser, live.url)
    for key in ("Escape", "Enter"):
        browser.evaluate("begin()")
        browser.type("The river was")
        browser.press("Enter")
        browser.wait_for(f"document.querySelector('.assistant') && {SAID}.length > 5")
        assert browser.evaluate("document.getElementById('send').textContent") == "Stop"
        if key == "Escape":
            browser.press("Escape")
        else:
            browser.evaluate("document.getElementById('send').click()")
        browser.wait_for(DONE)
        assert "stopped" in browser.evaluate("document.querySelector('.assistant .about').textContent")
        assert live.wait_until_idle() < 2
        browser.type("And then?")  # the conversation goes on
        browser.evaluate("document.getElementById('most').value = 2")
        browser.press("Enter")
        browser.wait_for("document.querySelectorAll('.assistant').length === 2")
        browser.wait_for(DONE)
        browser.evaluate("document.getElementById('most').value = ''")


@pytest.mark.slow
def test_thoughts_are_folded(serve: Any, browser: Browser) -> None:
    live = serve(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}<think>\n", most_tokens=16)
    visit(browser, live.url)
    browser.type("The river was")
    browser.press("Enter")
    browser.wait_for(DONE)
    assert browser.evaluate("document.querySelector('.thoughts').open") is False
    assert browser.evaluate("document.querySelector('.thoughts div').textContent.length") > 5


@pytest.mark.slow
def test_errors_and_keys(serve: Any, browser: Browser) -> None:
    live = serve(api_keys=("secret",))
    visit(browser, live.url)
    browser.evaluate("document.getElementById('most').value = 4")
    browser.type("The river was")
    browser.press("Enter")
    browser.wait_for(DONE)
    assert browser.evaluate("document.querySelector('.error').textContent") == "Invalid API Key"
    browser.evaluate("document.getElementById('key').value = 'secret'")
    browser.press("r", modifiers=1)
    browser.wait_for(f"{DONE} && {SAID}.length > 0")
