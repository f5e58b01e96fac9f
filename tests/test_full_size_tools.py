"""The commands about full size: what they read out of a run, a picture and an estimate, without ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import full_size, hosts, memory_estimate, server
from tools.demo import only_node, picture_work
from tools.hosts import Host
from tools.server import Run
from tools.terminal import ToolError

PROMPT = {
    "1": {"class_type": "A", "inputs": {}, "_meta": {"title": "LR Latent Encode"}},
    "2": {"class_type": "B", "inputs": {}, "_meta": {"title": "LSA KSampler"}},
}


def event(second: float, kind: str, **data: object) -> tuple[float, str, dict]:
    return second, kind, data


RUN = Run(
    outputs={},
    events=[
        event(1.0, "executing", node="1"),
        event(3.0, "executing", node="2"),
        event(5.0, "progress", node="2", value=0.5, max=3),  # within a step, of tiles
        event(10.0, "progress", node="2", value=1, max=3),
        event(14.0, "progress", node="2", value=2, max=3),
        event(18.0, "progress", node="2", value=3, max=3),
        event(19.0, "executing", node=None),
        event(19.5, "execution_success"),
    ],
    seconds=19.5,
)


def test_stage_1_is_left_out_of_a_workflow_that_has_one() -> None:
    for name in full_size.WORKFLOWS:
        prompt = full_size.shipped(name)
        kinds = {node["class_type"] for node in prompt.values()}
        assert not kinds & {"UpscaleModelLoader", "ImageUpscaleWithModel"}
        encode = only_node(prompt, "ClearSRLREncode")[1]
        assert encode["image"] == [only_node(prompt, "LoadImage")[0], 0] and encode["scale"] == 4.0
        links = [value[0] for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert set(links) <= prompt.keys()


def test_an_imported_file_that_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"python -m training\.import_control"):
        full_size.ensure_models(full_size.shipped("restore_sd21_diffbir"), tmp_path, Path(sys.executable))


def test_time_goes_to_the_node_that_ran() -> None:
    assert full_size.node_seconds(RUN, PROMPT) == {"LR Latent Encode": 2.0, "LSA KSampler": 16.0}


def test_a_step_is_timed_without_the_first_which_loads() -> None:
    assert full_size.step_seconds(RUN, "2") == pytest.approx(4.0)
    single = Run({}, [event(10.0, "progress", node="2", value=1, max=1)], 11.0)
    assert full_size.step_seconds(single, "2") is None


def test_a_picture_must_have_the_exact_size_and_show_something(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    for colour, size, sentence in (((0, 0, 0), (64, 48), "shows nothing"), ((9, 0, 0), (64, 47), "not \\(64, 48\\)")):
        Image.new("RGB", size, colour).save(picture)
        described = json.loads(picture_work(Path(sys.executable), "describe", picture))
        with pytest.raises(ToolError, match=sentence):
            full_size.check_picture(described, (16, 12))
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(picture)
    described = json.loads(picture_work(Path(sys.executable), "describe", picture))
    assert full_size.check_picture(described, (16, 12)) == (64, 48)


def test_only_missing_models_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names in the workflow as it ships."""
    asked = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(full_size.subprocess, "run", lambda command, **_options: asked.append(command) or done)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "v2-1_512-ema-pruned.safetensors").touch()
    full_size.ensure_models(full_size.shipped("clearsr_x4_sd21"), tmp_path, Path("python"))
    assert asked == [["python", "-m", "training.full_size", f"--out={tmp_path}", "--parts=clearsr,clip_vision"]]
    for name in ("clearsr/clearsr-sd21", "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.safetensors").touch()
    full_size.ensure_models(full_size.shipped("clearsr_x4_sd21"), tmp_path, Path("python"))
    assert len(asked) == 1
    (tmp_path / "clearsr" / "clearsr-sd21.safetensors").unlink()
    done.returncode = 1
    with pytest.raises(ToolError, match="no models"):
        full_size.ensure_models(full_size.shipped("clearsr_x4_sd21"), tmp_path, Path("python"))


def test_a_server_shows_a_folder_of_models_and_removing_it_leaves_them(tmp_path: Path) -> None:
    models, base = tmp_path / "models", tmp_path / "base"
    file = models / "clearsr" / "file.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    (models / "README.md").touch()
    live = server.Server(Host("0.30.0", tmp_path, Path(sys.executable), None), base, models=models)
    live.prepare()
    assert (base / "models" / "clearsr" / "file.safetensors").read_bytes() == b"weights"
    (base / "models" / "loras").mkdir()
    server.remove_links(base)
    assert file.read_bytes() == b"weights"
    assert not (base / "models" / "clearsr").exists() and live.peak_memory() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_peak_memory_is_that_of_the_process(tmp_path: Path) -> None:
    live = server.Server(Host("0.30.0", tmp_path, Path(sys.executable), None), tmp_path)
    program = "x = bytearray(200_000_000); del x; print('ready', flush=True); input()"
    live._process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert live._process.stdout is not None and live._process.stdout.readline() == b"ready\n"
        peak = live.peak_memory()
        assert peak is not None and 200e6 < peak < 400e6
    finally:
        live.stop()


def test_the_estimate_says_what_fits_and_what_is_cut() -> None:
    gib = 2**30
    rows = [
        {"side": 512, "call": 512, "activations": 0.1 * gib, "encode": 1.0 * gib, "decode": 2.0 * gib},
        {"side": 4096, "call": 768, "activations": 3.0 * gib, "encode": 1.0 * gib, "decode": 60.0 * gib},
    ]
    whole = {"unet": 2 * gib, "control": gib, "vae": gib, "least": 1.25 * gib, "kept": 0.5 * gib, "rows": rows}
    *_, small, large = memory_estimate.table(whole)
    assert small == "| 512² | 512² | 0.10 | 4.25 | 2.50 | 3.50 |"  # 3 of weights, the least for computing
    assert large == "| 4096² | 768² | 3.00 | 6.50 | 2.50 | 61.5: in tiles |"


@pytest.mark.parametrize("arguments", [["--size=4"], ["--steps=0"], ["--image=nowhere.png"]])
def test_wrong_numbers_are_told_before_anything_is_made(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "for_demo", lambda *_: pytest.fail("too late"))
    with pytest.raises(ToolError):
        full_size.main(arguments)
