"""The export: what was meant is what is in the file, a card lies beside it, and a run can be exported as it stands."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from clearsr_core import checkpoint
from clearsr_core.checkpoint import Checkpoint
from clearsr_core.config import SD21_NETWORKS, ClearSRConfig
from clearsr_core.merge import merged
from clearsr_core.shapes import checkpoint_shapes
from training import clearsr_model, export, model_card, restore, snapshot, train
from training.base_model import BaseModel
from training.clearsr_model import ClearSRModel


def arguments(chain: Path, out: Path, *more: str) -> list[str]:
    return [f"--run={chain}/nano", f"--base={chain}/base", f"--out={out}", *more]


def test_a_run_exported_afterwards_is_what_it_exported_itself(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "again.safetensors"
    assert export.main(arguments(chain, out, f"--data={chain}/photographs")) == 0
    itself, again = checkpoint.read(chain / "nano" / "clearsr.safetensors"), checkpoint.read(out)
    assert again.tensors.keys() == itself.tensors.keys()
    for part, table in itself.tensors.items():
        assert all(torch.equal(value, again.tensors[part][name]) for name, value in table.items()), part
    assert again.config.latent_rgb is not None
    assert again.config.control == itself.config.control
    assert again.training["photographs"] == 2
    assert again.training["weights"] == "averaged"
    assert "mean loss of the last steps" in again.training["metrics"]
    assert again.training["hardware"] == ""  # this machine need not be the one of the training
    assert itself.training["hardware"]


def test_averaged_weights_are_taken_where_there_are_some(chain: Path, tmp_path: Path) -> None:
    state = snapshot.read(chain / "nano" / "state_00000002.safetensors")
    for kind in ("ema", "model"):
        tensors = {name: value for name, value in state.tensors.items() if kind == "ema" or not name.startswith("ema.")}
        snapshot.write(tmp_path / kind, snapshot.TrainingState(2, tensors, state.settings))
        command = [f"--run={tmp_path / kind}", f"--base={chain}/base", f"--out={tmp_path / kind}.safetensors"]
        assert export.main(command) == 0
        found = checkpoint.read(tmp_path / f"{kind}.safetensors").tensors["dpm"]["conv_in.weight"]
        assert torch.equal(found, state.tensors[f"{kind}.dpm.conv_in.weight"].half())


def test_the_named_snapshot_is_exported_and_the_newest_otherwise(chain: Path, tmp_path: Path) -> None:
    settings = ["--preset=nano", f"--base={chain}/base", f"--cache={chain}/latents.safetensors", "--crops=4", "--ema=0"]
    command = [f"--data={chain}/photographs", "--steps=2", "--threads=1", "--crop=64", "--batch=1", "--warmup=0"]
    run = tmp_path / "run"
    assert train.main([*command, *settings, "--validate_every=1", "--snapshot_every=1", f"--out={run}"]) == 0
    export_command = [f"--run={run}", f"--base={chain}/base", f"--out={tmp_path}/out.safetensors"]
    for more, step in (([f"--snapshot={run}/state_00000001.safetensors"], 1), ([], 2)):
        assert export.main([*export_command, *more]) == 0
        training = checkpoint.read(tmp_path / "out.safetensors").training
        assert training["step"] == training["metrics"]["validation at step"] == step
        assert "psnr" in training["metrics"]["validation"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("--run={chain}/photographs", "holds no snapshot"),
        ("--run={chain}/autoencoder", "is no snapshot of the ClearSR stage"),
        ("--base={chain}/missing", "There is no file"),
        ("--base=random", "does not fit --base=random"),
        ("--out={tmp}/nano.ckpt", "end in .safetensors"),
        ("--snapshot={chain}/nano/state_00000009.safetensors", "cannot be read"),
        ("--snapshot={tmp}/state_00000002.safetensors", "is none of --run="),
    ],
)
def test_what_cannot_be_exported_is_told_in_a_sentence(
    chain: Path, tmp_path: Path, given: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    if given == "--base=random":  # small, but of other widths
        shutil.copytree(chain / "nano", tmp_path / "nano")
        path = tmp_path / "nano" / "state_00000002.safetensors"
        state = snapshot.read(path)
        snapshot.write(
            path.parent, snapshot.TrainingState(2, state.tensors, {**state.settings, "base_widths": [32, 32, 32, 32]})
        )
        chain = tmp_path
    command = arguments(chain, tmp_path / "out.safetensors", given.format(chain=chain, tmp=tmp_path))
    assert export.main(command) == 1
    assert sentence in caplog.text
    assert "\n" not in caplog.messages[-1]
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("damage", ["number", "dtype", "config", "training"])
def test_a_file_that_reads_back_otherwise_is_not_put_in_place(
    chain: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"the one before")
    write = checkpoint.write

    def damaged(path: Path, stored: Checkpoint) -> None:
        bias, config, training = stored.tensors["spm"]["conv_in.bias"].clone(), stored.config, stored.training
        if damage == "number":
            bias[0] += 1
        elif damage == "dtype":
            bias = bias.float()
        elif damage == "config":
            config = dataclasses.replace(config, anchor="plain")
        else:
            training = {}
        spm = stored.tensors["spm"] | {"conv_in.bias": bias}
        write(path, Checkpoint(config, training, stored.tensors | {"spm": spm}))

    monkeypatch.setattr(checkpoint, "write", damaged)
    assert export.main(arguments(chain, out)) == 1
    what = {"number": "spm.conv_in.bias", "dtype": "spm.conv_in.bias"}.get(damage, damage)
    assert f"{out} reads back other than it was written ({what}; 1 in all)" in caplog.text
    assert out.read_bytes() == b"the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors"]


def test_the_card_tells_what_the_file_is_and_how_it_was_made(chain: Path) -> None:
    text = (chain / "nano" / "clearsr.md").read_text(encoding="utf-8")
    stored = checkpoint.read(chain / "nano" / "clearsr.safetensors")
    spm = sum(value.numel() for value in stored.tensors["spm"].values())
    for expected in (
        "inside the file: a UNet of widths 32, 32, 64, 64",
        f"| SPM | {spm:,} |",
        "| Photographs | 2 (",
        "| Pairs drawn | 4 of 64 pixels |",
        f"torch {torch.__version__}",
        "DPM attends to x_lr in windows of 8, 4, 2, 1 tokens per level, with aligned relative bias.",
        "| validation psnr |",
        "| Licence | **to be filled in**",
        "Put `clearsr.safetensors` into `ComfyUI/models/clearsr`",
        'degradation = "paper"',
    ):
        assert expected in text
    assert str(chain) not in text


def test_the_card_of_a_file_without_a_base_says_what_to_connect(tmp_path: Path) -> None:
    config = ClearSRConfig(base_fingerprint="1:" + "0" * 60, prompt_mode="patch", clip_width=1280)
    text = model_card.card("sd21.safetensors", 10, Checkpoint(config, {}, {"null_text": {"": torch.zeros(77, 1024)}}))
    assert "Stable Diffusion 2.1-base, not inside; fingerprint `1:000" in text
    assert "Connect MODEL and VAE of Stable Diffusion 2.1-base" in text
    assert "Connect CLIP Vision Encode" in text
    assert "| Hardware | not recorded |" in text
    assert config.base is None
    assert SD21_NETWORKS.unet_widths == config.control.widths


def test_an_edited_card_is_kept_until_a_new_one_is_asked_for(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, card = tmp_path / "out.safetensors", tmp_path / "out.md"
    assert export.main(arguments(chain, out)) == 0
    written = card.read_bytes()
    assert export.main(arguments(chain, out)) == 0  # its own is replaced
    assert card.read_bytes() == written
    assert "edited by hand" not in caplog.text
    card.write_bytes(written.replace(b"**to be filled in**", b"CC BY 4.0", 1))
    assert export.main(arguments(chain, out)) == 0
    assert b"CC BY 4.0" in card.read_bytes()
    assert f"{card} was edited by hand and is kept as it is; give --overwrite_card=true" in caplog.text
    card.write_text("# My own card\n", encoding="utf-8")
    assert export.main(arguments(chain, out)) == 0
    assert card.read_text(encoding="utf-8") == "# My own card\n"
    assert export.main(arguments(chain, out, "--overwrite_card=true")) == 0
    assert card.read_bytes() == written


def test_a_card_that_cannot_be_written_leaves_the_one_before(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    assert export.main(arguments(chain, out)) == 0
    before = (tmp_path / "out.md").read_bytes()
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).suffix == ".md":
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(model_card.os, "replace", full)
    assert export.main(arguments(chain, out)) == 1
    assert (tmp_path / "out.md").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.md", "out.safetensors"]


def test_an_exported_run_restores_pictures(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert export.main(arguments(chain, out)) == 0
    (tmp_path / "lr").mkdir()
    Image.new("RGB", (16, 16), (200, 40, 90)).save(tmp_path / "lr" / "a.png")
    assert restore.main([f"--checkpoint={out}", f"--lr={tmp_path}/lr", f"--out={tmp_path}/sr", "--steps=1"]) == 0
    assert Image.open(tmp_path / "sr" / "a.png").size == (64, 64)


def test_a_run_that_goes_on_is_exported_up_to_the_half_line_of_its_log(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "nano", tmp_path / "nano")
    log = tmp_path / "nano" / "stats.jsonl"
    rows = log.read_text(encoding="utf-8")
    assert rows.endswith("}\n")
    for cut in ('{"step": 2, "learning_rate": 1.0, "lo', '{"step": 2, "validation": {"psnr": 20.0}'):
        log.write_text(rows + cut, encoding="utf-8")
        out = tmp_path / "out.safetensors"
        assert export.main([f"--run={tmp_path}/nano", f"--out={out}", f"--base={chain}/base"]) == 0
        assert "mean loss of the last steps" in checkpoint.read(out).training["metrics"]


def test_the_adapters_in_the_file_are_as_strong_as_they_were_trained(chain: Path, tmp_path: Path) -> None:
    """A host adds alpha / rank B A: with another alpha a trained LoRA would act many times too weakly there."""
    tensors = checkpoint.read(chain / "nano" / "clearsr.safetensors").tensors
    model = ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")
    for part, module in (("unet_lora", model.unet), ("vae_lora", model.lr_encoder)):
        layers = {name.removesuffix(".lora_A.weight") for name in tensors[part] if name.endswith(".lora_A.weight")}
        assert layers
        for layer in layers:
            trained = module.get_submodule(layer)
            a, b = (tensors[part][f"{layer}.lora_{factor}.weight"].float() for factor in "AB")
            theirs = merged(torch.zeros_like(trained.base_layer.weight), a, b, tensors[part][f"{layer}.alpha"])
            torch.testing.assert_close(theirs, trained.get_delta_weight("default"), rtol=1e-3, atol=1e-6)


def test_a_file_of_another_lora_strength_acts_as_in_a_host(chain: Path, tmp_path: Path) -> None:
    """alpha / rank is part of the weights: twice the second factor at half the alpha is the same model."""
    stored = checkpoint.read(chain / "nano" / "clearsr.safetensors")
    tensors = {part: dict(table) for part, table in stored.tensors.items()}
    for part in ("unet_lora", "vae_lora"):
        for name, value in tensors[part].items():
            if name.endswith(".alpha"):
                tensors[part][name] = value / 2
            elif name.endswith(".lora_B.weight"):
                tensors[part][name] = value * 2
    checkpoint.write(tmp_path / "other.safetensors", Checkpoint(stored.config, stored.training, tensors))
    first, second = (
        ClearSRModel.from_checkpoint(path).trainable()
        for path in (chain / "nano" / "clearsr.safetensors", tmp_path / "other.safetensors")
    )
    assert any(value.any() for name, value in first.items() if name.endswith(".lora_B.weight"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_scale": 0.3}, "latent_scale 0.3 instead of 0.18215"),
        ({"attention_levels": (True, True, False, False)}, "attention_levels"),
        ({"layers_per_block": 1}, "layers_per_block 1 instead of 2"),
    ],
)
def test_networks_that_only_the_nodes_can_build_are_refused_in_words(
    chain: Path, tmp_path: Path, changes: dict[str, object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A scale that is not honoured would give other pictures than ComfyUI does, without a word."""
    stored = checkpoint.read(chain / "nano" / "clearsr.safetensors")
    own = {name: value for name, value in changes.items() if name == "latent_scale"}
    control = dataclasses.replace(stored.config.control, **{k: v for k, v in changes.items() if k not in own})
    config = dataclasses.replace(stored.config, control=control, **own)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        part: {name: torch.randn([abs(side) for side in shape], generator=generator) for name, shape in table.items()}
        for part, table in checkpoint_shapes(config).items()
    }
    checkpoint.write(tmp_path / "other.safetensors", Checkpoint(config, {}, tensors))
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    command = [f"--checkpoint={tmp_path}/other.safetensors", f"--lr={tmp_path}", f"--out={tmp_path}/out"]
    assert restore.main(command) == 1
    assert said in caplog.text


def test_a_run_is_exported_with_its_own_base_alone(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of the same sizes would be taken for it: the snapshot knows which it was."""
    other = BaseModel.load(chain / "base")
    other.unet.conv_in.weight.data += 0.01
    other.save(tmp_path / "other")
    command = [f"--run={chain}/nano", f"--base={tmp_path}/other", f"--out={tmp_path}/out.safetensors"]
    assert export.main(command) == 1
    assert "is another base model than that of the run" in caplog.text
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_cannot_be_written_is_told_in_a_sentence(chain: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert export.main(arguments(chain, Path("/proc/out.safetensors"))) == 1
    assert "/proc cannot take a checkpoint" in caplog.text


def test_training_goes_on_from_a_file_without_a_base(tmp_path: Path) -> None:
    """Every full-size file is one: its weights come from it, the base from --base."""
    config = ClearSRConfig()
    shapes = {"unet_lora": ["a.lora_A.weight", "a.lora_B.weight"], "dpm": ["conv_in.weight"]}
    stored = Checkpoint(
        config, {}, {part: {name: torch.ones(2, 2) for name in names} for part, names in shapes.items()}
    )
    stored.tensors["unet_lora"]["a.alpha"] = torch.tensor(8.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clearsr_model.checkpoint, "read", lambda _path: stored)
        found = clearsr_model.weights_in(tmp_path)
    assert torch.equal(found["unet_lora.a.lora_B.weight"], torch.full((2, 2), 0.5))
    assert torch.equal(found["dpm.conv_in.weight"], torch.ones(2, 2))
    assert "null_text" not in found
