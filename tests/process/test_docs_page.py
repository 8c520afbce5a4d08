"""/docs in a real browser: every route is there, and a generation can be run from it."""

import json
from pathlib import Path

import pytest

from supervisor import openapi
from supervisor.app import OPERATIONS
from supervisor.routes.generate import EXAMPLE
from tests.tools import browser
from tests.tools.server import RunningServer

ROW = "#operations-generation-post_generate"
BODY = {"checkpoint": "sd15", "parameters": {"prompt": "a fox", "num_inference_steps": 2}}
ADDRESSES = """
[...document.querySelectorAll('.opblock')].map(row =>
  row.querySelector('.opblock-summary-method').textContent + ' ' +
  row.querySelector('[data-path]').dataset.path)
"""
# React listens to the setter of the element's own class.
WRITE = """
(() => {
  const area = document.querySelector('ROW textarea.body-param__text');
  const setter = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set;
  setter.call(area, BODY);
  area.dispatchEvent(new Event('input', {bubbles: true}));
})()
"""
STATUS = f"document.querySelector('{ROW} .live-responses-table .response .response-col_status')"


def expected_addresses() -> set[str]:
    paths = openapi.document(OPERATIONS, False)["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


def test_the_page_lists_every_route_and_runs_a_generation(
    scripted: RunningServer, tmp_path: Path
) -> None:
    if browser.CHROMIUM is None:
        pytest.skip("chromium is not installed: /docs was not looked at by a browser")
    with browser.page(tmp_path) as page:
        page.call("Page.navigate", url=f"{scripted.url}/docs")
        expected = expected_addresses()
        page.wait_for(f"document.querySelectorAll('.opblock').length >= {len(expected)}")
        assert {shown.replace("\u200b", "") for shown in page.evaluate(ADDRESSES)} == expected
        page.screenshot(tmp_path / "routes.png")

        page.evaluate(f"document.querySelector('{ROW} .opblock-summary-control').click()")
        page.wait_for(f"!!document.querySelector('{ROW} textarea.body-param__text')")
        shown = json.loads(page.evaluate(f"document.querySelector('{ROW} textarea').value"))
        assert shown == EXAMPLE
        page.evaluate(WRITE.replace("ROW", ROW).replace("BODY", json.dumps(json.dumps(BODY))))
        page.evaluate(f"document.querySelector('{ROW} .execute').click()")
        page.wait_for(f"!!{STATUS}")
        assert page.evaluate(f"{STATUS}.textContent").startswith("200")
        answer = page.evaluate(f"document.querySelector('{ROW} .live-responses-table').textContent")
        assert "batch_id" in answer
        page.evaluate(f"{STATUS}.scrollIntoView()")
        page.screenshot(tmp_path / "generated.png")

        outside = [url for url in page.requested if not url.startswith((scripted.url, "data:"))]
        assert not outside
        assert f"{scripted.url}/generate" in page.requested
