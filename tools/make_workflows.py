"""Write workflows/*.json, the editor's form, and workflows/api/*.json, the HTTP API's form, from one description.

    python -m tools.make_workflows

Both forms come from tools/workflow_graphs.py and the schema of a live ComfyUI, so they cannot disagree, and a changed
node shows up as an error here. Positions come from the order of the columns; nobody moves boxes by hand.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from . import environment, hosts
from .environment import ROOT
from .server import Prompt, running
from .terminal import ToolError, run_command, say
from .workflow_graphs import GRAPHS, Graph, Link, Node

FOLDER = ROOT / "workflows"
_TITLE, _ROW, _WIDGET, _MARGIN = 30, 20, 24, 16
_COLUMN_GAP, _ROW_GAP, _GROUP_PADDING = 60, 60, 20
_TEXT_HEIGHT = 90
_GROUP_COLOURS = ("#5f7f8c", "#3f789e", "#88aa88", "#b58b2a")
# Frontends draw a picture into these, below the widgets.
_PICTURE_HEIGHTS = {"LoadImage": 320, "PreviewImage": 460, "SaveImage": 460}
_SEED_NAMES = {"seed", "noise_seed"}


def widget_names(inputs: dict[str, list[Any]]) -> list[str]:
    """Return the inputs that the editor shows as widgets rather than as sockets only."""
    plain = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    return [name for name, spec in inputs.items() if isinstance(spec[0], list) or spec[0] in plain]


def inputs_of(info: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node as the server describes them, in the editor's order: required, then optional."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def options_of(spec: list[Any]) -> dict[str, Any]:
    """Return the options of an input: default, limits, tooltip."""
    return spec[1] if len(spec) > 1 else {}


def default_of(spec: list[Any]) -> object:
    """Return what the editor puts into a new node."""
    options = options_of(spec)
    if "default" in options:
        return options["default"]
    kind = spec[0]
    choices = kind if isinstance(kind, list) else options.get("options", [])
    if choices:
        return choices[0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(str(kind))


def _checked(name: str, node: Node, schema: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the inputs of a node's class; raise if the class or an input that the graph sets is not there."""
    if node.kind not in schema:
        raise ToolError(f"{name}: ComfyUI knows no node {node.kind}")
    inputs = inputs_of(schema[node.kind])
    unknown = [key for key in node.inputs if key not in inputs]
    if unknown:
        raise ToolError(f"{name}: {node.kind} has no input {', '.join(unknown)} (it has {', '.join(inputs)})")
    return inputs


def api_form(graph: Graph, schema: dict[str, Any]) -> Prompt:
    """Return the workflow as POST /prompt takes it; widgets that the graph leaves alone get their defaults."""
    ids = graph.ids()
    prompt: Prompt = {}
    for name, node in graph.nodes.items():
        inputs = _checked(name, node, schema)
        values: dict[str, object] = {}
        for key in inputs:
            value = node.inputs.get(key)
            if isinstance(value, Link):
                values[key] = [str(ids[value.node]), value.output]
            elif key in node.inputs:
                values[key] = value
            elif key in widget_names(inputs):
                values[key] = default_of(inputs[key])
        title = node.title or schema[node.kind]["display_name"]
        prompt[str(ids[name])] = {"inputs": values, "class_type": node.kind, "_meta": {"title": title}}
    return prompt


def _widget_values(node: Node, inputs: dict[str, list[Any]]) -> list[object]:
    """List the values of a node's widgets by position, with the ones that the editor adds by itself."""
    values: list[object] = []
    for key in widget_names(inputs):
        values.append(node.inputs[key] if key in node.inputs else default_of(inputs[key]))
        options = options_of(inputs[key])
        if options.get("control_after_generate") or (key in _SEED_NAMES and inputs[key][0] == "INT"):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
    return values


def _height(node: Node, info: dict[str, Any], inputs: dict[str, list[Any]]) -> int:
    """Estimate how high the editor draws a node."""
    widgets = _widget_values(node, inputs)
    sockets = len(inputs) - len(widget_names(inputs))
    rows = max(sockets, len(info["output"]))
    texts = sum(bool(options_of(spec).get("multiline")) for spec in inputs.values())
    height = rows * _ROW + len(widgets) * _WIDGET + texts * _TEXT_HEIGHT + _MARGIN
    return height + _PICTURE_HEIGHTS.get(node.kind, 0)


def _layout(
    graph: Graph, schema: dict[str, Any]
) -> tuple[dict[str, tuple[list[int], list[int]]], list[dict[str, object]]]:
    """Place everything: position and size by name, and a frame around each column."""
    places: dict[str, tuple[list[int], list[int]]] = {}
    groups: list[dict[str, object]] = []
    left = 0
    for number, column in enumerate(graph.columns):
        top = 0
        for name in column.names:
            if name in graph.notes:
                width, height = column.width, graph.notes[name].height
            else:
                info = schema[graph.nodes[name].kind]
                width, height = column.width, _height(graph.nodes[name], info, inputs_of(info))
            places[name] = ([left, top], [width, height])
            top += height + _ROW_GAP
        frame_top = -_TITLE - 2 * _GROUP_PADDING - 10
        groups.append(
            {
                "id": number + 1,
                "title": column.title,
                "bounding": [
                    left - _GROUP_PADDING,
                    frame_top,
                    column.width + 2 * _GROUP_PADDING,
                    top - _ROW_GAP + _GROUP_PADDING - frame_top,
                ],
                "color": _GROUP_COLOURS[number % len(_GROUP_COLOURS)],
                "font_size": 24,
                "flags": {},
            }
        )
        left += column.width + 2 * _GROUP_PADDING + _COLUMN_GAP
    return places, groups


def editor_form(graph: Graph, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the workflow as the editor saves it: boxes with places, links, notes, frames."""
    ids = graph.ids()
    places, groups = _layout(graph, schema)
    links: list[list[object]] = []
    boxes: list[dict[str, Any]] = []
    for order, (name, node) in enumerate(graph.nodes.items()):
        inputs, info = _checked(name, node, schema), schema[node.kind]
        sockets: list[dict[str, Any]] = []
        optional = info["input"].get("optional", {})
        widgets = widget_names(inputs)
        for key in [key for key in inputs if key not in widgets]:
            value = node.inputs.get(key)
            link = None
            if isinstance(value, Link):
                link = len(links) + 1
                links.append([link, ids[value.node], value.output, ids[name], len(sockets), inputs[key][0]])
            socket = {"name": key, "type": inputs[key][0], "link": link}
            sockets.append({**socket, "shape": 7} if key in optional else socket)
        outputs = zip(info["output_name"], info["output"], strict=True)
        position, size = places[name]
        boxes.append(
            {
                "id": ids[name],
                "type": node.kind,
                "pos": position,
                "size": size,
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": sockets,
                "outputs": [{"name": label, "type": kind, "links": []} for label, kind in outputs],
                "properties": {"Node name for S&R": node.kind},
                "widgets_values": _widget_values(node, inputs),
                **({"title": node.title} if node.title else {}),
            }
        )
    by_id = {box["id"]: box for box in boxes}
    for link in links:
        by_id[link[1]]["outputs"][link[2]]["links"].append(link[0])
    for name, note in graph.notes.items():
        position, size = places[name]
        boxes.append(
            {
                "id": ids[name],
                "type": "MarkdownNote",
                "pos": position,
                "size": size,
                "flags": {},
                "order": len(boxes),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [note.text],
                "title": note.title,
                "color": "#432",
                "bgcolor": "#653",
            }
        )
    return {
        "last_node_id": len(boxes),
        "last_link_id": len(links),
        "nodes": boxes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": {"scale": 0.75, "offset": [120, 160]}},
        "version": 0.4,
    }


def main(arguments: list[str]) -> int:
    """Write both forms of every graph."""
    if arguments:
        raise ToolError(f"make_workflows takes no options, got {' '.join(arguments)}")
    host = hosts.ensure(hosts.VERSIONS[0], environment.ensure("demo"))
    say(f"reading the nodes of ComfyUI {host.version}")
    with tempfile.TemporaryDirectory() as folder, running(host, Path(folder) / "comfyui") as server:
        schema = server.client.json("/object_info")
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    for name, graph in GRAPHS.items():
        for path, form in (
            (FOLDER / f"{name}.json", editor_form(graph, schema)),
            (FOLDER / "api" / f"{name}.json", api_form(graph, schema)),
        ):
            path.write_text(json.dumps(form, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            say(f"wrote {path.relative_to(ROOT).as_posix()}")
    return 0


if __name__ == "__main__":
    run_command(main)
