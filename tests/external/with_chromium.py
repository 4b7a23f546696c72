"""Opens pages of ours in headless Chromium: python tests/external/with_chromium.py CHROMIUM OUT PAGE …

Asserts, from a phone to a desk, in light and in dark: nothing is said on the console, nothing is requested, nothing
is wider than the window, no plot is too small to be read, and no text is too pale. Writes pictures and a PDF of each
page into OUT, to be looked at. Speaks the DevTools protocol over two pipes, so that it needs nothing but Python.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (375, 400, 800, 1280), ("light", "dark")
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
LEAST_LETTERS = 9.0  # pixels, in a plot

# The least contrast of any text, over the backgrounds that lie behind it. Colours go through a canvas, so that whatever
# CSS calls them they come out as numbers.
CONTRAST = """
(() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  const context = canvas.getContext("2d", {willReadFrequently: true})
  const paint = colours => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1) }
    return context.getImageData(0, 0, 1, 1).data
  }
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const page = matchMedia("(prefers-color-scheme: dark)").matches ? "#121212" : "#ffffff"
  let least = [21, ""]
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let node; node = walker.nextNode();) {
    if (!node.data.trim() || !node.parentElement.checkVisibility()) continue
    const behind = []
    for (let e = node.parentElement; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor)
    const a = light(paint([page, ...behind]))
    const b = light(paint([page, ...behind, getComputedStyle(node.parentElement).color]))
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    if (contrast < least[0]) least = [contrast, node.data.trim().slice(0, 40)]
  }
  return least
})()
"""
# The smallest text in any plot, in pixels, whichever way it is turned.
LETTERS = """
[...document.querySelectorAll("svg text")]
  .map(t => [t.getScreenCTM(), parseFloat(getComputedStyle(t).fontSize)])
  .reduce((least, [{a, b}, size]) => Math.min(least ?? Infinity, Math.hypot(a, b) * size), null)
"""


class Browser:
    """A headless Chromium with one tab."""

    def __init__(self, chromium: str, profile: str):
        to_browser, from_browser = os.pipe(), os.pipe()

        def as_3_and_4() -> None:
            # Where Chromium looks for them. First out of the way: they may be 3 and 4 in another order.
            read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
            os.dup2(read, 3)
            os.dup2(write, 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        self.process = subprocess.Popen(
            [chromium, *flags, f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=as_3_and_4,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self.write, self.read = os.fdopen(to_browser[1], "wb"), os.fdopen(from_browser[0], "rb")
        self.sent, self.buffer, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while (answer := self._next()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def wait(self, method: str) -> None:
        """Until an event, which may have come already."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.read.fileno(), 2**16)
            assert part, "the browser has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, url: str, width: int, scheme: str) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url="about:blank")
        self.wait("Page.loadEventFired")
        self.events.clear()
        opened = self.call("Page.navigate", url=url)
        assert "errorText" not in opened, (url, opened)
        self.wait("Page.loadEventFired")

    def picture(self, path: Path, whole: bool = False) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(30)


def check(browser: Browser, page: Path, out: Path) -> None:
    url = page.resolve().as_uri()
    for width in WIDTHS:
        for scheme in SCHEMES:
            browser.open(url, width, scheme)
            name = f"{page.stem}-{width}-{scheme}"
            widest = browser.evaluate("document.documentElement.scrollWidth")
            assert widest <= width, f"{name} is {widest} pixels wide"
            contrast, words = browser.evaluate(CONTRAST)
            assert contrast >= LEAST_CONTRAST, f"{name}: contrast {contrast:.2f} of {words!r}"
            letters = browser.evaluate(LETTERS)
            assert letters is None or letters >= LEAST_LETTERS, f"{name}: letters of {letters:.1f} pixels in a plot"
            browser.picture(out / f"{name}.png", whole=True)
            if browser.evaluate("Boolean(document.querySelector('.text a'))"):
                choose(browser, name, out)
            said = [e for e in browser.events if e.get("method") in ("Runtime.consoleAPICalled", "Log.entryAdded")]
            thrown = [e for e in browser.events if e.get("method") == "Runtime.exceptionThrown"]
            asked = [
                e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
            ]
            outside = [a for a in asked if not a.startswith(("data:", url))]
            assert not said and not thrown and not outside, (name, said, thrown, outside)
            print(f"{name}: contrast at least {contrast:.1f} ({words!r}), no request, nothing on the console")
    printed = browser.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
    (out / f"{page.stem}.pdf").write_bytes(base64.b64decode(printed["data"]))


def choose(browser: Browser, name: str, out: Path) -> None:
    """A token by keyboard: its card is shown, alone, within the window, and the text stays where it is."""
    shown = "[...document.querySelectorAll('.card')].filter(c => c.checkVisibility()).map(c => c.id)"
    browser.evaluate("links = document.querySelectorAll('.text a'), link = links[links.length >> 1], link.focus()")
    before = browser.evaluate("scrollY")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    (card,) = browser.evaluate(shown)
    assert card == browser.evaluate("link.hash.slice(1)")
    box = browser.evaluate(
        f"(({{left, top, right, bottom}}) => [left, top, right, bottom])"
        f"(document.getElementById({card!r}).getBoundingClientRect())"
    )
    width, height = browser.evaluate("[innerWidth, innerHeight]")
    assert box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height, (name, box)
    assert browser.evaluate("scrollY") == before, name
    browser.picture(out / f"{name}-chosen.png")


def main() -> None:
    chromium, out, *pages = sys.argv[1:]
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(chromium, profile)
        for page in map(Path, pages):
            check(browser, page, Path(out))
        browser.close()


if __name__ == "__main__":
    main()
