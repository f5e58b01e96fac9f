"""The plan of a run: memory that real steps confirm byte by byte, data and length as the run will have them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from training import bench_step, config, optimizer, plan, rehearsal
from training.autoencoder import AutoencoderSettings
from training.base import BaseSettings
from training.clearsr import ClearSRSettings, ClearSRStage
from training.live_memory import LiveMemory

TINY = {
    "steps": 2,
    "learning_rate": 1e-4,
    "out": "nowhere",
    "base": "random",
    "data": "synthetic",
    "base_widths": "32,32,32,32",
    "crops": 0,
    "crop": 64,
    "batch": 2,
}


def settings(**changes: object) -> ClearSRSettings:
    return config.build(ClearSRSettings, {**TINY, **changes})


def small(**changes: object) -> AutoencoderSettings:
    values = {name: TINY[name] for name in ("steps", "learning_rate", "out", "data", "crop", "batch")}
    return config.build(AutoencoderSettings, {**values, **changes})


def measured(chosen: ClearSRSettings) -> tuple[int, int]:
    """Return the bytes of weights, and the most that is alive in the second of two real steps."""
    stage = ClearSRStage(chosen)
    stage.start(range(chosen.batch))
    parameters = stage.trainable()
    for name, parameter in stage.weights().items():
        parameter.requires_grad_(name in parameters)
    batch = stage.batch(1)  # before anything is counted: making it touches decoded pictures
    with LiveMemory(rehearsal.convolution_workspace) as memory:
        memory.count([*stage.module.parameters(), *stage.module.buffers()])
        weights = memory.live
        memory.count(value for value in batch if isinstance(value, torch.Tensor))
        moments = optimizer.build(chosen.optimizer, parameters.values(), chosen.learning_rate)
        rehearsal.step(stage.module, batch, moments, parameters, chosen)
        moments.zero_grad(set_to_none=True)
        memory.forget_peak()
        rehearsal.step(stage.module, batch, moments, parameters, chosen)
        return weights, memory.peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "precision": "bfloat16",
            "checkpointing": "all",
            "accumulation": 2,
            "batch": 4,
            "crops": 4,
            "unet_lora": False,
        },
    ],
    ids=["plain", "bfloat16, checkpointed, accumulated, fixed crops"],
)
def test_estimate_is_what_a_real_step_holds(changes: dict[str, object], tmp_path: Path) -> None:
    chosen = settings(**changes, cache=tmp_path / "latents.safetensors")
    weights, peak = measured(chosen)
    expected = rehearsal.estimate(chosen)
    assert expected.weights == weights
    # The tables of the noise schedule and the loop's own numbers: kilobytes.
    assert expected.tensors == pytest.approx(peak, rel=1e-3)


def test_what_a_process_takes_beside_its_tensors_is_as_measured() -> None:
    """The runs of docs/TRAINING.md, tensors computed and process measured in GiB: each within 15 %."""
    for tensors, measured_gib in ((0.827, 1.117), (1.754, 2.233), (1.003, 1.573), (1.467, 1.796), (14.317, 16.467)):
        estimate = rehearsal.MemoryEstimate(int(tensors * 2**30), 0, 0, 0, 0, 0, 0, on_gpu=False)
        assert measured_gib * 2**30 == pytest.approx(estimate.total, rel=0.15)


def test_memory_follows_the_settings() -> None:
    """With the smallest stage: what an estimate costs is the number of operations, whatever their size."""
    plain = rehearsal.estimate(small())
    wider = rehearsal.estimate(small(batch=4))
    assert wider.batch == 2 * plain.batch
    assert wider.activations > 1.7 * plain.activations
    assert wider.operations == pytest.approx(2 * plain.operations, rel=0.05)
    assert rehearsal.estimate(small(batch=4, accumulation=2)).activations < 1.2 * plain.activations
    assert rehearsal.estimate(small(batch=4), processes=2) == plain
    assert rehearsal.estimate(small(ema=0.9)).averaged == pytest.approx(plain.optimizer / 2, rel=0.01)
    assert rehearsal.estimate(small(optimizer="adamw8bit")).optimizer < 0.5 * plain.optimizer


def test_a_gpu_computes_norms_in_float32_also_where_they_are_computed_again() -> None:
    half = settings(precision="bfloat16", checkpointing="encoder")
    on_gpu = rehearsal.estimate(dataclasses.replace(half, device="cuda"))
    assert on_gpu.activations > 1.1 * rehearsal.estimate(half).activations


def test_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch=2 cannot be shared out evenly among 4 processes"):
        rehearsal.estimate(settings(), processes=4)


def test_plan_says_what_the_run_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = plan.describe(settings(steps=2880))
    lines = {line.strip().split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["base_widths = 32,32,32,32"]
    assert lines["16 pictures, 9.4 megapixels"]
    assert lines["1152.0 steps in an epoch; 2880 steps are 2.5 epochs"]
    stage = rehearsal.shapes_of(settings())
    trained = sum(value.numel() for value in stage.trainable().values())
    whole = sum(value.numel() for value in stage.module.parameters())
    total = [float(number) for number in lines["total"][1:]]
    assert total == pytest.approx([trained / 1e6, (whole - trained) / 1e6], abs=0.01)
    assert {"UNet LoRA", "VAE LoRA", "DPM", "SPM", "UNet", "VAE"} <= lines.keys()
    assert not list(tmp_path.iterdir())


def test_other_stages_have_a_plan_too(tmp_path: Path) -> None:
    assert "autoencoder" in plan.describe(small())
    base = {"steps": 1, "learning_rate": 1e-4, "out": tmp_path, "vae": tmp_path, "data": "synthetic"}
    with pytest.raises(ValueError, match="holds no autoencoder"):
        plan.describe(config.build(BaseSettings, base))


def test_measuring_finds_only_the_declared_parameters_moving() -> None:
    found = bench_step.measure(settings(steps=3))
    assert not found.strays
    assert len(found.moved) > 500
    assert found.peak > found.start > 0
    assert len(found.seconds) == 3


def test_a_base_on_the_autoencoder_of_a_file_can_be_planned(chain: Path, tmp_path: Path) -> None:
    file = chain / "nano" / "clearsr.safetensors"
    command = [f"--data={chain}/photographs", "--preset=nano_base", "--crop=64", "--batch=2", "--crops=2"]
    assert plan.main([*command, f"--vae={file}"]) == 0
    assert plan.main([*command, f"--vae={chain}/autoencoder/vae"]) == 0
    assert plan.main([*command, f"--vae={tmp_path}"]) == 1


def test_the_plan_of_a_decoder_names_its_discriminator(tmp_path: Path) -> None:
    """README promises `--dry-run` for every run."""
    (tmp_path / "init").mkdir()
    text = plan.describe(small(freeze_encoder=True, adversarial_weight=0.05, init=tmp_path / "init"))
    assert "discriminator  " in text


def test_a_number_of_processes_that_is_none_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert plan.main(["--preset=smoke", "--processes=x"]) == 1
    assert "--processes=x: give a number" in caplog.text
