"""From photographs to a checkpoint at tiny size: autoencoder, base, ClearSR, export, restore; each by its command."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from clearsr_core import checkpoint
from training import (
    clearsr,
    config,
    degradation,
    latents,
    models,
    prepare,
    replace_decoder,
    restore,
    run_folder,
    snapshot,
    train,
)
from training.autoencoder import build_autoencoder, normalise_latents
from training.base import BaseSettings, BaseStage
from training.base_model import BaseModel
from training.checkpointing import Checkpointing, checkpoint_blocks
from training.clearsr import ClearSRSettings, ClearSRStage
from training.clearsr_model import ClearSRModel
from training.latents import Crops, encoded_once
from training.photographs import Photographs
from training.picture_files import read_rgb
from training.pipeline import noise_sources, pad_to_grid, sample
from training.pipeline import restore as restore_picture

VARIANTS = {
    "prompt": ["--prompt_mode=patch", "--anchor=plain"],
    "input": ["--control_input=lr+xt", "--prompt_mode=null"],
    "time": ["--control_time=fixed", "--fixed_timestep=100", "--use_spm=false"],
    "windows": ["--query_windows=", "--relative_bias=none", "--use_dpm=true"],
    "constant": ["--query_windows=8,8,8,8"],
    "plain": ["--window_attention=false"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_of_the_method_trains_and_runs(chain: Path, tmp_path: Path, variant: str) -> None:
    """What the paper leaves open is a setting: it trains, is written to the file, and runs from there."""
    command = ["--preset=nano", f"--data={chain}/photographs", "--steps=1", "--threads=1", "--crop=64", "--batch=1"]
    command += [f"--base={chain}/base", f"--cache={chain}/latents.safetensors", "--crops=4", "--validate_every=0"]
    assert train.main([*command, *VARIANTS[variant], f"--out={tmp_path}"]) == 0
    model = ClearSRModel.from_checkpoint(tmp_path / "clearsr.safetensors")
    stored = checkpoint.read(tmp_path / "clearsr.safetensors").config
    for setting in VARIANTS[variant]:
        name, _, value = setting.removeprefix("--").partition("=")
        found = getattr(stored.control if hasattr(stored.control, name) else stored, name)
        written = ",".join(map(str, found)) if isinstance(found, tuple) else str(found).lower()
        assert written == value
    result = restore_picture(model, torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 0, steps=1)
    assert result.shape == (1, 3, 64, 64)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("part", ["vae_lora", "unet_lora"])
def test_a_lora_that_is_off_stays_silent(chain: Path, tmp_path: Path, part: str) -> None:
    """Tab. 3: without its LoRA a network is the base's (the second factor stays zero), and the rest learns."""
    settings = ["--preset=nano", f"--base={chain}/base", f"--cache={chain}/latents.safetensors", "--crops=4", "--ema=0"]
    command = [f"--data={chain}/photographs", "--steps=2", "--threads=1", "--crop=64", "--batch=1", "--warmup=0"]
    assert train.main([*command, *settings, "--validate_every=0", f"--{part}=false", f"--out={tmp_path}"]) == 0
    tensors = checkpoint.read(tmp_path / "clearsr.safetensors").tensors
    for lora in ("vae_lora", "unet_lora"):
        moved = any(value.any() for name, value in tensors[lora].items() if name.endswith("lora_B.weight"))
        assert moved == (lora != part), lora


def test_latents_of_16_channels_go_through_all_stages(chain: Path, tmp_path: Path) -> None:
    """Autoencoder, base and ClearSR stage take the number from the one before; the file is read back with it."""
    shared = [f"--data={chain}/photographs", "--steps=1", "--threads=1", "--crop=64", "--batch=2"]
    autoencoder = ["--preset=nano_autoencoder", "--widths=32,32,32,32", "--latent_channels=16", "--validate_every=0"]
    assert train.main([*autoencoder, *shared, f"--out={tmp_path}/autoencoder"]) == 0
    shared += [f"--cache={tmp_path}/latents.safetensors", "--crops=4", "--validate_every=1"]
    base = ["--preset=nano_base", "--widths=32,32,64,64", "--context_dim=16", f"--vae={tmp_path}/autoencoder/vae"]
    assert train.main([*base, *shared, f"--out={tmp_path}/base"]) == 0
    assert train.main(["--preset=nano", *shared, f"--base={tmp_path}/base", f"--out={tmp_path}/nano"]) == 0
    stored = checkpoint.read(tmp_path / "nano" / "clearsr.safetensors")
    assert stored.config.base is not None and stored.config.latent_rgb is not None
    assert stored.config.base.latent_channels == stored.config.control.latent_channels == 16
    assert len(stored.config.latent_rgb) == 16
    model = ClearSRModel.from_checkpoint(tmp_path / "nano" / "clearsr.safetensors")
    result = restore_picture(model, torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 0, steps=1)
    assert torch.isfinite(result).all()


def test_checkpoint_tells_its_origin_but_no_paths(chain: Path) -> None:
    training = checkpoint.read(chain / "nano" / "clearsr.safetensors").training
    assert training["photographs"] == 2
    assert training["settings"]["degradation"] == "paper"
    assert "validation" in training["metrics"]
    assert str(chain) not in str(training)


def test_checkpoint_is_whole_and_small(chain: Path) -> None:
    stored = checkpoint.read(chain / "nano" / "clearsr.safetensors")
    assert stored.config.base is not None
    assert stored.config.image_encoder
    assert stored.training["settings"]["steps"] == 2
    assert all(torch.isfinite(value).all() for table in stored.tensors.values() for value in table.values())


def test_exactly_the_declared_parameters_move(chain: Path) -> None:
    """The base is untouched; DPM, SPM, both LoRAs and the image encoder are not what they started as."""
    base = BaseModel.load(chain / "base")
    model = ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")
    for name, value in base.unet.state_dict().items():
        torch.testing.assert_close(models.without_lora(model.unet)[name], value.half().float(), msg=name)
    for name, value in base.vae.state_dict().items():
        torch.testing.assert_close(model.vae.state_dict()[name], value.half().float(), msg=name)
    fresh = ClearSRModel(BaseModel.load(chain / "base"), model.control.config, 16, "pooled", 0)
    trained = model.trainable()
    moved = {name for name, value in fresh.trainable().items() if not torch.equal(value.half(), trained[name].half())}
    for part in ("dpm.", "spm.", "unet_lora.", "vae_lora.", "image_encoder."):
        assert any(name.startswith(part) for name in moved), part


def test_variants_of_a_seed_begin_with_the_same_lora_and_image_encoder(chain: Path) -> None:
    """Leaving a part of the control out changes nothing else: what an ablation compares differs in that part alone."""
    whole = _config(chain)
    parts = ("vae_lora.", "unet_lora.", "image_encoder.", "dpm.")
    for smaller in (dataclasses.replace(whole, use_spm=False), dataclasses.replace(whole, window_attention=False)):
        first, second = (
            ClearSRModel(BaseModel.load(chain / "base"), config, 16, "pooled", 7).trainable()
            for config in (whole, smaller)
        )
        shared = [name for name in second if name.startswith(parts)]
        assert {name.split(".")[0] + "." for name in shared} == set(parts)
        for name in shared:
            assert torch.equal(first[name], second[name]), name


def _continued(chain: Path, out: Path, *settings: str) -> list[str]:
    """Return the command that trains the chain's file further."""
    file = chain / "nano" / "clearsr.safetensors"
    command = [f"--data={chain}/photographs", "--threads=1", "--crop=64", "--batch=2", "--validate_every=0"]
    return [*command, f"--init={file}", f"--out={out}", *settings]


def test_a_refused_command_leaves_the_encoded_crops_of_the_run(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the presets' numbers they are minutes of work, and the default cache is every run's."""
    cache, out = tmp_path / "latents.safetensors", tmp_path / "run"
    command = ["--preset=nano", f"--data={chain}/photographs", f"--base={chain}/base", f"--cache={cache}", "--crops=4"]
    command += ["--steps=1", "--threads=1", "--crop=64", "--batch=2", "--validate_every=0", f"--out={out}"]
    assert train.main(command) == 0
    before = cache.read_bytes()
    refused = [
        ("--seed=1", "seed: 0 there, 1 now"),
        ("--batch=3", "batch: 2 there, 3 now"),
        ("--accumulation=3", "cannot be shared out evenly"),
        ("--steps=0", "asks for fewer"),
    ]
    for setting, said in refused:
        caplog.clear()
        assert train.main([*command, setting]) == 1
        assert said in caplog.text
        assert "encoding" not in caplog.text
    elsewhere = [*command, "--seed=1", f"--out={tmp_path}/other"]
    refused = [
        ("--query_windows=8,4", "2 query_windows for 4 widths"),
        ("--fixed_timestep=5000", "fixed_timestep 5000"),
        (f"--init={chain}/base/vae", "holds another model"),
        ("--optimizer=adamw8bit", "bitsandbytes"),
    ]
    for setting, said in refused:
        caplog.clear()
        assert train.main([*elsewhere, setting]) == 1
        assert said in caplog.text
    assert cache.read_bytes() == before


def test_runs_with_other_numbers_of_crops_share_them(chain: Path, tmp_path: Path) -> None:
    """Base, ClearSR and frozen stage take the same ones, in different numbers, from one cache."""
    photographs, vae = Photographs(chain / "photographs", 64), BaseModel.load(chain / "base").vae
    cache = tmp_path / "c.safetensors"
    few, many, again = (Crops(photographs, vae, 64, count, 3, cache, "cpu") for count in (16, 20, 16))
    few.encode()
    many.encode()
    written = cache.stat().st_mtime_ns
    again.encode()
    numbers = torch.arange(16)
    assert torch.equal(few.latents(numbers), many.latents(numbers))
    assert torch.equal(few.latents(numbers), again.latents(numbers))
    assert cache.stat().st_mtime_ns == written


def test_a_base_that_no_file_could_hold_is_not_trained_on(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was told after the last step of the last stage."""
    command = ["--preset=nano_base", f"--data={chain}/photographs", f"--vae={chain}/autoencoder/vae", "--steps=1"]
    command += ["--crop=64", "--crops=2", f"--cache={tmp_path}/c.safetensors", f"--out={tmp_path}/run"]
    assert train.main([*command, "--norm_groups=16"]) == 1
    assert "they must agree. Train the base model with --norm_groups=8." in caplog.text
    assert not (tmp_path / "c.safetensors").exists()


def test_the_settings_in_a_run_folder_begin_the_run_again(chain: Path, tmp_path: Path) -> None:
    """Preset, overrides and paths together, as one file."""
    text = (chain / "nano" / "settings.toml").read_text(encoding="utf-8")
    assert "version 0" in text
    assert "torch" in text
    table = config.read_preset(str(chain / "nano" / "settings.toml"))
    assert table["stage"] == "clearsr"
    assert table["base"] == str(chain / "base")
    again = [f"--preset={chain}/nano/settings.toml", f"--out={tmp_path}/again"]
    assert train.main(again) == 0
    first, second = (
        snapshot.read(folder / "state_00000002.safetensors").tensors for folder in (chain / "nano", tmp_path / "again")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_every_result_says_what_it_was_made_from(chain: Path, tmp_path: Path) -> None:
    for stage in ("autoencoder", "base"):
        made = json.loads((chain / stage / "made.json").read_text(encoding="utf-8"))
        assert made["given"]["set of photographs"]
        assert made["settings"]["batch"]
        assert {"step", "code", "versions"} <= made.keys()
        assert str(chain) not in json.dumps(made)
    assert train.main(_fixed_encoders(chain, tmp_path, "run", 1)) == 0
    training = checkpoint.read(tmp_path / "run" / "clearsr.safetensors").training
    assert training["begun_from"]["name"] == "clearsr.safetensors"
    assert set(training["given"]) == {"set of photographs", "base model", "image encoder of CLIP"}
    assert training["data"] == "photographs"
    assert training["code"].startswith("0.")
    assert "base_widths" not in training["settings"]
    card = (tmp_path / "run" / "clearsr.md").read_text(encoding="utf-8")
    assert "| Begun from | clearsr.safetensors, SHA-256 of its weights" in card
    assert "| Base model | SHA-256" in card
    assert "of CLIP" not in card  # there is none
    assert "of `photographs` |" in card
    preset = tmp_path / "card.toml"
    preset.write_text(card.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    assert config.read_preset(str(preset))["stage"] == "clearsr"


def _fixed_encoders(chain: Path, tmp_path: Path, out: str, steps: int) -> list[str]:
    caches = [f"--cache={tmp_path}/latents.safetensors", f"--pair_cache={tmp_path}/pairs.safetensors", "--crops=4"]
    settings = ["--preset=nano", f"--base={chain}/nano/clearsr.safetensors", "--freeze_encoders=true", *caches]
    return [*_continued(chain, tmp_path / out, *settings), f"--steps={steps}", "--snapshot_every=1", "--ema=0"]


def test_a_file_is_trained_further_with_its_encoders_held_still(chain: Path, tmp_path: Path) -> None:
    """What reads pixels stays as in the file, the rest moves, and the base comes from the file too."""
    assert train.main(_fixed_encoders(chain, tmp_path, "run", 1)) == 0
    before = checkpoint.read(chain / "nano" / "clearsr.safetensors").tensors
    after = checkpoint.read(tmp_path / "run" / "clearsr.safetensors").tensors
    for part in ("vae_lora", "image_encoder", "base.unet", "base.vae"):
        assert all(torch.equal(value, after[part][name]) for name, value in before[part].items()), part
    for part in ("dpm", "spm", "unet_lora"):
        assert any(not torch.equal(value, after[part][name]) for name, value in before[part].items()), part


def test_fixed_pairs_are_made_once_and_a_resumed_run_is_the_same_run(chain: Path, tmp_path: Path) -> None:
    assert train.main(_fixed_encoders(chain, tmp_path, "whole", 2)) == 0
    written = (tmp_path / "pairs.safetensors").stat().st_mtime_ns
    assert train.main(_fixed_encoders(chain, tmp_path, "halves", 1)) == 0
    assert train.main(_fixed_encoders(chain, tmp_path, "halves", 2)) == 0
    whole, halves = (
        snapshot.read(tmp_path / out / "state_00000002.safetensors").tensors for out in ("whole", "halves")
    )
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    assert (tmp_path / "pairs.safetensors").stat().st_mtime_ns == written


def test_decoder_learns_alone_and_latents_stay(chain: Path, tmp_path: Path) -> None:
    command = _continued(chain, tmp_path, "--preset=nano_autoencoder", "--widths=32,32,32,32", "--freeze_encoder=true")
    assert train.main([*command, "--steps=2", "--ema=0"]) == 0
    before = BaseModel.load(chain / "nano" / "clearsr.safetensors").vae.state_dict()
    after = models.AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    moved = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"decoder", "post_quant_conv"}
    # The run is whole: it can be gone on with, by itself and in a run of other settings.
    assert train.main([*command, "--steps=3", "--ema=0"]) == 0
    again = [argument for argument in command if not argument.startswith(("--init", "--out"))]
    assert train.main([*again, f"--init={tmp_path}", f"--out={tmp_path}/again", "--steps=1"]) == 0


def test_a_finished_file_gets_another_decoder(chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The decoder is new, all else as it was, and the file tells where the decoder comes from."""
    file, out = chain / "nano" / "clearsr.safetensors", tmp_path / "new.safetensors"
    command = [f"--checkpoint={file}", f"--out={out}"]
    decoder = ["--preset=nano_adversarial", "--widths=32,32,32,32", "--steps=1", "--warmup=0", "--ema=0"]
    assert train.main(_continued(chain, tmp_path / "decoder", *decoder)) == 0
    assert replace_decoder.main([*command, f"--run={tmp_path}/decoder"]) == 0
    before, after = checkpoint.read(file), checkpoint.read(out)
    changed = {
        f"{part}.{name.partition('.')[0]}"
        for part, table in before.tensors.items()
        for name, value in table.items()
        if not torch.equal(value, after.tensors[part][name])
    }
    assert changed == {"base.vae.decoder", "base.vae.post_quant_conv"}
    assert after.config == before.config
    assert after.training["settings"] == before.training["settings"]
    assert after.training["decoder"]["settings"]["latent_noise"] == 0.3
    # Half of it is half way, and an encoder that stood still stays bit for bit.
    assert replace_decoder.main([*command, f"--run={tmp_path}/decoder", "--share=0.5"]) == 0
    half, name = checkpoint.read(out).tensors["base.vae"], "decoder.conv_out.weight"
    start, end = before.tensors["base.vae"][name].float(), after.tensors["base.vae"][name].float()
    torch.testing.assert_close(half[name].float(), (start + end) / 2, rtol=1e-3, atol=1e-4)
    assert replace_decoder.main([*command, f"--run={tmp_path}/decoder", "--share=2"]) == 1
    # On top of a decoder that was put in before, the file tells of both.
    twice = [f"--checkpoint={out}", f"--out={tmp_path}/twice.safetensors", f"--run={tmp_path}/decoder"]
    assert replace_decoder.main([*twice, "--share=0.25"]) == 0
    decoder = checkpoint.read(tmp_path / "twice.safetensors").training["decoder"]
    assert (decoder["share"], decoder["over"]["share"]) == (0.25, 0.5)
    # Any other run is refused: not finished, or of another encoder.
    assert replace_decoder.main([*command, f"--run={tmp_path}"]) == 1
    assert "no finished run" in caplog.text
    other = ["--preset=nano_autoencoder", "--widths=32,32,32,32", "--steps=1", "--warmup=0", "--ema=0"]
    assert train.main(_continued(chain, tmp_path / "other", *other)) == 0
    assert replace_decoder.main([*command, f"--run={tmp_path}/other"]) == 1
    assert "--freeze_encoder=true" in caplog.text


def test_a_base_is_trained_further_from_a_file(chain: Path, tmp_path: Path) -> None:
    shared = ["--preset=nano_base", "--widths=32,32,64,64", "--context_dim=16", f"--vae={chain}/autoencoder/vae"]
    command = _continued(chain, tmp_path, *shared, f"--cache={chain}/latents.safetensors", "--crops=4", "--steps=1")
    assert train.main([*command, "--learning_rate=1e-9", "--ema=0"]) == 0
    start = BaseModel.load(chain / "nano" / "clearsr.safetensors").unet.state_dict()
    trained = BaseModel.load(tmp_path).unet.state_dict()
    for name, value in start.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-7)


def test_another_base_is_trained_on_the_autoencoder_of_a_file(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = chain / "nano" / "clearsr.safetensors"
    command = ["--preset=nano_base", f"--data={chain}/photographs", "--widths=32,32,32,32", "--context_dim=16"]
    command += ["--crop=64", "--crops=2", "--batch=2", "--steps=1", "--warmup=0", "--validate_every=0", "--threads=1"]
    command += [f"--cache={tmp_path}/latents.safetensors", f"--out={tmp_path}/run"]
    assert train.main([*command, f"--vae={file}"]) == 0
    theirs, ours = BaseModel.load(file).vae.state_dict(), BaseModel.load(tmp_path / "run").vae.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    # What holds no autoencoder is named, and nothing begins.
    (tmp_path / "other.safetensors").write_bytes(b"no weights")
    for wrong in ("absent", "other.safetensors"):
        assert train.main([*command, f"--out={tmp_path}/{wrong}_run", f"--vae={tmp_path}/{wrong}"]) == 1
        assert f"{tmp_path}/{wrong}" in caplog.text
        assert not list(tmp_path.glob(f"{wrong}_run/state_*"))


def test_a_file_of_another_model_is_refused(chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train.main([*_fixed_encoders(chain, tmp_path, "run", 1), "--rank=4"]) == 1
    assert "holds another model" in caplog.text


def test_trainable_parts_are_the_papers(chain: Path) -> None:
    """72 decoder projections and every convolution and attention layer of the encoder carry LoRA."""
    names = ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors").trainable()
    unet = {name.rpartition(".lora_")[0] for name in names if name.startswith("unet_lora.")}
    vae = {name.rpartition(".lora_")[0] for name in names if name.startswith("vae_lora.")}
    assert len(unet) == 72
    assert all(".up_blocks." in name and ".attn" in name for name in unet)
    # Equal widths need no shortcut convolutions: 1 + 4 levels x 2 + 3 downsamplers + 4 in the middle + 4 + 1.
    assert len(vae) == 1 + 8 + 3 + 4 + 4 + 1


def test_no_graph_grows_through_the_frozen_encoder(chain: Path) -> None:
    """Residuals enter only the decoder, so that the UNet's down and middle blocks need no graph (decision 0010)."""
    model = ClearSRModel(BaseModel.load(chain / "base"), _config(chain), 16, "pooled", 0)
    seen: dict[str, bool] = {}
    for name in ("down_blocks.3", "mid_block", "up_blocks.0"):
        module = model.unet.get_submodule(name)

        def note(_module: object, _inputs: object, output: object, name: str = name) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            seen[name] = tensor.requires_grad  # type: ignore[union-attr]

        module.register_forward_hook(note)
    x_t = torch.randn(1, 4, 16, 16)
    model.eps(x_t, torch.tensor([500]), torch.randn(1, 4, 16, 16), torch.zeros(1, 1, 16)).sum().backward()
    assert seen == {"down_blocks.3": False, "mid_block": False, "up_blocks.0": True}


def test_image_prompt_reaches_the_decoder_only(chain: Path) -> None:
    """p replaces the empty prompt in the UNet's decoder (Sec. 3.1): encoder and middle give the same with any p."""
    model = ClearSRModel.from_checkpoint(chain / "nano" / "clearsr.safetensors")
    outputs: list[torch.Tensor] = []
    model.unet.mid_block.register_forward_hook(lambda _m, _i, output: outputs.append(output.detach()))
    x_t, lr = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        first, second = (model.eps(x_t, torch.tensor([500]), lr, torch.full((1, 1, 16), v)) for v in (-1.0, 1.0))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(first, second)


def test_untrained_model_is_the_base(chain: Path) -> None:
    """Zero output convolutions and zero LoRA: eps is the plain UNet's, to rounding (peft splits projections)."""
    model = ClearSRModel(BaseModel.load(chain / "base"), _config(chain), 16, "null", 0)
    base = BaseModel.load(chain / "base")
    generator = torch.Generator().manual_seed(4)
    x_t, lr = torch.randn(2, 2, 4, 16, 16, generator=generator)
    t = torch.tensor([10, 900])
    context = base.null_text.expand(2, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eps(x_t, t, lr, context), base.unet(x_t, t, context).sample, rtol=1e-5, atol=1e-5
        )
        images = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
        torch.testing.assert_close(model.lr_encoder(images), models.encode(base.vae, images), rtol=1e-5, atol=1e-5)


def test_restore_gives_exactly_scale_times_input(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "lr").mkdir()
    for name, size in {"a": (13, 7), "b": (16, 16), "c": (1, 5)}.items():
        Image.new("RGB", size, (200, 40, 90)).save(tmp_path / "lr" / f"{name}.png")
    command = [f"--checkpoint={chain}/nano/clearsr.safetensors", f"--lr={tmp_path}/lr", f"--out={tmp_path}/out"]
    assert restore.main([*command, "--steps=2", "--ela_strength=0.02"]) == 0
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "out").glob("*.png")}
    assert sizes == {"a": (52, 28), "b": (64, 64), "c": (4, 20)}


def test_same_seed_same_latent_and_one_step_works(chain: Path) -> None:
    lr_latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def run(seed: int, steps: int) -> torch.Tensor:
        noise, generator = noise_sources(lr_latent.shape, seed)
        return sample(lambda x_t, t: 0.1 * x_t, lr_latent, noise, generator, steps=steps)

    assert torch.equal(run(3, 7), run(3, 7))
    assert not torch.equal(run(3, 7), run(4, 7))
    assert torch.isfinite(run(3, 1)).all()


def test_normalised_latents_leave_the_function_alone(chain: Path) -> None:
    """Mean 0 and deviation 1 / 0.18215 per channel, and the same reconstruction."""
    photographs = Photographs(chain / "photographs", smallest=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_autoencoder((32, 32, 32, 32), 1)
    image = photographs.crops(1, 64, torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model.decode(model.encode(image).latent_dist.mode()).sample
        normalise_latents(model, photographs, 64, count=64)
        after = model.decode(model.encode(image).latent_dist.mode()).sample
        crops = photographs.crops(64, 64, torch.Generator().manual_seed(0))
        latents = models.encode(model, crops)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.3
    assert (latents.std(dim=(0, 2, 3)) - 1.0).abs().max() < 0.3


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (64, 64), (63, 65), (20, 200)])
def test_padding_keeps_the_picture_and_reaches_the_grid(size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size)
    padded = pad_to_grid(image)
    assert padded.shape[-2] % 64 == 0
    assert padded.shape[-1] % 64 == 0
    assert torch.equal(padded[..., : size[0], : size[1]], image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_any_picture_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "I;16") else "picture.png")
    if mode == "I;16":
        Image.fromarray(np.full((9, 6), 30000, dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (6, 9), (120, 120, 120)).convert(mode).save(path)
    pixels = read_rgb(path)
    assert pixels.shape == (9, 6, 3)
    assert abs(int(pixels[0, 0, 0]) - 120) < 6


def test_broken_and_small_pictures_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (70, 70)).save(tmp_path / "good.png")
    Image.new("RGB", (10, 70)).save(tmp_path / "small.png")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    assert len(Photographs(tmp_path, smallest=64)) == 1
    assert "broken.jpg" in caplog.text
    assert "small.png" in caplog.text
    with pytest.raises(ValueError, match="smallest side"):
        Photographs(tmp_path, smallest=100)
    with pytest.raises(ValueError, match="not a folder"):
        Photographs(tmp_path / "missing", smallest=1)


def test_shards_and_workers_train_the_same_run(chain: Path, tmp_path: Path) -> None:
    """Bit for bit, and with the same cache of encoded crops: nothing random depends on either."""
    assert prepare.main([f"--data={chain}/photographs", f"--out={tmp_path}/shards", "--smallest=64"]) == 0
    cache = chain / "latents.safetensors"
    written = cache.stat().st_mtime_ns
    shared = [f"--data={tmp_path}/shards", "--steps=2", "--threads=1", "--crop=64", "--batch=2", "--validate_every=0"]
    command = ["--preset=nano", *shared, f"--cache={cache}", "--crops=4", f"--base={chain}/base", "--workers=2"]
    assert train.main([*command, "--memory_gb=1e-5", f"--out={tmp_path}/run"]) == 0
    state = "state_00000002.safetensors"
    here, there = (snapshot.read(folder / state).tensors for folder in (tmp_path / "run", chain / "nano"))
    assert all(torch.equal(value, there[name]) for name, value in here.items())
    assert cache.stat().st_mtime_ns == written


def test_sharpened_crops_in_chunked_order_are_another_set(chain: Path, tmp_path: Path) -> None:
    photographs = Photographs(chain / "photographs", 64, order="chunked", seed=3)
    vae = BaseModel.load(chain / "base").vae
    crops = [Crops(photographs, vae, 64, 4, 3, tmp_path / f"{usm}.safetensors", "cpu", usm) for usm in (False, True)]
    plain, sharpened = (each.image(1) for each in crops)
    torch.testing.assert_close(sharpened, degradation.sharpen((plain + 1.0) / 2.0) * 2.0 - 1.0)
    assert sharpened.std() > plain.std()
    assert crops[0].identity != crops[1].identity
    generator = torch.Generator()
    assert [crops[0].draw(step, 3, generator).tolist() for step in (0, 1, 2)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]


def _config(chain: Path):
    return checkpoint.read(chain / "nano" / "clearsr.safetensors").config.control


def _one_step(chain: Path, out: Path, *settings: str) -> dict[str, Tensor]:
    """Train two steps on crops that are new every time, and return what the snapshot holds."""
    command = ["--preset=nano", f"--data={chain}/photographs", f"--base={chain}/base", "--threads=1", "--crop=64"]
    more = ["--steps=2", "--batch=2", "--crops=0", "--validate_every=0", "--warmup=500", "--ema=0"]
    assert train.main([*command, *more, f"--out={out}", *settings]) == 0
    return snapshot.read(out / "state_00000002.safetensors").tensors


def test_what_saves_memory_changes_no_result(chain: Path, tmp_path: Path) -> None:
    """Blocks that are computed twice, and batches in parts, train the same run."""
    expected = _one_step(chain, tmp_path / "plain")
    for name, settings in {
        "encoder": ["--checkpointing=encoder"],
        "all": ["--checkpointing=all", "--accumulation=2", "--degrade_on=device"],
    }.items():
        found = _one_step(chain, tmp_path / name, *settings)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


def test_checkpointing_keeps_less(chain: Path) -> None:
    """Bytes that the gradients of one step wait for, without and with checkpointing."""

    def kept(what: Checkpointing) -> int:
        model = ClearSRModel(BaseModel.load(chain / "base"), _config(chain), 16, "pooled", 0)
        checkpoint_blocks(model, what)
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            lr_latents = model.lr_encoder(torch.zeros(1, 3, 64, 64))
            eps = model.eps(torch.zeros_like(lr_latents), torch.tensor([5]), lr_latents, model.null_text[None])
        assert eps.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    none, encoder, everything = kept("none"), kept("encoder"), kept("all")
    assert everything < encoder < none
    assert everything < none / 2


def test_every_stage_validates_with_pictures(chain: Path) -> None:
    for stage, measure in (("autoencoder", "psnr"), ("base", "latent_std")):
        assert (chain / stage / "validation_00000002.png").is_file()
        assert run_folder.validations(chain / stage, measure)


def test_validation_measures_and_shows_what_the_decoder_makes_of_x_lr(chain: Path, tmp_path: Path) -> None:
    _one_step(chain, tmp_path, "--validate_every=2", "--best=psnr")
    with Image.open(tmp_path / "validation_00000002.png") as sheet:
        assert sheet.size == (4 * 64, 4 * 64)  # enlarged input, decoded x_lr, result, target
    found = run_folder.rows(tmp_path)[-1]["validation"]
    assert found.keys() == {"psnr", "ssim", "latent_error", "encoder_drift"}  # NIQE wants larger crops
    assert (tmp_path / "best_00000002.safetensors").is_file()
    command = ["--preset=nano", f"--data={chain}/photographs", f"--base={chain}/base", "--best=niqe", "--crop=64"]
    assert train.main([*command, f"--out={tmp_path / 'other'}"]) == 1


def _stage(chain: Path, tmp_path: Path, **changes: str) -> ClearSRStage:
    values = {"steps": "1", "learning_rate": "1e-4", "crop": "64", "batch": "2", "crops": "0", "threads": "1"}
    paths = {"base": f"{chain}/base", "data": f"{chain}/photographs", "out": f"{tmp_path}/run"}
    stage = ClearSRStage(config.build(ClearSRSettings, values, paths, changes))
    stage.start(range(2))
    return stage


def test_half_precision_leaves_the_noise_schedule_alone(chain: Path, tmp_path: Path) -> None:
    """bfloat16 rounds 1 - abar to steps of 1/256: no noise at all at t = 0 and 1, a fifth too much at t = 2."""
    stage = _stage(chain, tmp_path, precision="bfloat16")
    batch = stage.make(0)._replace(timesteps=torch.tensor([0, 2]))
    seen: list[Tensor] = []

    def eps(x_t: Tensor, *_: Tensor) -> Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    stage.model.eps = eps  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        stage.module(batch)
        x_0 = models.encode(stage.model.vae, batch.hq)
    assert x_0.dtype == torch.float32
    kept = stage.module.schedule.alphas_cumprod[batch.timesteps].double()[:, None, None, None]
    expected = kept.sqrt() * x_0 + (1 - kept).sqrt() * batch.noise
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_base_of_a_host_gets_no_preview_and_ours_one_in_pieces(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 crops of 512 pixels at once would take 40 GiB at the end of the paper's training, for nothing."""
    stage, asked = _stage(chain, tmp_path), []
    real = stage.crops.latents

    def latents(numbers: Tensor) -> Tensor:
        asked.append(numbers.tolist())
        return real(numbers)

    monkeypatch.setattr(stage.crops, "latents", latents)
    monkeypatch.setattr(stage, "validate", lambda *_: {})
    stage.finish(tmp_path, {"settings": {}})
    assert asked == [[number, number + 1] for number in range(0, 64, 2)]
    asked.clear()
    given: list[object] = []
    monkeypatch.setattr(clearsr, "is_contained", lambda _: False)
    monkeypatch.setattr(clearsr, "export", lambda *_, preview, **__: given.append(preview))
    stage.finish(tmp_path, {"settings": {}})
    assert (asked, given) == ([], [None])


@pytest.mark.parametrize("crops", ["0", "4"])
def test_validation_shows_crops_that_no_step_trains_on(chain: Path, tmp_path: Path, crops: str) -> None:
    stage = _stage(chain, tmp_path, crops=crops, cache=f"{tmp_path}/latents.safetensors")
    seen: set[int] = set()
    real = stage.crops.image

    def image(index: int) -> Tensor:
        seen.add(index)
        return real(index)

    stage.crops.image = image  # type: ignore[method-assign]
    figures = stage.validate(1, tmp_path)
    assert seen == {-4, -3, -2, -1}
    assert not torch.equal(real(-1), real(3))
    # The target is the latent of the very crop, not of a row of the fixed set.
    assert figures["latent_error"] > 0
    torch.testing.assert_close(stage.crops.latents(torch.tensor([-1])), models.encode(stage.model.vae, real(-1)[None]))


def test_validation_samples_as_the_exported_file_will(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors: list[Tensor | None] = []

    def spy(eps: object, lr_latents: Tensor, *_: object, anchor: Tensor | None = None, **__: object) -> Tensor:
        anchors.append(anchor)
        return lr_latents

    monkeypatch.setattr(clearsr, "sample", spy)
    with torch.no_grad():  # as the loop does
        _stage(chain, tmp_path).validate(1, tmp_path)
        _stage(chain, tmp_path, anchor="plain").validate(1, tmp_path)
    assert anchors[0] is None
    assert anchors[1] is not None


def test_the_papers_training_takes_every_crop_and_nanos_the_more_detailed_of_two(chain: Path, tmp_path: Path) -> None:
    assert config.read_preset("paper")["candidates"] == 1
    assert {config.read_preset(name)["candidates"] for name in ("nano", "nano_base", "nano_frozen", "smoke")} == {2}
    one, two = (_stage(chain, tmp_path, candidates=count).crops for count in ("1", "2"))
    detail = [torch.stack([crops.image(n).diff(dim=1).abs().mean() for n in range(8)]).mean() for crops in (one, two)]
    assert detail[1] > detail[0]
    assert one.identity != two.identity


def test_a_run_is_not_continued_on_another_base(chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["--preset=nano", f"--data={chain}/photographs", "--threads=1", "--crop=64", "--batch=2", "--crops=0"]
    command += ["--validate_every=0", f"--out={tmp_path}/run"]
    assert train.main([*command, f"--base={chain}/base", "--steps=1"]) == 0
    other = BaseModel.load(chain / "base")
    other.unet.conv_in.weight.data += 0.01
    other.save(tmp_path / "other")
    assert train.main([*command, f"--base={tmp_path}/other", "--steps=2"]) == 1
    assert "a run on another base model" in caplog.text
    assert train.main([*command, f"--base={chain}/base", "--steps=2"]) == 0


def test_an_unfinished_autoencoder_is_no_start_for_a_decoder_alone(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its snapshots hold latents of another size than its result: only the result is what the base was trained on."""
    settings = ["--preset=nano_autoencoder", "--widths=32,32,32,32", "--freeze_encoder=true", "--threads=1"]
    command = [*settings, f"--data={chain}/photographs", "--crop=64", "--batch=2", "--steps=1", "--validate_every=0"]
    assert train.main([*command, f"--init={chain}/autoencoder", f"--out={tmp_path}/run"]) == 1
    assert f"--init={chain / 'autoencoder' / 'vae'}" in caplog.text
    assert train.main([*command, f"--init={chain}/autoencoder/vae", f"--out={tmp_path}/run"]) == 0
    theirs, ours = (
        models.AutoencoderKL.from_pretrained(folder / "vae").state_dict()
        for folder in (chain / "autoencoder", tmp_path / "run")
    )
    still = [name for name in theirs if name.startswith(("encoder.", "quant_conv."))]
    assert still
    for name in still:
        assert torch.equal(theirs[name], ours[name]), name


@pytest.mark.parametrize(("preset", "measure"), [("nano_autoencoder", "ssim"), ("nano_base", "psnr")])
def test_the_best_by_what_a_stage_does_not_measure_is_refused(
    chain: Path, tmp_path: Path, preset: str, measure: str, caplog: pytest.LogCaptureFixture
) -> None:
    command = [f"--preset={preset}", f"--data={chain}/photographs", f"--vae={chain}/autoencoder/vae"]
    command = command[: 3 if preset == "nano_base" else 2]
    assert train.main([*command, f"--best={measure}", "--validate_every=1", f"--out={tmp_path}"]) == 1
    assert f"--best={measure}" in caplog.text
    assert "this stage" in caplog.text


def test_the_objective_is_the_noise_of_the_step(chain: Path, tmp_path: Path) -> None:
    """Eq. 1: nothing is lost where eps is the noise itself; x_0 in its place would not do. E' sees [-1, 1]."""
    stage = _stage(chain, tmp_path)
    batch = stage.make(0)
    seen: list[Tensor] = []
    real = stage.model.lr_encoder.forward
    stage.model.lr_encoder.forward = lambda images: seen.append(images) or real(images)  # type: ignore[method-assign]
    for answer, least, most in ((batch.noise, 0.0, 0.0), (torch.zeros_like(batch.noise), 0.5, 2.0)):
        stage.model.eps = lambda *_, answer=answer: answer  # type: ignore[method-assign]
        assert least <= float(stage.module(batch)[0]) <= most
    assert float(seen[0].min()) < -0.5
    base = BaseStage(
        config.build(
            BaseSettings,
            {"steps": 1, "learning_rate": 1e-4, "crop": 64, "batch": 2, "crops": 0, "widths": [32, 32, 64, 64]},
            {"vae": f"{chain}/autoencoder/vae", "data": f"{chain}/photographs", "out": f"{tmp_path}/base"},
        )
    )
    base.start(range(2))
    drawn = base.make(0)
    base.unet.forward = lambda *_, **__: types.SimpleNamespace(sample=drawn.noise)  # type: ignore[method-assign]
    assert float(base.module(drawn)[0]) == 0.0


def test_every_step_draws_other_timesteps_and_degradations(chain: Path, tmp_path: Path) -> None:
    stage = _stage(chain, tmp_path, degrade_on="device")
    batches = [stage.make(step) for step in range(60)]
    assert [batch.numbers.tolist() for batch in batches[:3] if batch.numbers is not None] == [[0, 1], [2, 3], [4, 5]]
    timesteps = torch.cat([batch.timesteps for batch in batches])
    assert int(timesteps.min()) < 100
    assert int(timesteps.max()) > 900


@pytest.mark.parametrize("part", ["vae_lora", "unet_lora"])
def test_a_lora_that_is_off_is_silent_after_init_too(chain: Path, tmp_path: Path, part: str) -> None:
    command = _continued(
        chain, tmp_path, "--preset=nano", f"--base={chain}/base", "--crops=0", "--steps=1", "--warmup=0"
    )
    before = checkpoint.read(chain / "nano" / "clearsr.safetensors").tensors[part]
    assert any(value.any() for name, value in before.items() if name.endswith("lora_B.weight"))
    assert train.main([*command, f"--{part}=false", "--ema=0"]) == 0
    after = checkpoint.read(tmp_path / "clearsr.safetensors")
    assert not any(value.any() for name, value in after.tensors[part].items() if name.endswith("lora_B.weight"))
    place = {"vae_lora": "on the VAE's encoder", "unet_lora": "on the attention of the UNet's decoder"}
    written = (tmp_path / "clearsr.md").read_text()
    assert place[part] not in written
    assert all(text in written for key, text in place.items() if key != part)


def test_the_empty_prompt_is_a_part_of_the_base(chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pairs that were encoded with another one are encoded anew, and a run is not continued on it."""
    other = BaseModel.load(chain / "base")
    BaseModel(other.unet, other.vae, other.null_text + 1.0).save(tmp_path / "other")
    shared = ["--preset=nano", f"--data={chain}/photographs", "--threads=1", "--crop=64", "--batch=2", "--crops=2"]
    shared += [f"--cache={tmp_path}/c.safetensors", f"--pair_cache={tmp_path}/p.safetensors", "--validate_every=0"]
    shared += ["--freeze_encoders=true", "--prompt_mode=null", "--steps=1"]
    prompts = []
    for base in (chain / "base", tmp_path / "other"):
        assert train.main([*shared, f"--base={base}", f"--out={tmp_path}/{base.name}_run"]) == 0
        prompts.append(load_file(tmp_path / "p.safetensors")["prompts"])
    torch.testing.assert_close(prompts[1], prompts[0] + 1.0)
    assert train.main([*shared, f"--base={tmp_path}/other", f"--out={tmp_path}/base_run", "--steps=2"]) == 1
    assert "a run on another base model" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--crop=100"], "--crop=100: give a multiple of 8"),
        (["--crop=8"], "--crop=8: give a multiple of 8 from 32 on"),
        (["--candidates=0"], "--candidates=0"),
        (["--memory_gb=-1"], "--memory_gb=-1"),
        (["--prompt_dropout=2"], "--prompt_dropout=2"),
        (["--rank=0"], "--vae_lora=false --unet_lora=false"),
        (["--prompt_mode=null", "--clip_vision=somewhere"], "no use for --clip_vision"),
        (["--init=/not/there.safetensors"], "--init=/not/there.safetensors is not there"),
        (["--out=/proc/run"], "--out=/proc/run cannot be a folder of a run"),
        (["--preset", "smoke"], "--key=value"),
    ],
)
def test_impossible_settings_end_before_anything_is_read(
    chain: Path, tmp_path: Path, settings: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["--preset=nano", "--data=/not/there", f"--base={chain}/base", f"--out={tmp_path}"]
    assert train.main([*command, *settings]) == 1
    assert said in caplog.text
    assert "photographs" not in caplog.text


def test_no_preset_is_asked_for_by_name(caplog: pytest.LogCaptureFixture) -> None:
    assert train.main(["--steps=1"]) == 1
    assert "Please give --preset=NAME: " in caplog.text
    assert "nano" in caplog.text


def test_the_decoder_alone_is_not_trained_on_an_encoder_that_knows_nothing(
    chain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["--preset=nano_adversarial", f"--data={chain}/photographs", "--crop=64", f"--out={tmp_path}"]
    assert train.main(command) == 1
    assert "--freeze_encoder=true" in caplog.text
    assert "give --init=" in caplog.text


def test_a_stop_before_the_first_step_is_said_in_a_sentence(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "encode", stopped)
    command = ["--preset=nano", f"--data={chain}/photographs", f"--base={chain}/base", "--crop=64", "--crops=2"]
    assert train.main([*command, f"--cache={tmp_path}/c.safetensors", f"--out={tmp_path}/run"]) == 130
    assert "Stopped. The same command goes on" in caplog.text
    assert not (tmp_path / "c.safetensors").exists()


def test_torchs_threads_are_set_before_crops_are_encoded(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = models.encode

    def counting(*arguments: object) -> Tensor:
        seen.append(torch.get_num_threads())
        return real(*arguments)  # type: ignore[arg-type]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(models, "encode", counting)
    try:
        command = ["--preset=nano", f"--data={chain}/photographs", f"--base={chain}/base", "--crop=64", "--crops=2"]
        more = ["--threads=1", "--steps=1", "--batch=1", "--validate_every=0", f"--cache={tmp_path}/c.safetensors"]
        assert train.main([*command, *more, f"--out={tmp_path}/run"]) == 0
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize("stopped", ["by Ctrl-C", "by a kill"])
def test_encoding_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    """Half an hour of restored crops is not begun anew; crops of another set are."""
    cache, seen = tmp_path / "c.safetensors", []
    monkeypatch.setattr(latents, "KEEP_EVERY", 1e9 if stopped == "by Ctrl-C" else 0.0)

    def encode(numbers: Tensor) -> dict[str, Tensor]:
        seen.append(numbers.tolist())
        if len(seen) == 3:
            raise KeyboardInterrupt if stopped == "by Ctrl-C" else SystemExit
        return {"x": numbers.float() * 2.0, "y": numbers[:, None]}

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        encoded_once(cache, "ours", 70, encode, "first")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors.begun"]
    seen.clear()
    seen.extend([[]] * 5)
    found = encoded_once(cache, "ours", 70, encode, "second")
    assert [numbers[0] for numbers in seen[5:]] == [32, 48, 64]
    assert found["x"].tolist() == [2.0 * number for number in range(70)]
    assert found["y"].shape == (70, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    for fewer in (70, 40):
        again = encoded_once(cache, "ours", fewer, lambda _: {}, "never")
        assert all(torch.equal(value[:fewer], again[name]) for name, value in found.items())
    seen.extend([[]] * 5)
    more = encoded_once(cache, "ours", 90, encode, "more")
    assert [numbers[0] for numbers in seen[-2:]] == [64, 80]  # whole batches
    assert more["x"].tolist() == [2.0 * number for number in range(90)]
    seen.extend([[]] * 5)
    encoded_once(cache, "another", 20, encode, "third")
    assert seen[-2:] == [list(range(16)), [16, 17, 18, 19]]


def test_two_runs_may_encode_into_one_cache_at_a_time(tmp_path: Path) -> None:
    """Each writes a file of its own and puts it in place whole."""
    cache = tmp_path / "c.safetensors"

    def encode(numbers: Tensor) -> dict[str, Tensor]:
        if not cache.exists():
            encoded_once(cache, "other", 2, lambda n: {"x": n.float()}, "inner")  # a second run overtakes
        return {"x": numbers.float() + 1.0}

    assert encoded_once(cache, "ours", 2, encode, "outer")["x"].tolist() == [1.0, 2.0]
    assert encoded_once(cache, "ours", 2, encode, "again")["x"].tolist() == [1.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
