"""The page during whole runs, in a real Chromium: what it shows, what can be told on it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import function_error, throttle
from tests.browser import browser, console, screenshot
from tests.conftest import Names
from tests.runs.test_hands import TOKEN, Told, _options
from tests.runs.test_http import total
from tests.sink import Topics, failed, numbered, of_partition, poison, serve

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>" + "A" * 10_000


def _until(driver: Any, holds: Callable[[], Any], secs: float = 30) -> float:
    """Wait for something on the page; how long it took."""
    from selenium.common.exceptions import StaleElementReferenceException

    started = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - started
        except StaleElementReferenceException:
            pass
        assert time.monotonic() - started < secs, driver.find_element("tag name", "body").text
        time.sleep(0.05)


def _text(driver: Any, selector: str) -> str:
    return str(
        driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')",
            selector,
        )
    )


def _press(driver: Any, label: str) -> None:
    driver.execute_script(
        'document.querySelector(`button[aria-label="${arguments[0]}"]`).click()', label
    )


@pytest.mark.slow
def test_the_page_during_a_run(broker: KafkaBroker, names: Names, tmp_path: Path) -> None:
    """A halted partition, one that is throttled, and errors of a hostile type are seen within 2 s;
    skip and resume work from it; the console stays empty."""
    topics = Topics(broker, names, partitions=4, count=20, **_options(tmp_path))
    faults = [
        throttle(times=None, retry_after_secs=5, when=of_partition(2)),
        function_error(HOSTILE, HOSTILE, times=1, when=of_partition(3)),
    ]
    with (
        serve(poison("order 1/5"), faults=faults) as server,
        topics.start(
            server,
            on_error="fail",
            max_retries=1,
            error_topic=topics.errors,
            batch_size=5,
            bisect_on_error=True,
            page_show="messages",
        ) as sink,
        browser() as driver,
    ):
        run = Told(sink)
        driver.get(run.url)
        place = topics.source
        run.until(lambda each: each["partitions"][("halted",)] == 1)
        took = _until(driver, lambda: "halted 1 of 4" in _text(driver, "#state"))
        assert took < 2 + 1, "a halt is to be seen within 2 s"
        _until(driver, lambda: f"{place}-1 at offset 5" in _text(driver, "#halts"))
        rows = _text(driver, "#partitions tbody").splitlines()
        assert rows[0].startswith(f"{place}-1\thalted")
        _until(driver, lambda: "throttle" in _text(driver, "#partitions tbody"))
        assert "<script>" in _text(driver, "#errors")
        assert not _text(driver, "#said")

        before = driver.execute_script("return document.querySelectorAll('.uplot').length")
        assert before == 8
        label = "return document.querySelector('#plots [role=img]').getAttribute('aria-label')"
        first = driver.execute_script(label)
        broker.produce(place, numbered(4, 40, "more"))
        _until(driver, lambda: driver.execute_script(label) != first)

        driver.find_element("id", "token").send_keys("wrong")
        driver.find_element("css selector", "#token-form button").click()
        driver.find_element("css selector", "[data-action=pause]").click()
        _until(driver, lambda: "not the run's" in _text(driver, "#said"))
        # A refusal is one of the few things a browser itself says something about.
        assert all("401" in line for line in console(driver)), console(driver)
        driver.find_element("id", "token").send_keys(TOKEN)
        driver.find_element("css selector", "#token-form button").click()
        driver.find_element("css selector", "[data-action=pause]").click()
        _until(driver, lambda: _text(driver, "#state") == "paused")
        driver.find_element("css selector", "[data-action=resume]").click()
        _until(driver, lambda: _text(driver, "#state") == "halted 1 of 4")

        driver.execute_script("window.confirm = () => true")
        _press(driver, f"Skip the record of {place}-1")
        _until(driver, lambda: "written to the error topic" in _text(driver, "#said"))
        _until(driver, lambda: _text(driver, "#state") == "running")
        run.until(lambda each: total(each, "error_topic_records_total") == 1)
        driver.find_element("id", "filter").send_keys(f"{place}-3")
        shown = "return document.querySelectorAll('#partitions tbody tr').length"
        _until(driver, lambda: driver.execute_script(shown) == 1)

        assert driver.title != "taken"
        assert (
            driver.execute_script("return document.querySelectorAll('img, td script').length") == 0
        )
        assert driver.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        assert console(driver) == []
        _shots(run.url, tmp_path)
        sink.send(signal.SIGTERM)
        sink.wait()
    assert failed(broker, topics.errors) == [(place, 1, 5)]


def _shots(url: str, folder: Path) -> None:
    """At the widths of a phone and a desk, light and dark; nothing sticks out."""
    folder = Path(os.environ.get("SCREENSHOTS", folder))
    for width, dark in ((360, False), (360, True), (1400, False), (1400, True)):
        with browser(width, 900, dark) as driver:
            driver.get(url)
            _until(
                driver,
                lambda: driver.execute_script(
                    "return document.querySelectorAll('.uplot').length === 8"
                    " && document.querySelectorAll('#partitions tbody tr').length > 0"
                ),
            )
            wide = driver.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width, f"{wide} pixels wide at {width}"
            screenshot(driver, folder / f"page-{width}-{'dark' if dark else 'light'}.png")
            assert console(driver) == []


@pytest.mark.slow
def test_a_report_is_the_page_as_one_file(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """With its plots and tables, and nothing asked of anybody."""
    file = tmp_path / "run.html"
    topics = Topics(broker, names, partitions=2, count=30)
    with serve(poison("order 0/3"), faults=[function_error(HOSTILE, HOSTILE)]) as server:
        topics.run(server, code=None, report=file, bisect_on_error=True, batch_size=5)
    with browser() as driver:
        driver.get(file.as_uri())
        _until(driver, lambda: "halted" in _text(driver, "#state"))
        assert driver.execute_script("return document.querySelectorAll('.uplot').length") == 8
        asked = "return performance.getEntriesByType('resource').length"
        assert driver.execute_script(asked) == 0
        assert f"{topics.source}-0 at offset" in _text(driver, "#halts")
        assert json.dumps(topics.group)[1:-1] in _text(driver, "#title")
        assert not driver.find_element("id", "hands").is_displayed()
        assert driver.execute_script("return document.querySelectorAll('img').length") == 0
        screenshot(driver, Path(os.environ.get("SCREENSHOTS", tmp_path)) / "report.png")
        assert console(driver) == []
