"""The playground in a real browser: tokens stream, are coloured by attribution, and show explanations."""

from __future__ import annotations

import os
import shutil

import pytest

playwright = pytest.importorskip("playwright.async_api", reason="pip install -e '.[browser]'")

from api_kit import Service  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture
async def service(tiny_plm_folder, adapters, anyio_backend):
    task = {"task": {"name": "modern", "template": "Rewrite: {source}\nModern:"}}
    task["generate"] = {"lambda_max": 0.7, "schedule": "linear", "length": 20}
    live = {"adapters": {"modern": adapters["modern"]}, "tasks": {"modern": task}}
    async with Service(tiny_plm_folder("llama"), live) as service:
        yield service
        await service.until_idle()


@pytest.fixture
async def page(anyio_backend):
    async with playwright.async_playwright() as p:
        browser = await p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1100, "height": 760})
        page.set_default_timeout(20_000)
        yield page
        await browser.close()


async def test_tokens_stream_with_explanations(service, page):
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    await page.goto(f"{service.url}/playground")
    await page.wait_for_function("document.getElementById('model').options.length === 1")
    assert await page.input_value("#lambda") == "0.7"
    await page.fill("#source", "each verse")
    await page.fill("#tokens", "20")
    await page.select_option("#schedule", "linear")
    await page.click("#go")
    await page.wait_for_function("document.getElementById('stop').disabled && document.querySelector('#pema .token')")
    request = {"model": "modern", "prompt": "", "max_tokens": 20, "temperature": 0}
    extra_body = {"source": "each verse", "lambda_max": 0.7, "schedule": "linear"}
    answer = await service.client.completions.create(**request, extra_body=extra_body)
    alone = await service.client.completions.create(**request, extra_body={"source": "each verse", "lambda_max": 0})
    assert await page.text_content("#pema") == answer.choices[0].text
    assert await page.text_content("#plm") == alone.choices[0].text
    tokens = await page.query_selector_all("#pema .token")
    assert len(tokens) == answer.usage.completion_tokens
    assert {await token.get_attribute("data-decided-by") for token in tokens} <= {"pema", "plm"}
    points = await page.get_attribute("#curve polyline", "points")
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == len(tokens)
    assert heights == sorted(heights)  # λ falls
    await tokens[2].hover()
    detail = await page.inner_text("#detail")
    assert "λ 0.6" in detail and "adapter's share" in detail
    assert await page.locator("#detail tr").count() == 6
    if picture := os.environ.get("PEMA_RAY_SCREENSHOT"):
        await page.screenshot(path=picture)
    assert messages == []


async def test_errors_are_shown_and_a_stopped_answer_frees_its_slot(service, page):
    await page.goto(f"{service.url}/playground")
    await page.wait_for_function("document.getElementById('model').options.length === 1")
    await page.fill("#tokens", "900")
    await page.click("#go")
    await page.wait_for_function("document.getElementById('error').textContent.includes('900 more are requested')")
    await page.fill("#source", "x")
    await page.fill("#tokens", "70")
    await page.click("#go")
    await page.wait_for_selector("#pema .token")
    await page.click("#stop")
    await service.until_idle()
    assert await page.text_content("#error") == ""


async def test_a_users_text_is_never_markup(service, page):
    await page.goto(f"{service.url}/playground")
    await page.wait_for_function("document.getElementById('model').options.length === 1")
    explanation = "{lambda: 1, logprob_pema: -1, logprob_plm: -1, decided_by: 'pema', top_pema: [], top_plm: []}"
    await page.evaluate(
        f"document.getElementById('pema').append(tokenOf('<img src=x onerror=alert(1)>', {explanation}))"
    )
    assert await page.locator("#pema img").count() == 0
