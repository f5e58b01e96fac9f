"""Real servers and the host's memory: everything freed between two runs, and each of its options for memory."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.live_hosts import VERSIONS, example_picture
from tools import hosts
from tools.demo import only_node
from tools.server import Server, remove_links

pytestmark = pytest.mark.host

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "clearsr_x4.json"
NEED_A_CARD = ("--lowvram", "--novram", "--highvram")  # ComfyUI takes none of them beside --cpu


@pytest.fixture
def prompt():
    """The self-contained workflow, two steps."""
    prompt = json.loads(WORKFLOW.read_text("utf-8"))
    only_node(prompt, "ClearSRLSAKSampler")[1]["steps"] = 2
    return prompt


def upscaled(client, prompt, tmp_path):
    """Run it: the picture, and the nodes whose results the server still had."""
    run = client.run(prompt)
    image = run.outputs[only_node(prompt, "SaveImage")[0]]["images"][0]
    cached = {node for _, kind, data in run.events if kind == "execution_cached" for node in data["nodes"]}
    with Image.open(client.download(image, tmp_path / "result.png")) as picture:
        return np.asarray(picture.convert("RGB")), cached


def test_the_same_picture_after_everything_was_freed(client, prompt, tmp_path):
    """What the editor's buttons Unload Models and Free Cache ask for."""
    sampler = only_node(prompt, "ClearSRLSAKSampler")[0]
    first, _ = upscaled(client, prompt, tmp_path)
    client.request("/free", json.dumps({"unload_models": True, "free_memory": True}).encode())
    time.sleep(1.5)  # the server frees between two prompts, when it looks at its flags
    second, cached = upscaled(client, prompt, tmp_path)
    assert sampler not in cached
    assert np.array_equal(first, second)


@pytest.mark.large
@pytest.mark.parametrize("option", [*NEED_A_CARD, "--cpu", "--disable-smart-memory", "--cache-none"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_picture_in_each_state_of_memory(version, option, prompt, tmp_path):
    """A server of its own with that option makes the picture, twice; COMFYUI_PATH may name one with a card."""
    host = hosts.chosen() or hosts.ensure(version, Path(sys.executable))
    if option in NEED_A_CARD and hosts.must_run_on_cpu(host):
        pytest.skip(f"{option} needs a graphics card: name a ComfyUI that has one with COMFYUI_PATH")
    server = Server(host, tmp_path / "comfyui")
    server.prepare()
    example_picture(server.base / "input" / "example.png")
    try:
        server.start((option,))
        pictures = []
        for seed in (1, 2, 1):
            only_node(prompt, "ClearSRLSAKSampler")[1]["seed"] = seed
            pictures.append(upscaled(server.client, prompt, tmp_path)[0])
    finally:
        server.stop()
        remove_links(server.base)
        shutil.rmtree(server.base, ignore_errors=True)
    assert pictures[0].std() > 5 and not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
