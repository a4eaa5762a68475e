"""The page in a real browser: the command's own server in a process of its own, and Debian's Chromium."""

import os
import shutil

import pytest
from app_server import Server

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
    running = Server()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def chromium():
    path = os.environ.get("PERFLOW_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason='the page is tested with Playwright: ".[dev]"')
    if path is None:
        said = "no Chromium to test the page with: `make browser`, or name one in PERFLOW_CHROMIUM"
        if os.environ.get("PERFLOW_BROWSER_TESTS") == "required":
            pytest.fail(said)
        pytest.skip(said)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def window(chromium):
    """Opens windows, each with a session of its own; `window.requests` holds every address that was asked for."""
    contexts = []

    def open_window(address, ready=True, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
        contexts.append(context)
        page = context.new_page()
        page.requests, page.faults = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(address)
        if ready:
            page.wait_for_selector("#states .strip", timeout=60_000)
        return page

    yield open_window
    for context in contexts:
        context.close()
