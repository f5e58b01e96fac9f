"""The editor in a real browser: reads the workflows, opens one from the template browser, runs it, shows the result."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.live_hosts import VERSIONS, server
from tools import browser

pytestmark = [pytest.mark.host, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
SCREENSHOTS = ROOT / "out"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def report(version):
    """Run the whole visit once; each test below looks at one thing that the user would have seen."""
    lack = browser.missing()
    if lack:
        (pytest.fail if os.environ.get("CLEARSR_REQUIRE_BROWSER") else pytest.skip)(lack)
    live = server(version)
    SCREENSHOTS.mkdir(exist_ok=True)
    screenshot = SCREENSHOTS / f"editor_{version}.png"
    screenshot.unlink(missing_ok=True)
    command = [browser.node(), "editor.mjs", live.client.url, browser.chromium(), str(FOLDER), str(screenshot)]
    done = subprocess.run(command, cwd=browser.FOLDER, capture_output=True, text=True, encoding="utf-8", timeout=580)
    assert done.stdout.strip(), done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "screenshot": screenshot, "log": live.log_tail()}


def test_the_visit_went_through_without_an_error_of_the_page(report):
    assert "failure" not in report, report["failure"]
    assert not [error for error in report["pageErrors"] if "ClearSR" in error or "clearsr" in error]


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_makes_of_a_workflow_what_its_api_twin_says(report, name):
    expected = json.loads((FOLDER / "api" / f"{name}.json").read_text("utf-8"))
    found = report["api"][name]
    assert {node_id: node["class_type"] for node_id, node in found.items()} == {
        node_id: node["class_type"] for node_id, node in expected.items()
    }
    for node_id, node in expected.items():
        assert found[node_id]["inputs"] == node["inputs"], node["class_type"]
        assert found[node_id]["_meta"]["title"] == node["_meta"]["title"]


def test_run_ends_in_success(report):
    assert report["outcome"][0] == "execution_success", report["log"]


def test_the_result_is_shown_at_four_times_the_size(report, version):
    width, height = Image.open(server(version).base / "input" / "example.png").size
    assert report["pictures"] == {kind: [4 * width, 4 * height] for kind in ("SaveImage", "PreviewImage")}


def test_a_screenshot_was_taken(report):
    picture = Image.open(report["screenshot"]).convert("RGB").resize((90, 50))
    assert len(picture.getcolors(90 * 50)) > 50, "the page is blank"
