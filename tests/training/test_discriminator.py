"""The decoder stage against a discriminator and with disturbed latents: who moves whom, and that resuming is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import config, models, snapshot, train
from training.autoencoder import AutoencoderSettings, AutoencoderStage
from training.base_model import BaseModel
from training.discriminator import PatchDiscriminator, adversarial_losses, spectral_norm


def _decoder(chain: Path, out: Path, steps: int, *settings: str) -> list[str]:
    """Return the command that trains the decoder of the chain's file against a discriminator."""
    command = ["--preset=nano_autoencoder", "--widths=32,32,32,32", "--freeze_encoder=true", f"--out={out}"]
    command += [f"--data={chain}/photographs", "--threads=1", "--crop=64", "--batch=2", "--validate_every=0"]
    command += [f"--init={chain}/nano/clearsr.safetensors", f"--steps={steps}", "--adversarial_weight=0.05"]
    return [*command, "--latent_noise=0.3", "--adversarial_start=1", "--discriminator_width=4", "--warmup=0", *settings]


def _stage(chain: Path, **changes: str) -> AutoencoderStage:
    values = {"widths": "32,32,32,32", "crop": "64", "batch": "2", "data": str(chain / "photographs"), "out": "unused"}
    table: dict[str, object] = {"steps": 1, "learning_rate": 1e-4, "freeze_encoder": True, "adversarial_weight": 0.05}
    table["init"] = chain / "nano" / "clearsr.safetensors"  # of which nobody takes the weights here
    settings = config.build(AutoencoderSettings, {**table, **values}, dict(changes))
    stage = AutoencoderStage(settings)
    stage.start(range(settings.batch))
    return stage


@pytest.fixture
def judge() -> PatchDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PatchDiscriminator(4)


def _pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_one_judgement_for_every_eight_pixels(judge: PatchDiscriminator) -> None:
    assert judge(_pictures(0)).shape == (2, 1, 4, 6)


def test_a_judgement_rests_on_40_pixels(judge: PatchDiscriminator) -> None:
    pictures = torch.zeros(1, 3, 96, 96, requires_grad=True)
    judge(pictures)[0, 0, 6, 6].backward()
    assert pictures.grad is not None
    rows = pictures.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 40


def test_spectral_norm_is_the_largest_singular_value(judge: PatchDiscriminator) -> None:
    for layer in judge.layers:
        weight = layer.weight.detach()  # type: ignore[union-attr]
        expected = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
        torch.testing.assert_close(spectral_norm(weight), expected, rtol=1e-4, atol=1e-6)


def test_larger_weights_judge_the_same(judge: PatchDiscriminator) -> None:
    before = judge(_pictures(0))
    with torch.no_grad():
        for layer in judge.layers:
            layer.weight *= 7.0  # type: ignore[union-attr,operator]
    torch.testing.assert_close(judge(_pictures(0)), before, rtol=1e-4, atol=1e-5)


def test_each_loss_moves_its_own_side_only(judge: PatchDiscriminator) -> None:
    restored = _pictures(1).requires_grad_()
    decoder, discriminator = adversarial_losses(judge, restored, _pictures(0))
    decoder.backward()
    assert restored.grad is not None
    assert restored.grad.any()
    assert all(parameter.grad is None for parameter in judge.parameters())
    restored.grad = None
    discriminator.backward()
    assert restored.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in judge.parameters())


def test_hinge_losses_by_hand(judge: PatchDiscriminator) -> None:
    restored, images = _pictures(1), _pictures(0)
    decoder, discriminator = adversarial_losses(judge, restored, images)
    fake, real = judge(restored), judge(images)
    torch.testing.assert_close(decoder, -fake.mean())
    torch.testing.assert_close(discriminator, torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())


def test_the_discriminator_learns_before_the_decoder_hears_it(chain: Path) -> None:
    """Up to `adversarial_start` the decoder's gradient is that of a run without a discriminator."""

    def gradients(step: int, **changes: str) -> dict[str, torch.Tensor]:
        stage = _stage(chain, **changes)
        batch = stage.make(0)._replace(heard=stage.make(step).heard)
        stage.module(batch)[0].backward()
        return {name: value.grad for name, value in stage.trainable().items() if value.grad is not None}

    plain = gradients(0, adversarial_weight="0")
    early, late = (gradients(step, adversarial_start="5") for step in (4, 5))
    assert any(name.startswith("discriminator.") for name in early)
    assert not any(name.startswith("discriminator.") for name in plain)
    name = "decoder.conv_out.weight"
    assert torch.equal(early[name], plain[name])
    assert not torch.equal(late[name], plain[name])


def test_a_resumed_run_is_the_same_run_discriminator_included(chain: Path, tmp_path: Path) -> None:
    for out, steps in (("whole", 3), ("halves", 2), ("halves", 3)):
        assert train.main(_decoder(chain, tmp_path / out, steps, "--decay=constant")) == 0
    whole, halves = (
        snapshot.read(tmp_path / out / "state_00000003.safetensors").tensors for out in ("whole", "halves")
    )
    assert "optimizer.exp_avg.discriminator.layers.0.weight" in whole
    assert whole.keys() == halves.keys()
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())


def test_result_holds_the_autoencoder_alone_and_only_the_decoder_moved(chain: Path, tmp_path: Path) -> None:
    assert train.main([*_decoder(chain, tmp_path, 2), "--ema=0"]) == 0
    after = models.AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    start = BaseModel.load(chain / "nano" / "clearsr.safetensors").vae.state_dict()
    assert start.keys() == after.keys()
    moved = {name.partition(".")[0] for name, value in start.items() if not torch.equal(value, after[name])}
    assert moved == {"decoder", "post_quant_conv"}


def test_latents_are_disturbed_up_to_the_given_strength(chain: Path) -> None:
    quiet, noisy = (_stage(chain, batch="64", latent_noise=noise).make(0).disturbance for noise in ("0", "0.3"))
    assert not quiet.any()
    strengths = noisy.flatten(1).std(dim=1)
    assert strengths.max() < 0.35
    assert strengths.max() > 0.25
    assert strengths.min() < 0.05


def test_the_decoder_sees_the_disturbed_latent(chain: Path) -> None:
    stages = [_stage(chain, latent_noise=noise) for noise in ("0", "3")]
    figures = [stage.module(stage.make(0))[1] for stage in stages]
    assert figures[0]["l1"] != figures[1]["l1"]


def test_the_norm_is_taken_in_float32_under_autocast() -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = spectral_norm(weight)
    assert half.dtype == torch.float32
    assert torch.equal(half, spectral_norm(weight))
