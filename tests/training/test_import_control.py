"""Importing DiffBIR's control network: what comes out, and the words for every file that is something else."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.config import BaseConfig, ClearSRConfig, ControlConfig, RecommendedSampling
from clearsr_core.control import ClearSRControl
from clearsr_core.key_maps import controlnet_prefixes, rename, unet_to_host, vae_to_host
from clearsr_core.shapes import checkpoint_shapes
from training import base_files, import_control
from training.base_files import BaseFacts
from training.base_model import BaseModel
from training.single_file import TEXT, UNET, VAE

ROOT = Path(__file__).resolve().parents[2]
TINY = BaseConfig((32, 32, 32, 32), 16, 16, (32, 32, 32, 32), 1)
PLAIN = ControlConfig(
    widths=TINY.unet_widths, head_channels=16, context_dim=16, window_attention=False, use_spm=False, control_input="lr"
)


def control_network(seed: int = 0, context_dim: int = 16) -> dict[str, Tensor]:
    """Random weights of a tiny DiffBIR control network, in its own names."""
    control = dataclasses.replace(PLAIN, context_dim=context_dim)
    generator = torch.Generator().manual_seed(seed)
    prefixes = controlnet_prefixes(control)
    names = {rename(name, prefixes): value.shape for name, value in ClearSRControl(control).dpm.state_dict().items()}  # type: ignore[union-attr]
    names["input_blocks.0.0.weight"] = torch.Size((32, 8, 3, 3))
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-contained ClearSR file, whose base is small enough for a test."""
    model = BaseModel.random(TINY, seed=3)
    control = dataclasses.replace(PLAIN, use_spm=True)
    config = ClearSRConfig(control=control, lora_rank=0, prompt_mode="null", base=TINY)
    shapes = checkpoint_shapes(config)
    tensors = {part: {name: torch.zeros(shape) for name, shape in shapes[part].items()} for part in ("dpm", "spm")}
    tensors |= {"null_text": {"": model.null_text}}
    tensors |= {"base.unet": unet_to_host(model.unet.state_dict(), control)}
    tensors |= {"base.vae": vae_to_host(model.vae.state_dict(), TINY)}
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    checkpoint.write(path, checkpoint.Checkpoint(config, {}, tensors))
    return path


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    return control_network()


def run(tmp_path: Path, base: Path, stored: Any, name: str = "v2.pth", *more: str) -> tuple[int, Path]:
    """Store `stored` as the user's file and import it; return the exit status and where the result is to be."""
    source, out = tmp_path / name, tmp_path / "out" / "imported.safetensors"
    if isinstance(stored, bytes):
        source.write_bytes(stored)
    elif source.suffix == ".safetensors":
        save_file(stored, source)
    else:
        torch.save(stored, source)
    return import_control.main([f"--weights={source}", f"--base={base}", f"--out={out}", "--from=diffbir", *more]), out


def is_imported(path: Path, weights: dict[str, Tensor]) -> None:
    stored = checkpoint.read(path)
    prefixes, dpm = controlnet_prefixes(stored.config.control), stored.tensors["dpm"]
    joint = torch.cat([dpm["conv_in.weight"], dpm["conv_in_lr.weight"]], dim=1)
    assert torch.equal(joint, weights["input_blocks.0.0.weight"])
    assert torch.equal(dpm["conv_in.bias"], weights["input_blocks.0.0.bias"]) and not dpm["conv_in_lr.bias"].any()
    others = {name: value for name, value in dpm.items() if not name.startswith("conv_in")}
    assert len(others) == len(weights) - 2
    for name, value in others.items():
        source = weights[rename(name, prefixes)]
        assert value.dtype == source.dtype and torch.equal(value, source), name


def test_the_weights_are_renamed_and_nothing_else(tmp_path: Path, base: Path, weights: dict[str, Tensor]) -> None:
    status, out = run(tmp_path, base, weights)
    assert status == 0
    is_imported(out, weights)
    stored, given = checkpoint.read(out), checkpoint.read(base)
    control = stored.config.control
    assert (control.control_input, control.control_text, control.use_spm, control.window_attention) == (
        "lr+xt",
        "conditioning",
        False,
        False,
    )
    assert (stored.config.lora_rank, stored.config.prompt_mode, stored.config.anchor) == (0, "null", "lr_encoder")
    assert stored.config.recommended == RecommendedSampling("linspace", 50, 4.0, "noise", text=True)
    for part in ("null_text", "base.unet", "base.vae"):
        assert all(torch.equal(value, given.tensors[part][name]) for name, value in stored.tensors[part].items())


def test_the_file_and_its_card_say_whose_weights_they_are(
    tmp_path: Path, base: Path, weights: dict[str, Tensor]
) -> None:
    _, out = run(tmp_path, base, weights)
    notes = checkpoint.read_header(out).training
    assert "DiffBIR's control network (v2, Apache-2.0)" in notes["about"] and "not a ClearSR model" in notes["about"]
    digest = notes["imported"]["sha256"]
    assert len(digest) == 64 and notes["imported"]["licence"] == "Apache-2.0" and notes["imported"]["file"] == "v2.pth"
    card = out.with_suffix(".md").read_text(encoding="utf-8")
    for text in (
        digest,
        "It is not a ClearSR model",
        "Apache-2.0",
        "restore_sd21_diffbir",
        "text of each conditioning",
    ):
        assert text in card
    assert "to be filled in" not in card and "clearsr_x4" not in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["v2.pth", "v2.safetensors"])
def test_precision_is_kept(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], dtype: torch.dtype, name: str
) -> None:
    weights = {key: value.to(dtype) for key, value in weights.items()}
    status, out = run(tmp_path, base, weights, name)
    assert status == 0
    is_imported(out, weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {f"control_model.{key}": value for key, value in weights.items()},
        lambda weights: {f"module.control_model.{key}": value for key, value in weights.items()},
        lambda weights: {"state_dict": weights, "epoch": 3, "hyper_parameters": {"rate": 1e-4}},
        lambda weights: {
            "state_dict": {f"control_model.{key}": value for key, value in weights.items()}
            | {f"model.diffusion_model.{key}": value for key, value in weights.items()}
            | {"preprocess_model.conv_first.weight": torch.zeros(1), "cond_encoder.encoder.x": torch.zeros(1)}
        },
    ],
)
def test_wrappers_of_training_are_taken_off(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], wrap: Callable[[dict], dict]
) -> None:
    status, out = run(tmp_path, base, wrap(weights), "epoch.ckpt")
    assert status == 0
    is_imported(out, weights)


def test_the_format_of_old_versions_of_torch_is_read(tmp_path: Path, base: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    status, out = run(tmp_path, base, (tmp_path / "old.pth").read_bytes(), "v2.pth")
    assert status == 0
    is_imported(out, weights)


@pytest.mark.parametrize("version", ["v1_general", "v1_face"])
def test_version_1_is_recommended_without_guidance(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], version: str
) -> None:
    status, out = run(tmp_path, base, weights, "v1.pth", f"--version={version}")
    assert status == 0
    recommended = checkpoint.read_header(out).config.recommended
    assert recommended is not None and (recommended.cfg, recommended.text) == (1.0, False)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def with_more(**more: tuple[int, ...]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {key.replace("__", "."): torch.zeros(shape) for key, shape in more.items()}


TEXT_KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "SD 1.x": (lambda w: w | {TEXT_KEY: torch.zeros(32, 768)}, "of Stable Diffusion 1.x (its text is 768 wide)"),
    "SDXL": (lambda w: w | {TEXT_KEY: torch.zeros(32, 2048)}, "of SDXL (its text is 2048 wide)"),
    "another width": (lambda w: w | {TEXT_KEY: torch.zeros(32, 24)}, "of another model (its text is 24 wide)"),
    "RGB hint": (with_more(input_hint_block__0__weight=(16, 3, 3, 3)), "a ControlNet that reads an RGB image"),
    "SD 1.5 ControlNet": (
        lambda w: {
            "controlnet_cond_embedding.conv_in.weight": torch.zeros(1),
            "a.attn2.to_k.weight": torch.zeros(9, 768),
        },
        "a ControlNet of Stable Diffusion 1.x that reads an RGB image; ComfyUI's Load ControlNet Model opens those",
    ),
    "x_t alone": (lambda w: w | {"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}, "reads x_t alone"),
    "StableSR": (with_more(structcond_stage_model__input_blocks__0=(1,)), "StableSR"),
    "StableSR, UNet": (with_more(model__diffusion_model__input_blocks__1__0__spade__mlp=(1,)), "StableSR"),
    "SeeSR": (with_more(down_blocks__0__image_attentions__0__norm__weight=(1,)), "SeeSR"),
    "PASD": (with_more(up_blocks__0__pixel_attentions__0__norm__weight=(1,)), "PASD"),
    "PASD, ControlNet": (with_more(controlnet_cond_embedding__to_rgbs__0__weight=(1,)), "PASD"),
    "CCSR": (with_more(cond_encoder__encoder__conv_in__weight=(1,)), "CCSR"),
    "LoRA": (lambda w: {"unet.up_blocks.0.lora_A.weight": torch.zeros(1)}, "a LoRA, not a control network"),
    "SD checkpoint": (
        lambda w: {f"model.diffusion_model.{key}": value for key, value in w.items() if "zero" not in key},
        "no control network in DiffBIR's layout",
    ),
    "a weight less": (without("middle_block_out.0.weight"), "lacks 1 weights (middle_block_out.0.weight)"),
    "a weight more": (with_more(input_blocks__99__0__weight=(1,)), "has 1 more (input_blocks.99.0.weight)"),
    "another shape": (
        lambda w: w | {"zero_convs.3.0.weight": torch.zeros(64, 32, 1, 1)},
        "holds zero_convs.3.0.weight with the shape (64, 32, 1, 1); for this base model it must be (32, 32, 1, 1)",
    ),
    "whole numbers": (
        lambda w: w | {"zero_convs.3.0.weight": torch.zeros(32, 32, 1, 1, dtype=torch.int8)},
        "holds zero_convs.3.0.weight as",
    ),
}


@pytest.mark.parametrize("name", ["v2.pth", "v2.safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused_by_their_kind(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, text = OTHERS[kind]
    status, out = run(tmp_path, base, change(weights), name)
    assert status == 1 and text in caplog.messages[-1]
    assert not out.exists() and not out.with_suffix(".md").exists()


def test_nan_is_refused(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    weights["zero_convs.3.0.weight"][0, 0] = float("nan")
    status, out = run(tmp_path, base, weights)
    assert status == 1 and "NaN or infinite numbers in 1 weights (dpm.controlnet_down_blocks.3.weight)" in caplog.text
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "version"),
    [("DiffBIR_v2.1.pt", "v2"), ("v2_1.safetensors", "v2"), ("v21.pth", "v2"), ("v2.pth", "v2.1")],
)
def test_version_2_1_is_refused_by_its_name_or_the_users_word(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], name: str, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, out = run(tmp_path, base, weights, name, f"--version={version}")
    assert status == 1 and "DiffBIR v2.1 predicts v" in caplog.text and not out.exists()


class Malicious:
    """Runs a command when it is unpickled by a loader that lets it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("hidden", ["whole", "beside the weights"])
def test_no_code_of_a_pickle_runs(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture, old: bool, hidden: str
) -> None:
    mark = tmp_path / "it_ran"
    code = Malicious(f"touch {mark}")
    stored = code if hidden == "whole" else {**weights, "callback": code}
    status, out = run(tmp_path, base, pickle.dumps(stored, protocol=2) if old else saved(stored))
    assert status == 1 and not out.exists() and not mark.exists()
    assert "nothing of it was run" in caplog.text
    if not old:
        assert f"holds code ({os.system.__module__}.system)" in caplog.text
    # The mark would be there if it had been read without care.
    pickle.loads(pickle.dumps(code))
    assert mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("name", ["v2.pth", "v2.safetensors"])
def test_a_file_that_is_cut_off_is_refused(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], name: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    content = save(weights) if name.endswith(".safetensors") else saved(weights)
    status, out = run(tmp_path, base, content[: int(share * len(content))], name)
    assert status == 1 and not out.exists()
    assert any(word in caplog.messages[-1] for word in ("cut off", "empty", "damaged")), caplog.messages[-1]


def saved(value: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
        (b"nothing that anybody knows", "damaged, or a pickle of more than weights"),
        (saved([1, 2, 3]), "holds list instead of a table of weights"),
    ],
)
def test_what_is_no_file_of_weights_is_named(
    tmp_path: Path, base: Path, content: bytes, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, out = run(tmp_path, base, content)
    assert status == 1 and text in caplog.messages[-1] and not out.exists()


def test_a_clearsr_file_is_refused(tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    status, _ = run(tmp_path, base, base.read_bytes(), "v2.safetensors")
    assert status == 1 and "is a ClearSR file already" in caplog.text


def test_a_file_that_is_there_is_kept(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out" / "imported.safetensors"
    out.parent.mkdir()
    out.write_bytes(b"mine")
    status, _ = run(tmp_path, base, weights)
    assert status == 1 and f"--out={out} exists" in caplog.text and out.read_bytes() == b"mine"


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path,
    base: Path,
    weights: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    status, out = run(tmp_path, base, weights)
    assert status == 1 and "Free some space" in caplog.text and list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--version=v3", "give one of v2, v1_general, v1_face"),
        ("--out=file.pth", "end in .safetensors"),
        ("--base=nowhere", "there is no such file or folder"),
        ("--from=seesr", "--from takes diffbir"),
        ("--weights=nowhere.pth", "there is no such file"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, base: Path, weights: dict[str, Tensor], argument: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, _ = run(tmp_path, base, weights, "v2.pth", argument)
    assert status == 1 and text in caplog.messages[-1]


# ---- the base model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in diffusers' layout, tiny, and taken for Stable Diffusion 2.1 in these tests."""
    path = tmp_path_factory.mktemp("folder")
    BaseModel.random(TINY, seed=3).save(path)
    return path


def test_facts_of_a_folder_are_those_of_the_model(folder: Path) -> None:
    facts, model = BaseFacts.read(folder), BaseModel.from_folder(folder)
    assert facts.networks == TINY and torch.equal(facts.null_text, model.null_text)
    assert facts.fingerprint == base_files.unet_fingerprint(model.unet.state_dict()) and facts.contained is None


@pytest.mark.parametrize("shards", [1, 3])
def test_facts_of_a_folder_in_several_files(folder: Path, tmp_path: Path, shards: int) -> None:
    """diffusers splits large networks."""
    model = BaseModel.from_folder(folder)
    model.unet.save_pretrained(tmp_path / "unet", max_shard_size="10GB" if shards == 1 else "4MB")
    assert (len(list((tmp_path / "unet").glob("*.safetensors"))) > 1) == (shards > 1)
    for part in ("vae", base_files.NULL_TEXT_FILE):
        os.symlink(folder / part, tmp_path / part)
    assert BaseFacts.read(tmp_path).fingerprint == BaseFacts.read(folder).fingerprint


def test_a_base_of_another_size_is_refused(
    tmp_path: Path, folder: Path, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    status, _ = run(tmp_path, folder, weights)
    assert status == 1 and "networks of other sizes than Stable Diffusion 2.1-base" in caplog.text


@pytest.mark.parametrize(
    ("scheduler", "text"),
    [
        ({"prediction_type": "v_prediction"}, "a model with v_prediction"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_a_base_for_another_prediction_or_schedule_is_refused(
    folder: Path,
    tmp_path: Path,
    weights: dict[str, Tensor],
    scheduler: dict,
    text: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for part in ("unet", "vae", base_files.NULL_TEXT_FILE):
        os.symlink(folder / part, tmp_path / part)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    status, _ = run(tmp_path, tmp_path, weights)
    assert status == 1 and text in caplog.text


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"ztsnr": torch.zeros(0)}, "zero terminal SNR"),
        ({"alphas_cumprod": torch.linspace(0.999, 0.0, 1000)}, "zero terminal SNR"),
        ({"alphas_cumprod": torch.linspace(0.999, 0.0047, 1000)}, None),
    ],
)
def test_a_single_file_with_zero_terminal_snr_is_refused(
    tmp_path: Path, more: dict[str, Tensor], text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BaseModel.random(TINY, seed=3)
    control = ControlConfig(widths=TINY.unet_widths, head_channels=16, context_dim=16)
    tensors = {UNET + name: value for name, value in unet_to_host(model.unet.state_dict(), control).items()}
    tensors |= {VAE + name: value for name, value in vae_to_host(model.vae.state_dict(), TINY).items()}
    tensors |= {TEXT + "ln_final.weight": torch.ones(16)}
    path = tmp_path / "base.safetensors"
    save_file({name: value.detach().clone().contiguous() for name, value in {**tensors, **more}.items()}, path)
    monkeypatch.setattr(base_files, "networks_of", lambda _source: TINY)
    monkeypatch.setattr(base_files, "text_file_null_text", lambda _path, text: text["ln_final.weight"][None])
    if text is not None:
        with pytest.raises(ValueError, match=text):
            BaseFacts.read(path)
        return
    facts = BaseFacts.read(path)
    assert facts.fingerprint == base_files.unet_fingerprint(model.unet.state_dict())
    assert torch.equal(facts.null_text, torch.ones(1, 16))


# ---- the Python of a ComfyUI ----------------------------------------------------------------------------------------


def test_it_runs_as_a_script_where_only_comfyui_s_packages_are(
    tmp_path: Path, base: Path, weights: dict[str, Tensor]
) -> None:
    """ComfyUI brings torch, safetensors and transformers; its portable Python does not look into the current folder."""
    torch.save(weights, tmp_path / "v2.pth")
    command = f"""
import importlib.util, runpy, sys
blocked = ("diffusers", "peft", "accelerate", "timm", "matplotlib", "pyiqa")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in blocked else found(name, package)

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["import_control.py", "--weights=v2.pth", "--base={base}", "--out=imported.safetensors"]
runpy.run_path(r"{ROOT / "training" / "import_control.py"}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-I", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    is_imported(tmp_path / "imported.safetensors", weights)
