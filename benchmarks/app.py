"""The page while someone types: pictures a second, and the time from a key stroke to its picture.

    python benchmarks/app.py  # 1 and 4 windows, in Debian's Chromium; server and browser share the cores

A key stroke's picture is that of its text or of a newer one. Times are taken in the browser.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "app"))
from app_server import Server

from conftest import ARGUMENTS

TEXT = "a sad person with long purple hair, glasses and a teal hat"
WATCH = """() => {
  window.keys = []; window.shown = [];
  const box = document.querySelector("#prompt textarea");
  box.addEventListener("input", () => window.keys.push([box.value, performance.now()]));
  new MutationObserver(() => {
    const image = document.querySelector("#picture img");
    const text = image ? image.alt.replace(/^[^:]*: /, "") : "";
    const last = window.shown[window.shown.length - 1];
    if (!last || last[0] !== text) window.shown.push([text, performance.now()]);
  }).observe(document.querySelector("#picture"), { subtree: true, childList: true, attributes: true });
}"""


def measure(pages, interval):
    """Pictures a second of each window, and the latencies in ms of all key strokes."""
    for page in pages:
        page.locator("#prompt textarea").fill("")
        page.wait_for_timeout(1500)
        page.evaluate(WATCH)
        page.locator("#prompt textarea").focus()
    begin = time.monotonic()
    for number, letter in enumerate(TEXT):
        for page in pages:
            page.keyboard.insert_text(letter)
        time.sleep(max(0, begin + (number + 1) * interval - time.monotonic()))
    rates, latencies = [], []
    for page in pages:
        page.wait_for_timeout(2000)
        keys, shown = page.evaluate("[window.keys, window.shown]")
        seconds = (keys[-1][1] - keys[0][1]) / 1000
        rates.append(sum(at <= keys[-1][1] for _, at in shown) / seconds)
        for text, at in keys:
            later = [when for picture, when in shown if len(picture) >= len(text) and when >= at]
            latencies.append(min(later) - at if later else float("inf"))
    return rates, sorted(latencies)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between key strokes")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    server = Server()
    print(f"{'windows':>8}{'pictures/s each':>18}{'median ms':>12}{'p95 ms':>9}")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
            for count in options.windows:
                pages = [browser.new_context().new_page() for _ in range(count)]
                for page in pages:
                    page.goto(server.address)
                    page.wait_for_selector("#states .strip", timeout=60_000)
                rates, latencies = measure(pages, options.interval)
                p95 = latencies[int(0.95 * len(latencies))]
                median = latencies[len(latencies) // 2]
                print(f"{count:>8}{sum(rates) / count:>18.1f}{median:>12.0f}{p95:>9.0f}")
                for page in pages:
                    page.context.close()
    finally:
        server.stop()


if __name__ == "__main__":
    main()
