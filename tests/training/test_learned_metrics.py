"""Learned measures: what is missing is named, and nothing is fetched."""

from __future__ import annotations

import importlib
import importlib.util
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import evaluate, learned_metrics
from training.learned_metrics import SOURCES, LearnedMetricMissingError, LearnedMetrics

# A package of the same face: it reads its file, prints, draws random numbers, and would fetch what it lacks.
FAKE = """
import socket
import torch
from pathlib import Path

FILES = {"lpips": "LPIPS_v0.1_alex-df73285e.pth", "musiq": "musiq_koniq_ckpt-e95806b9.pth"}

def create_metric(name, device):
    print("Loading pretrained model", name)
    torch.randn(3)
    text = (Path(torch.hub.get_dir()) / "pyiqa" / FILES[name]).read_text()
    if text == "damaged":
        socket.create_connection(("example.org", 443))
    if name == "lpips":
        return lambda image, reference: (image - reference).abs().mean().reshape(1, 1)
    return lambda image: 100 * image.mean().reshape(1, 1)
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fake pyiqa, and a hub folder with the files of lpips and musiq."""
    package = tmp_path / "packages" / "pyiqa"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    folder = tmp_path / "hub"
    for name in ("lpips", "musiq"):
        for file in SOURCES[name].files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("sound", encoding="utf-8")
    before = torch.hub.get_dir()
    yield folder
    torch.hub.set_dir(before)
    sys.modules.pop("pyiqa", None)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (192, 192, 3), dtype=np.uint8)


def test_measures_with_and_without_a_reference(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    learned = LearnedMetrics(("lpips", "musiq"), hub, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr().out == ""  # the table goes there
    image, reference = pixels(0), pixels(1)
    values = learned.measure(image, reference)
    assert values["lpips"] == pytest.approx(np.abs(image / 255.0 - reference / 255.0).mean(), abs=1e-5)
    assert values["musiq"] == pytest.approx(100 * image.mean() / 255.0, abs=1e-3)
    assert learned.measure(image, None).keys() == {"musiq"}


def test_missing_files_are_all_named_before_the_package_is_asked(hub: Path) -> None:
    with pytest.raises(LearnedMetricMissingError) as caught:
        LearnedMetrics(("lpips", "dists", "clipiqa"), hub, "cpu")
    message = str(caught.value)
    for file in (*SOURCES["dists"].files, *SOURCES["clipiqa"].files):
        assert str(hub / file) in message
    assert "LPIPS_v0.1" not in message
    assert "Nothing is downloaded" in message


def test_maniqa_needs_its_transformer_in_the_cache_of_hugging_face(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    found: list[object] = [None]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: found[0])
    assert "vit_base_patch8_224" in learned_metrics._missing_files("maniqa", hub)[-1]
    found[0] = "/cache/model.safetensors"
    assert learned_metrics._missing_files("maniqa", hub) == [str(hub / "pyiqa" / "MANIQA_PIPAL-ae6d356b.pth")]


def test_package_that_goes_for_the_network_is_stopped(hub: Path) -> None:
    (hub / SOURCES["musiq"].files[0]).write_text("damaged", encoding="utf-8")
    with pytest.raises(LearnedMetricMissingError, match=r"cannot make musiq \(OSError: no connection is opened here"):
        LearnedMetrics(("musiq",), hub, "cpu")
    with socket.create_server(("127.0.0.1", 0)) as server:  # and others may connect again
        socket.create_connection(server.getsockname()).close()


def test_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learned_metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LearnedMetricMissingError, match=r"pip install --no-deps -r training/requirements-pyiqa\.txt"):
        LearnedMetrics(("lpips",), Path(), "cpu")
    assert (Path(learned_metrics.__file__).parents[1] / learned_metrics.REQUIREMENTS).is_file()


def test_unknown_measure_and_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(LearnedMetricMissingError, match="--pyiqa=fid is not known here: lpips, dists, musiq"):
        LearnedMetrics(("fid",), Path(), "cpu")
    with pytest.raises(LearnedMetricMissingError, match="missing is not a folder"):
        LearnedMetrics(("lpips",), tmp_path / "missing", "cpu")


def test_evaluation_shows_learned_measures_beside_the_others(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, side in (("hr", 192), ("lr", 48)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels(side)[:side, :side]).save(tmp_path / folder / "a.png")
    arguments = [f"--hr={tmp_path}/hr", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out", "--efflite=false"]
    assert evaluate.main([*arguments, "--pyiqa=lpips,musiq", f"--pyiqa_weights={hub}"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["Method", "PSNR (dB) ↑", "SSIM ↑", "LPIPS ↓", "NIQE ↓", "MUSIQ ↑", "Sharpness"]
    assert rows[2][0] == "HR"
    assert [rows[2][column] == "–" for column in (1, 3, 5)] == [True, True, False]


def test_evaluation_without_the_weights_ends_in_one_sentence(
    hub: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, side in (("hr", 192), ("lr", 48)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels(side)[:side, :side]).save(tmp_path / folder / "a.png")
    arguments = [f"--hr={tmp_path}/hr", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out", "--efflite=false"]
    assert evaluate.main([*arguments, "--pyiqa=clipiqa", f"--pyiqa_weights={hub}"]) == 1
    assert "RN50.pt" in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="training/requirements-pyiqa.txt not installed")
@pytest.mark.parametrize("name", SOURCES)
def test_file_names_are_those_of_the_real_package(name: str) -> None:
    configs = importlib.import_module("pyiqa.default_model_configs").DEFAULT_CONFIGS
    assert SOURCES[name].name in configs
    assert (configs[SOURCES[name].name]["metric_mode"] == "FR") == SOURCES[name].reference
    module = importlib.import_module(f"pyiqa.archs.{name}_arch")
    urls = " ".join(getattr(module, "default_model_urls", {}).values())
    for file in SOURCES[name].files:
        if file.startswith("pyiqa/"):
            assert Path(file).name in urls
    from pyiqa.utils import download_util

    assert Path(download_util.DEFAULT_CACHE_DIR).name == "pyiqa"
