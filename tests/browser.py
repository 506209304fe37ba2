"""A real browser for the report's page, Debian's chromium, and a picture of a page as it shows it.

python tests/browser.py report.html report.png --dark --width 400
"""

import argparse
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

CHROMIUM = shutil.which("chromium")


@contextmanager
def open_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # root has no sandbox to run in
        safe = os.geteuid() != 0
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=safe)
        yield browser
        browser.close()


@contextmanager
def open_page(browser, path, *, javascript=True, dark=False, width=1280):
    """The page of this file, without network, and the list of what went wrong in it."""
    context = browser.new_context(
        java_script_enabled=javascript,
        color_scheme="dark" if dark else "light",
        viewport={"width": width, "height": 900},
        offline=True,
    )
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.goto(Path(path).resolve().as_uri())
    yield page, wrong
    context.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, help="cut below; the whole page if left out")
    args = parser.parse_args()
    with (
        open_browser() as browser,
        open_page(browser, args.page, dark=args.dark, width=args.width) as (page, _),
    ):
        cut = {"x": 0, "y": 0, "width": args.width, "height": args.height} if args.height else None
        page.screenshot(path=args.picture, full_page=True, clip=cut)
    # 256 colours are enough for letters and dots, and make a file that can be kept
    with Image.open(args.picture) as picture:
        picture.convert("RGB").quantize(256).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
