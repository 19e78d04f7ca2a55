"""A headless browser for tests of pages; needs Chromium and Playwright."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def opened():
  """A browser; skips the test if there is none."""
  playwright = pytest.importorskip('playwright.sync_api')
  path = shutil.which('chromium') or shutil.which('chromium-browser')
  if not path:
    pytest.skip('no Chromium')
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(
      executable_path=path, args=['--no-sandbox']
    )
    yield browser
    browser.close()


@contextlib.contextmanager
def visiting(url):
  """A page that is open in a browser, whose scripts must not fail."""
  with opened() as browser:
    page, wrong = browser.new_page(), []
    page.on('pageerror', lambda error: wrong.append(error))
    page.goto(url)
    yield page
    assert not wrong


def expect():
  """Playwright's `expect`."""
  return pytest.importorskip('playwright.sync_api').expect
