"""The decoder learns on latents as a finished file's sampler leaves them: which, how many, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import config, train
from training.autoencoder import AutoencoderSettings, AutoencoderStage
from training.clearsr_model import ClearSRModel
from training.degradation import PRESETS
from training.pairs import degrade_pairs
from training.pipeline import encode_lr, restore_latents


def _settings(chain: Path, folder: Path, **changes: str) -> AutoencoderSettings:
    file = chain / "nano" / "clearsr.safetensors"
    table: dict[str, object] = {"steps": 1, "learning_rate": 1e-4, "freeze_encoder": True, "out": str(folder)}
    table["init"] = str(file)  # `_stage` does what the loop would
    values = {"widths": "32,32,32,32", "crop": "64", "batch": "8", "data": str(chain / "photographs")}
    restored = {"restored_by": str(file), "restored_crops": "3", "restored_cache": str(folder / "restored.safetensors")}
    few = {"restore_steps": "2", "restore_denoise": "0.5"}
    return config.build(AutoencoderSettings, {**table, **values}, {**restored, **few, **changes})


def _stage(settings: AutoencoderSettings, rows: range | None = None) -> AutoencoderStage:
    """Return the stage with the finished file's autoencoder, as `--init` would put it there."""
    stage = AutoencoderStage(settings)
    stage.model.load_state_dict(ClearSRModel.from_checkpoint(settings.restored_by).vae.state_dict())
    stage.start(rows or range(settings.batch))
    return stage


def test_latents_are_those_that_the_sampler_makes_of_the_degraded_crop(chain: Path, tmp_path: Path) -> None:
    settings = _settings(chain, tmp_path, restored_share="1")
    stage = _stage(settings)
    assert stage.restored is not None
    numbers = torch.arange(3)
    images = stage.restored.images(numbers)
    lr_images = degrade_pairs((images + 1) / 2, numbers, settings.seed + 4, PRESETS["light"])
    model = ClearSRModel.from_checkpoint(settings.restored_by)
    expected = restore_latents(model, encode_lr(model, lr_images), settings.seed, steps=2, denoise=0.5)
    torch.testing.assert_close(stage.restored.latents, expected)

    batch = stage.make(0)
    assert batch.is_restored.all()
    for image, latent in zip(batch.images, batch.restored, strict=True):
        number = next(number for number in range(3) if torch.equal(latent, stage.restored.latents[number]))
        assert torch.equal(image, images[number])


def test_a_share_of_the_crops_is_restored_and_the_others_are_as_without(chain: Path, tmp_path: Path) -> None:
    plain = _stage(_settings(chain, tmp_path, restored_share="0", batch="32")).make(0)
    mixed = _stage(_settings(chain, tmp_path, restored_share="0.5", batch="32")).make(0)
    assert not plain.is_restored.any()
    assert 8 <= int(mixed.is_restored.sum()) <= 24
    assert torch.equal(mixed.images[~mixed.is_restored], plain.images[~mixed.is_restored])
    assert torch.equal(mixed.noise, plain.noise)


def test_the_decoder_sees_the_restored_latent_in_the_place_of_its_own(chain: Path, tmp_path: Path) -> None:
    stage = _stage(_settings(chain, tmp_path, restored_share="0"))
    batch = stage.make(0)
    own = stage.module(batch)[1]["l1"]
    elsewhere = batch._replace(restored=torch.ones_like(batch.restored))
    assert stage.module(elsewhere)[1]["l1"] == own
    taken = elsewhere._replace(is_restored=torch.ones_like(batch.is_restored))
    assert stage.module(taken)[1]["l1"] != own


def test_processes_share_a_batch(chain: Path, tmp_path: Path) -> None:
    settings = _settings(chain, tmp_path, restored_share="0.5")
    whole = _stage(settings).make(3)
    parts = [_stage(settings, rows).make(3) for rows in (range(4), range(4, 8))]
    for name in ("images", "restored", "is_restored", "noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_latents_are_kept_for_the_same_file_and_crops_alone(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    monkeypatch.setattr("training.restored.restore_latents", lambda *a, **k: runs.append(1) or restore_latents(*a, **k))
    for changes in ({}, {}, {"restore_steps": "1"}, {"restored_crops": "2"}, {"degradation": "paper"}):
        _stage(_settings(chain, tmp_path, **changes))
    assert len(runs) == 4


def test_the_preset_trains_and_goes_on(chain: Path, tmp_path: Path) -> None:
    file = chain / "nano" / "clearsr.safetensors"
    command = ["--preset=nano_restored", "--widths=32,32,32,32", f"--data={chain}/photographs", f"--init={file}"]
    command += [f"--restored_by={file}", "--restored_crops=2", "--restore_steps=1", "--batch=2", "--crop=64"]
    command += [f"--restored_cache={tmp_path}/cache.safetensors", f"--out={tmp_path}/run", "--validate_every=0"]
    command += ["--warmup=0", "--threads=1", "--discriminator_width=4"]
    assert train.main([*command, "--steps=1"]) == 0
    assert train.main([*command, "--steps=2"]) == 0
    assert (tmp_path / "run" / "vae" / "config.json").is_file()


def test_a_file_with_another_encoder_is_refused(chain: Path, tmp_path: Path) -> None:
    stage = AutoencoderStage(_settings(chain, tmp_path))
    with pytest.raises(ValueError, match="another encoder"):
        stage.start(range(2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"freeze_encoder": "false"}, "--freeze_encoder=true"),
        ({"crop": "96"}, "multiples of 64"),
        ({"restored_crops": "0"}, "--restored_crops"),
        ({"restored_share": "1.5"}, "--restored_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(chain: Path, tmp_path: Path, changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AutoencoderStage(_settings(chain, tmp_path, **changes))
