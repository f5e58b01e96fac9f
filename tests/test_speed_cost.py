"""What faster settings cost: how a setting changes the workflow, and whose seconds are counted."""

from __future__ import annotations

import json

import pytest

from tools import speed_cost
from tools.demo import WORKFLOW, only_node
from tools.server import Run
from tools.terminal import ToolError

SHIPPED = json.loads(WORKFLOW.read_text(encoding="utf-8"))


def test_a_setting_changes_inputs_and_leaves_the_workflow_alone() -> None:
    before = json.dumps(SHIPPED)
    prompt = speed_cost.changed(SHIPPED, speed_cost.SETTINGS["every5"])
    assert only_node(prompt, speed_cost.CONTROL)[1]["control_every"] == 5
    assert only_node(prompt, speed_cost.SAMPLER)[1]["steps"] == 50
    assert json.dumps(SHIPPED) == before


def test_a_node_that_the_workflow_lacks_comes_between_control_and_sampler() -> None:
    prompt = speed_cost.changed(SHIPPED, speed_cost.SETTINGS["lazycache02"])
    name, cache = only_node(prompt, "LazyCache")
    assert cache["model"][0] == only_node(prompt, speed_cost.CONTROL)[0]
    assert only_node(prompt, speed_cost.SAMPLER)[1]["model"] == [name, 0]
    assert cache["reuse_threshold"] == 0.2


@pytest.mark.parametrize("name", speed_cost.SETTINGS)
def test_every_setting_names_inputs_that_the_nodes_have(name) -> None:
    for kind, inputs in speed_cost.SETTINGS[name].items():
        if kind != "LazyCache":
            assert set(inputs) <= set(only_node(SHIPPED, kind)[1])


def test_only_the_samplers_seconds_count() -> None:
    events = [(0.0, "executing", {"node": "4"}), (1.0, "executing", {"node": "5"}), (1.5, "progress", {})]
    events += [(4.0, "executing", {"node": "6"}), (9.0, "executing", {"node": None})]
    assert speed_cost.sampling_seconds(Run({}, events), "5") == 3.0
    with pytest.raises(ToolError, match="did not run the sampler"):
        speed_cost.sampling_seconds(Run({}, events), "7")


def test_ratios_are_picture_by_picture(tmp_path) -> None:
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for name, seconds in {"paper": (10.0, 20.0), "fast": (4.0, 8.0)}.items():
        (tmp_path / name).mkdir()
        for picture, taken in zip(pictures, seconds, strict=True):
            (tmp_path / name / f"{picture.stem}.json").write_text(json.dumps(taken))
    table = speed_cost.times_table(tmp_path, ["paper", "fast"], pictures, "paper")
    assert "| fast | 6.00 | 0.400 |" in table


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ToolError, match="unknown setting 'fastest'"):
        speed_cost.main(["--hr=.", "--lr=.", "--only=fastest"])
