"""Each shipped workflow fits the live schema of every supported ComfyUI, in both forms; the self-contained one runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.live_hosts import VERSIONS, object_info, server
from tools.demo import only_node
from tools.hosts import NEWEST
from tools.make_locales import TARGET, definitions
from tools.make_workflows import api_form, editor_form, inputs_of, options_of, widget_names
from tools.server import PACK_FOLDER
from tools.terminal import ToolError
from tools.workflow_graphs import GRAPHS

pytestmark = pytest.mark.host

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(GRAPHS)
# Inputs that name a file: which files there are is the user's business.
FILES = {"ckpt_name", "clip_name", "checkpoint", "image", "model_name"}


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def prompt(name):
    return read(FOLDER / "api" / f"{name}.json")


@pytest.fixture
def workflow(name):
    return read(FOLDER / f"{name}.json")


def problems(prompt: dict, schema: dict) -> list[str]:
    """List everything in an API-format workflow that this server would not take."""
    found = []
    for node_id, node in prompt.items():
        kind = node["class_type"]
        if kind not in schema:
            found.append(f"{node_id}: no class {kind}")
            continue
        inputs = inputs_of(schema[kind])
        required = schema[kind]["input"].get("required", {})
        found += [f"{node_id} {kind}: {key} is missing" for key in required if key not in node["inputs"]]
        for key, value in node["inputs"].items():
            where = f"{node_id} {kind}.{key}"
            if key not in inputs:
                found.append(f"{where}: no such input")
            elif isinstance(value, list):
                source = prompt.get(value[0])
                outputs = schema[source["class_type"]]["output"] if source else []
                if value[1] >= len(outputs) or outputs[value[1]] != inputs[key][0]:
                    found.append(f"{where}: linked to {value}, which gives {outputs}")
            elif key in widget_names(inputs):
                found += [f"{where}: {text}" for text in value_problems(key, value, inputs[key])]
    return found


def value_problems(key: str, value: object, spec: list) -> list[str]:
    """Compare a widget's value with its type, choices and limits."""
    kind, options = spec[0], options_of(spec)
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None:
        return [] if key in FILES or value in choices else [f"{value!r} is not one of {choices}"]
    types = {"INT": int, "FLOAT": int | float, "STRING": str, "BOOLEAN": bool}
    if not isinstance(value, types[kind]) or (kind in ("INT", "FLOAT") and isinstance(value, bool)):
        return [f"{value!r} is no {kind}"]
    if kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return [f"{value} is outside {options['min']} to {options['max']}"]
    return []


def test_folder_and_graphs_hold_the_same_workflows():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == NAMES


def test_files_are_what_their_description_makes(name, prompt, workflow):
    """Nobody edits the files by hand: `make workflows` writes both, by the schema of the oldest supported ComfyUI."""
    schema = object_info(VERSIONS[0])
    assert api_form(GRAPHS[name], schema) == prompt
    assert editor_form(GRAPHS[name], schema) == workflow


def test_api_form_fits_the_live_schema(prompt, schema):
    assert problems(prompt, schema) == []


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("steps", 0, "outside"),
        ("steps", 2.5, "is no INT"),
        ("scheduler", "no_such", "is not one of"),
        ("lr_latent", ["1", 0], "linked to"),
        ("strength", 1.0, "no such input"),
    ],
)
def test_a_workflow_that_does_not_fit_is_found(schema, key, value, text):
    prompt = copy.deepcopy(read(FOLDER / "api" / "clearsr_x4.json"))
    only_node(prompt, "ClearSRLSAKSampler")[1][key] = value
    assert any(text in problem for problem in problems(prompt, schema))


def test_a_graph_with_an_unknown_input_cannot_be_written(schema):
    graph = copy.deepcopy(GRAPHS["clearsr_x4"])
    graph.nodes["sampler"].inputs["no_such"] = 1
    with pytest.raises(ToolError, match="no input no_such"):
        api_form(graph, schema)


def test_nodes_and_notes_do_not_overlap_and_lie_in_their_frames(workflow):
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    for number, (left, top, width, height) in enumerate(boxes):
        for other_left, other_top, other_width, other_height in boxes[:number]:
            apart = left >= other_left + other_width or other_left >= left + width
            assert apart or top - 30 >= other_top + other_height or other_top - 30 >= top + height
        frames = [group["bounding"] for group in workflow["groups"]]
        assert any(
            x <= left and y <= top - 30 and left + width <= x + w and top + height <= y + h for x, y, w, h in frames
        )


def test_the_template_browser_is_offered_every_workflow_and_its_picture(client):
    offered = client.json("/workflow_templates")[PACK_FOLDER]
    assert sorted(offered) == NAMES
    for template in offered:
        assert json.loads(client.request(f"/api/workflow_templates/{PACK_FOLDER}/{template}.json"))["nodes"]


def test_the_self_contained_workflow_runs_to_a_picture_of_four_times_the_size(version, client, tmp_path):
    prompt = read(FOLDER / "api" / "clearsr_x4.json")
    only_node(prompt, "ClearSRLSAKSampler")[1]["steps"] = 3
    run = client.run(prompt)
    picture = run.outputs[only_node(prompt, "SaveImage")[0]]["images"][0]
    result = Image.open(client.download(picture, tmp_path / "result.png"))
    source = Image.open(server(version).base / "input" / "example.png")
    assert result.size == (4 * source.width, 4 * source.height)
    kinds = [kind for _, kind, _ in run.events]
    assert "progress" in kinds or "progress_state" in kinds
    assert kinds[-1] == "execution_success"


def test_a_missing_checkpoint_is_refused_with_node_and_input(client):
    prompt = read(FOLDER / "api" / "clearsr_x4.json")
    only_node(prompt, "ClearSRLoader")[1]["checkpoint"] = "no_such_file.safetensors"
    with pytest.raises(ToolError, match=r"ClearSRLoader \(2\).*no_such_file"):
        client.run(prompt)


def test_the_english_texts_are_those_of_the_nodes():
    """A translator starts from the file; the editor shows it in place of the schema's own texts."""
    assert read(TARGET) == definitions(object_info(NEWEST)), "run `python -m tools.make_locales`"
