"""Models of random numbers: exact sizes, the same numbers from one seed, files that training and ComfyUI take."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig

from clearsr_core import checkpoint
from clearsr_core import config as core_config
from clearsr_core.config import BaseConfig
from clearsr_core.fingerprint import SAME, fingerprint_distance, unet_fingerprint
from training import clearsr_file, full_size
from training.base_model import BaseModel
from training.clip_vision import ClipImagePrompt
from training.full_size import FILES, FullSizeSettings, Sizes, make
from training.openclip import TextSizes
from training.single_file import SPREAD, UNET

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "clearsr_x4_sd21.json"
TINY = BaseConfig((32, 32, 32, 32), 16, 16, (32, 32, 32, 32), 1)
VISION = CLIPVisionConfig(
    hidden_size=160,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=16,
)
SIZES = Sizes(TINY, TextSizes(vocabulary=40, tokens=9, width=16, layers=3), VISION, 4)


@pytest.fixture
def tiny_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny base stand for SD 2.1-base: its ClearSR file carries no base, but the base's fingerprint."""
    for module in (core_config, clearsr_file, full_size):
        monkeypatch.setattr(module, "SD21_NETWORKS", TINY)
    load = BaseModel.from_single_file
    monkeypatch.setattr(full_size.BaseModel, "load", lambda path: load(path, TINY))


def content(path: Path) -> tuple[dict, bytes]:
    """Return header and numbers of a file; safetensors writes its notes in any order."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def test_full_size_is_what_the_paper_and_stable_diffusion_have() -> None:
    """To the last number; and 865.9 + 375.1 + 232.4 M, as the documents say."""
    count = full_size.parameters(Sizes())
    assert count == {
        "UNet": 865_910_724,
        "VAE": 83_653_863,
        "text encoder": 354_032_640,
        "DPM": 375_096_730,
        "SPM": 232_440_320,
        "decoder LoRA": 1_800_192,
        "encoder LoRA": 1_477_168,
        "CLIP vision": 632_076_800,
    }
    total = sum(full_size.expected_bytes(Sizes()).values())
    assert total == pytest.approx(6.31e9, rel=1e-3)


def test_the_files_have_the_names_that_the_shipped_workflow_asks_for() -> None:
    nodes = json.loads(WORKFLOW.read_text(encoding="utf-8")).values()
    asked = {
        (node["class_type"], value) for node in nodes for value in node["inputs"].values() if isinstance(value, str)
    }
    for part, kind in (
        ("base", "CheckpointLoaderSimple"),
        ("clearsr", "ClearSRLoader"),
        ("clip_vision", "CLIPVisionLoader"),
    ):
        assert (kind, Path(FILES[part]).name) in asked


def test_a_seed_is_a_set_of_files(tiny_is_the_base: None, tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        make(FullSizeSettings(tmp_path / name, seed=seed), SIZES)
    for file in FILES.values():
        first, again, other = (content(tmp_path / name / file) for name in ("first", "again", "other"))
        assert first == again and first != other, file
    listed = sorted(path.name for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert listed == sorted([*(Path(file).name for file in FILES.values()), "clearsr-sd21.md"])


def test_the_files_are_taken_and_belong_together(tiny_is_the_base: None, tmp_path: Path) -> None:
    make(FullSizeSettings(tmp_path), SIZES)
    base = BaseModel.from_single_file(tmp_path / FILES["base"], TINY)
    stored = checkpoint.read(tmp_path / FILES["clearsr"])
    assert stored.config.base is None and not stored.config.image_encoder and stored.config.prompt_mode == "pooled"
    assert torch.equal(stored.tensors["null_text"][""], base.null_text)
    distance = fingerprint_distance(stored.config.base_fingerprint, unet_fingerprint(base.unet.state_dict()))
    assert distance is not None and distance < SAME
    # An untrained model would not show that control, window attention and LoRA reach the picture.
    for part in ("dpm", "spm", "unet_lora", "vae_lora"):
        assert all(value.any() for name, value in stored.tensors[part].items() if value.ndim > 1), part
    assert "not trained" in stored.training["note"]
    clip = ClipImagePrompt.load(tmp_path / FILES["clip_vision"], patch=False, context_dim=16)
    assert clip(torch.rand(1, 3, 20, 30)).isfinite().all()
    assert load_file(tmp_path / FILES["base"])[UNET + SPREAD].dtype == torch.float16


def test_only_a_v_prediction_base_looks_like_one() -> None:
    for asked in (False, True):
        bias = full_size.base_tensors(SIZES, 0, v_prediction=asked)[UNET + SPREAD]
        assert (float(bias.float().std(unbiased=False)) > 0.09) == asked


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"parts": ("vae",)}, "--parts=vae: give some of base, clearsr, clip_vision"),
        ({"parts": ()}, "--parts=: give some of"),
        ({"parts": ("clearsr",)}, "needs its base, and .* is not there: add base"),
    ],
)
def test_what_cannot_be_made_is_told(tmp_path: Path, settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(FullSizeSettings(tmp_path, **settings), SIZES)
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILES["clip_vision"]
    path.parent.mkdir()
    path.write_bytes(b"the real one")
    assert full_size.main([f"--out={tmp_path}", "--parts=clip_vision"]) == 1
    assert "is there already: delete it, or give another --out" in caplog.text
    assert path.read_bytes() == b"the real one"


def test_a_full_disk_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**10, 0, 6 * 10**9))
    assert full_size.main([f"--out={tmp_path}"]) == 1
    assert "6.3 GB are needed, 6.0 GB are free on that disk" in caplog.text
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_of_a_write_that_fails(
    tiny_is_the_base: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_tensors: dict, path: Path, _notes: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(full_size, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        make(FullSizeSettings(tmp_path, parts=("clip_vision",)), SIZES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
