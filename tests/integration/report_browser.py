"""Opens a report's page in headless Chromium: console, network, plots, sorting, and screenshots in light and dark.

python -m tests.integration.report_browser PAGE.html --shots DIR [--chromium PATH]

Speaks the DevTools protocol over a pipe: messages of JSON, each ended by a zero byte.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "google-chrome", "chromium-browser", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--hide-scrollbars",
)
PLOTS = "[...document.querySelectorAll('figure')].map(f => { const b = f.querySelector('svg').getBoundingClientRect();"
PLOTS += " return [f.innerText, b.width, b.height, f.querySelectorAll('path').length]; })"
TEXTS = "[...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().width == 0).length"
HEADINGS = "[...document.querySelectorAll('section')].map(s => [s.id, s.getBoundingClientRect().height])"
WIDTH = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
COLUMN = "[...document.querySelector('table.sortable').tBodies[0].rows].map(r => Number(r.cells[6].dataset.v))"
CLICK = "document.querySelectorAll('table.sortable th')[6].click()"


class Browser:
    """A headless Chromium with one page.

    Attributes:
        console: What pages wrote to the console, exceptions and refusals of their own policy among it.
        requests: Addresses that were asked for.
    """

    def __init__(self, program: str) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self.count = 0
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self.write = os.pipe()
        self.read, back = os.pipe()
        # Chromium reads descriptor 3 and writes descriptor 4
        words = ["bash", "-c", f'exec 3<&{theirs} 4>&{back}; exec "$@"', "bash", program, *FLAGS]
        self.process = subprocess.Popen(
            [*words, f"--user-data-dir={self.profile.name}"], pass_fds=(theirs, back), stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(back)
        self.held = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command, and note what happens until its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if session := getattr(self, "session", None):
            message["sessionId"] = session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.count:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]

    def wait(self, event: str) -> None:
        """Read on until something happens."""
        while self._next().get("method") != event:
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, page: Path, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=1100, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait("Page.loadEventFired")

    def shoot(self, path: Path) -> None:
        """A picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        area = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=area)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.write)
        os.close(self.read)
        self.profile.cleanup()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.held:
            part = os.read(self.read, 2**16)
            if not part:
                raise RuntimeError("the browser ended")
            self.held += part
        text, _, self.held = self.held.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        method, parameters = found.get("method"), found.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.console.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.console.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        return found


def chromium() -> str | None:
    """A browser on this machine."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def check(page: Path, program: str, shots: Path | None = None) -> dict[str, Any]:
    """What a page looks like to a browser.

    Args:
        page: The file.
        program: Chromium.
        shots: Directory for pictures in light and dark.

    Returns:
        ``console``, ``requests``, ``plots`` (caption, width, height, paths), ``sections`` (name, height), ``wider``
        (pixels by which it is wider than the window), ``unseen`` (texts in plots without a width), ``sorted``
        (the column of bytes after one click and after two).
    """
    browser = Browser(program)
    try:
        found: dict[str, Any] = {}
        for name in ("dark", "light"):
            browser.open(page, name == "dark")
            if shots is not None:
                browser.shoot(shots / f"{page.stem}-{name}.png")
        found = {"plots": browser.value(PLOTS), "sections": browser.value(HEADINGS), "wider": browser.value(WIDTH)}
        found |= {"unseen": browser.value(TEXTS), "sorted": []}
        for _ in range(2):
            browser.value(CLICK)
            found["sorted"].append(browser.value(COLUMN))
        return {**found, "console": browser.console, "requests": browser.requests}
    finally:
        browser.close()


def faults(page: Path, found: dict[str, Any]) -> list[str]:
    """What is wrong with what was found, in words."""
    wrong = [f"console: {line}" for line in found["console"]]
    own = (page.resolve().as_uri(), "data:")
    wrong += [f"asked for {url}" for url in found["requests"] if not url.startswith(own)]
    wrong += [f"no plot: {p}" for p in found["plots"] if p[1] < 100 or p[2] < 50 or p[3] < 5]
    wrong += [f"no section: {s}" for s in found["sections"] if s[1] < 40]
    wrong += [f"{found['wider']} pixels too wide"] * (found["wider"] > 0) + ["no plots"] * (not found["plots"])
    wrong += [f"{found['unseen']} texts without a width"] * (found["unseen"] > 0)
    down, up = found["sorted"]
    wrong += ["a click does not sort"] * (down != sorted(down, reverse=True) or up != sorted(up))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--shots", type=Path, required=True)
    parser.add_argument("--chromium", default=chromium())
    arguments = parser.parse_args()
    if arguments.chromium is None:
        sys.exit(f"expected one of {', '.join(NAMES)}, got none. Install a browser, or name it with --chromium.")
    found = check(arguments.page, arguments.chromium, arguments.shots)
    print(f"sections: {', '.join(name for name, _ in found['sections'])}; {len(found['plots'])} plots")
    wrong = faults(arguments.page, found)
    print("\n".join(wrong) or f"no faults; pictures in {arguments.shots}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
