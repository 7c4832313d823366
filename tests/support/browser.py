"""Pages in Debian's chromium, as people see them."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium")
ALONE = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Arguments of a browser that asks the network for nothing of its own."""

on_desk_and_phone = pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])


@contextmanager
def browser_page(width, scheme):
    """A page of a browser that is so wide, in light or dark.

    At the end of the block no script may have failed, and nothing may be wider than the page.

    Args:
        width: pixels.
        scheme: `light` or `dark`.
    """
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "these tests need a browser: install Debian's package chromium"
    errors = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ALONE])
        page = browser.new_page(viewport={"width": width, "height": 860}, color_scheme=scheme)
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert errors == []
