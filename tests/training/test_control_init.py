"""Warm start: DPM begins as an imported control network, the rest as always; what does not fit is refused in words."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint
from clearsr_core.config import BaseConfig, ClearSRConfig, ControlConfig
from clearsr_core.control import ClearSRControl
from clearsr_core.key_maps import controlnet_prefixes, rename
from clearsr_core.shapes import checkpoint_shapes
from training import config, export, import_control, provenance, rehearsal, restore, snapshot, train
from training.base_files import random_networks
from training.clearsr import ClearSRSettings, ClearSRStage
from training.clearsr_model import ClearSRModel

FIRST = "input_blocks.0.0.weight"  # of x_t and the condition, in DiffBIR's names
WIDTHS = (32, 32, 32, 32)
RUN = {
    "steps": 1,
    "learning_rate": 1e-4,
    "out": "nowhere",
    "base": "random",
    "data": "synthetic",
    "base_widths": WIDTHS,
    "crops": 0,
    "crop": 64,
    "batch": 1,
}
IMPORTED = {"control_input": "lr+xt", "control_text": "conditioning", "window_attention": False, "use_spm": False}
NOTES = {"imported": {"network": "DiffBIR v2", "licence": "Apache-2.0"}}


def settings(**changes: object) -> ClearSRSettings:
    return config.build(ClearSRSettings, {**RUN, **changes})


def control_of(base: BaseConfig, **changes: object) -> ControlConfig:
    sizes = {"widths": base.unet_widths, "head_channels": base.head_channels}
    sizes |= {"context_dim": base.context_dim, "norm_groups": base.norm_groups}
    return ControlConfig(**{**sizes, **IMPORTED, **changes})  # type: ignore[arg-type]


def write(path: Path, base: BaseConfig, control: ControlConfig, rank: int = 0, seed: int = 0) -> Path:
    """Write a file of random weights, as training.import_control lays it out unless `control` says otherwise."""
    stored = ClearSRConfig(control=control, base=base, lora_rank=rank, prompt_mode="null")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        part: {
            name: 0.05 * torch.randn([77 if side < 0 else side for side in shape], generator=generator)
            for name, shape in shapes.items()
        }
        for part, shapes in checkpoint_shapes(stored).items()
    }
    checkpoint.write(path, Checkpoint(stored, NOTES, tensors))
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = random_networks(WIDTHS)
    return write(tmp_path_factory.mktemp("imported") / "imported.safetensors", base, control_of(base))


@pytest.mark.parametrize("control_input", ["lr", "lr+xt"])
def test_dpm_alone_begins_with_the_imported_weights(imported: Path, control_input: str) -> None:
    fresh = ClearSRStage(settings(control_input=control_input)).trainable()
    warm = ClearSRStage(settings(control_input=control_input, control_init=imported)).trainable()
    assert warm.keys() == fresh.keys()
    theirs = {f"dpm.{name}" for name in checkpoint.read(imported).tensors["dpm"]}
    for name, value in warm.items():
        assert torch.equal(value, fresh[name]) == (name not in theirs), name


@pytest.mark.parametrize("control_input", ["lr", "lr+xt"])
def test_the_first_control_is_that_of_the_imported_network_with_the_empty_prompt(
    imported: Path, control_input: str
) -> None:
    """With control_input lr it is that of x_t = 0, the mean of the noise."""
    model = ClearSRStage(settings(control_input=control_input, control_init=imported)).model
    stored = checkpoint.read(imported)
    network = ClearSRControl(stored.config.control)
    network.load_state_dict({f"dpm.{name}": value for name, value in stored.tensors["dpm"].items()})
    x_lr, x_t = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    inputs = (x_lr, torch.tensor([300]), model.null_text[None])
    with torch.no_grad():
        expected = network(*inputs, x_t if control_input == "lr+xt" else torch.zeros_like(x_t))
        found = model.control(*inputs, x_t)
    for a, b in zip((*found.down, found.mid), (*expected.down, expected.mid), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def another_width(folder: Path) -> Path:
    base = random_networks((32, 32, 64, 64))
    return write(folder / "wider.safetensors", base, control_of(base))


def other_control(**changes: object) -> Callable[[Path], Path]:
    base = random_networks(WIDTHS)
    return lambda folder: write(folder / "other.safetensors", base, control_of(base, **changes))


def trained(folder: Path) -> Path:
    """A file as training makes it: with LoRAs."""
    base = random_networks(WIDTHS)
    return write(folder / "trained.safetensors", base, control_of(base), rank=4)


def not_clearsr(folder: Path) -> Path:
    save_file({"model.diffusion_model.x": torch.zeros(1)}, folder / "sd.safetensors")
    return folder / "sd.safetensors"


def pickled(folder: Path) -> Path:
    torch.save({"x": torch.zeros(1)}, folder / "v2.pth")
    return folder / "v2.pth"


def cut_off(folder: Path) -> Path:
    base = random_networks(WIDTHS)
    path = write(folder / "cut.safetensors", base, control_of(base))
    path.write_bytes(path.read_bytes()[:-100])
    return path


def without_dpm(folder: Path) -> Path:
    return other_control(use_dpm=False, use_spm=True, control_text="null")(folder)


REFUSED: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "another width": (another_width, [], "it has widths (32, 32, 64, 64) instead of (32, 32, 32, 32)"),
    "reads x_lr alone": (other_control(control_text="null", control_input="lr"), [], "control_input 'lr'"),
    "no DPM": (without_dpm, [], "use_dpm False"),
    "windows": (other_control(window_attention=True), [], "window_attention True"),
    "trained": (trained, [], "lora_rank 4"),
    "no ClearSR file": (not_clearsr, [], "is not a ClearSR file; python -m training.import_control makes one"),
    "DiffBIR's own file": (pickled, [], "python -m training.import_control makes one"),
    "cut off": (cut_off, [], "is cut off"),
    "nothing": (lambda folder: folder / "none.safetensors", [], "there is no such file"),
    "a folder": (lambda folder: folder, [], "there is no such file"),
    "with init": (other_control(), ["--init=somewhere"], "give one of the two"),
    "run without DPM": (other_control(), ["--use_dpm=false"], "--use_dpm=false leaves DPM out"),
}


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_encoded(
    tmp_path: Path, kind: str, dry: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make, more, said = REFUSED[kind]
    command = ["--preset=smoke", "--init=", "--base=random", "--threads=1", "--crops=2", *more]
    command += [f"--cache={tmp_path}/latents.safetensors"]
    command += [f"--control_init={make(tmp_path)}", f"--out={tmp_path}/run", *(["--dry-run"] if dry else [])]
    assert train.main([*command, f"--base_widths={','.join(map(str, WIDTHS))}"]) == 1
    assert said in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]
    assert not (tmp_path / "latents.safetensors").exists()
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_run_with_a_warm_start_can_be_planned(imported: Path) -> None:
    assert "dpm.conv_in.weight" in rehearsal.shapes_of(settings(control_init=imported)).trainable()


def test_nan_in_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = other_control()(tmp_path)
    stored = checkpoint.read(path)
    stored.tensors["dpm"]["conv_in.bias"][0] = float("nan")
    monkeypatch.setattr(checkpoint, "_check_finite", lambda *_: None)
    checkpoint.write(path, stored)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="NaN or infinite"):
        ClearSRStage(settings(control_init=path))


# ---- a whole run on the base of a small file -------------------------------------------------------------------------


def on_the_chain(chain: Path, tmp_path: Path, file: Path, *more: str) -> list[str]:
    command = ["--preset=nano", f"--data={chain}/photographs", f"--base={chain}/base", f"--control_init={file}"]
    command += ["--crops=4", "--crop=64", "--batch=1", "--threads=1", "--validate_every=0", "--ema=0"]
    command += ["--learning_rate=1e-12"]  # what comes out is what went in, in half precision
    return [*command, f"--cache={chain}/latents.safetensors", f"--out={tmp_path}/run", *more]


def imported_for_the_chain(chain: Path, tmp_path: Path, seed: int = 0) -> tuple[Path, dict[str, Tensor]]:
    """Import random weights in DiffBIR's layout; return the file, and the weights."""
    nano = chain / "nano" / "clearsr.safetensors"
    control = control_of(checkpoint.read_header(nano).config.networks)
    prefixes, generator = controlnet_prefixes(control), torch.Generator().manual_seed(seed)
    plain = ClearSRControl(dataclasses.replace(control, control_input="lr", control_text="null"))
    shapes = {rename(name.removeprefix("dpm."), prefixes): value.shape for name, value in plain.state_dict().items()}
    shapes[FIRST] = torch.Size((shapes[FIRST][0], 8, 3, 3))
    weights = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(weights, tmp_path / f"weights-{seed}.pth")
    file = tmp_path / f"diffbir-{seed}.safetensors"
    assert import_control.main([f"--weights={tmp_path}/weights-{seed}.pth", f"--base={nano}", f"--out={file}"]) == 0
    return file, weights


def test_a_run_says_what_it_was_begun_from_and_goes_on_with_that_alone(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From DiffBIR's layout to a trained file, by the two commands that the preset names."""
    (file, weights), (other, _) = (imported_for_the_chain(chain, tmp_path, seed) for seed in (0, 1))
    digest = provenance.sha256(file)
    assert train.main(on_the_chain(chain, tmp_path, file, "--steps=1")) == 0
    dpm = checkpoint.read(tmp_path / "run" / "clearsr.safetensors").tensors["dpm"]
    of_x_lr = weights[FIRST].split(4, dim=1)[1]
    torch.testing.assert_close(dpm["conv_in.weight"].float(), of_x_lr, rtol=1e-3, atol=1e-4)
    stored = checkpoint.read_header(tmp_path / "run" / "clearsr.safetensors")
    assert stored.config.control.control_text == "null"
    assert stored.config.control.use_spm and stored.config.control.window_attention and stored.config.lora_rank
    assert stored.training["given"]["file for --control_init"] == digest
    origin = {"name": file.name, "part": "DPM", "network": "DiffBIR v2", "licence": "Apache-2.0", "sha256": digest}
    assert stored.training["begun_from"] == origin
    card = (tmp_path / "run" / "clearsr.md").read_text(encoding="utf-8")
    assert f"| Begun from | DPM of {file.name} (DiffBIR v2, Apache-2.0), SHA-256 {digest[:12]}... |" in card

    assert train.main(on_the_chain(chain, tmp_path, other, "--steps=2")) == 1
    assert "holds a run on another file for --control_init" in caplog.messages[-1]
    without = [argument for argument in on_the_chain(chain, tmp_path, file) if "control_init" not in argument]
    assert train.main([*without, "--steps=2"]) == 1
    assert "holds a run on another file for --control_init" in caplog.messages[-1]

    renamed = tmp_path / "renamed.safetensors"
    shutil.copyfile(file, renamed)
    assert train.main(on_the_chain(chain, tmp_path, renamed, "--steps=2")) == 0
    out = tmp_path / "again.safetensors"
    assert export.main([f"--run={tmp_path}/run", f"--base={chain}/base", f"--out={out}"]) == 0
    assert checkpoint.read_header(out).training["begun_from"] == origin
    assert snapshot.read_notes(tmp_path / "run" / "state_00000002.safetensors").begun_from == origin


def test_commands_take_an_imported_file_with_one_warning(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without LoRA, SPM and windows; their pictures are not those of the workflow, and the warning says why."""
    file, _ = imported_for_the_chain(chain, tmp_path)
    (tmp_path / "lr").mkdir()
    Image.new("RGB", (16, 16), (200, 40, 90)).save(tmp_path / "lr" / "a.png")
    assert restore.main([f"--checkpoint={file}", f"--lr={tmp_path}/lr", f"--out={tmp_path}/sr", "--steps=1"]) == 0
    assert Image.open(tmp_path / "sr" / "a.png").size == (64, 64)
    assert len([text for text in caplog.messages if "empty prompt" in text and "no guidance" in text]) == 1
    model = ClearSRModel.from_checkpoint(file)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    assert set(model.trainable()) == {f"dpm.{name}" for name in checkpoint.read(file).tensors["dpm"]}
