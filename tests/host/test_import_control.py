"""An imported control network against ComfyUI's own ControlNet class with the same weights.

That class with eight input channels (x_t and the latent of the image side by side) and a silent hint block is DiffBIR's
control network. Its weights go through the import command, in a process of its own, and come back through the nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import clearsr_rig as rig
import comfy.cldm.cldm
import comfy.ops
import pytest
import torch
from clearsr_runs import NEGATIVE, POSITIVE, SMALL, apply, noise_like, predict

schedules = rig.module("nodes.schedules")
CFG = 4.0


def control_network(model, norm_groups: int):
    """ComfyUI's ControlNet of the model's layout, random in every weight, its hint block silent."""
    config = dict(model.model.model_config.unet_config)
    config.pop("out_channels")
    config["in_channels"] = 8
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    rig.module("nodes.self_contained").set_norm_groups(network, norm_groups)
    generator = torch.Generator().manual_seed(17)
    for name, value in network.named_parameters():
        fan_in = max(1, value[0].numel()) if value.ndim > 1 else 1
        drawn = torch.randn(value.shape, generator=generator) / fan_in**0.5
        if value.ndim == 1:
            drawn = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
        elif name.startswith(("zero_convs", "middle_block_out")):
            drawn = 0.2 * drawn  # residuals about as large as trained ones, so that 1e-5 means their rounding
        value.data = 0.0 * drawn if name.startswith("input_hint_block") else drawn
    return network.eval().requires_grad_(False)


def imported(network, base: Path, name: str) -> str:
    """Run the command on the network's weights in the ldm layout; return the name of the file in models/clearsr."""
    source = rig.BASE / "v2.pth"
    torch.save({key: value for key, value in network.state_dict().items() if "input_hint_block" not in key}, source)
    out = rig.MODELS / name
    command = [sys.executable, str(rig.ROOT / "training" / "import_control.py"), f"--weights={source}"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, f"--base={base}", f"--out={out}"], capture_output=True, text=True, env=environment, cwd=rig.BASE
    )
    assert done.returncode == 0, done.stderr
    return name


def residuals_of(network, x_t, x_lr, timestep, text):
    """ComfyUI's 12 + 1 residuals, finest first."""
    hint = torch.zeros(len(x_t), 3, 8 * x_t.shape[-2], 8 * x_t.shape[-1])
    found = network(x=torch.cat([x_t, x_lr], dim=1), hint=hint, timesteps=timestep, context=text)
    return [*found["output"], *found["middle"]]


def guided(loaded, x_lr, x, sigma, positive=POSITIVE, negative=NEGATIVE):
    """The guided estimate of x_0 of a state in ComfyUI's scale, by ComfyUI's own model and ControlNet.

    Each text is read by the UNet and by the control.
    """
    base = loaded["model"].model
    t = torch.full((len(x),), sigma)
    x_in, timestep = base.model_sampling.calculate_input(t, x), base.model_sampling.timestep(t).float()
    halves = []
    for ((text, _options),) in (positive, negative):
        text = text.expand(len(x), -1, -1)
        *down, middle = residuals_of(loaded["network"], x_in, x_lr, timestep, text)
        halves.append(base.apply_model(x, t, c_crossattn=text, control={"output": down, "middle": [middle]}))
    return halves[1] + CFG * (halves[0] - halves[1])


@pytest.fixture(scope="module")
def diffbir(tiny):
    """The narrow control network, ComfyUI's and ours."""
    network = control_network(tiny["model"], norm_groups=8)
    name = imported(network, rig.MODELS / tiny["name"], "imported.safetensors")
    model, vae, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    return {"network": network, "name": name, "model": model, "vae": vae, "clearsr": clearsr}


@pytest.fixture(scope="module")
def encoded(diffbir):
    latent, _ = rig.run("ClearSRLREncode", clearsr=diffbir["clearsr"], image=rig.images(2, 64, 48), scale=1.0)
    return latent


def close(ours, theirs, tolerance: float = 1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def compare_residuals(diffbir, height: int, width: int, batch: int) -> float:
    """Compare all residuals; return the largest difference."""
    generator = torch.Generator().manual_seed(3)
    config = diffbir["clearsr"].config.control
    x_t, x_lr = torch.randn(2, batch, 4, height, width, generator=generator)
    text = torch.randn(batch, 7, config.context_dim, generator=generator)
    timestep = torch.tensor([981.0, 421.0, 1.0])[:batch]
    ours = diffbir["clearsr"].control.model(x_lr, timestep, text, x_t)
    theirs = residuals_of(diffbir["network"], x_t, x_lr, timestep, text)
    assert len(theirs) == 13 and all(float(residual.std()) > 1e-2 for residual in theirs)
    for one, other in zip((*ours.down, ours.mid), theirs, strict=True):
        close(one, other)
    return max(float((one - other).abs().max()) for one, other in zip((*ours.down, ours.mid), theirs, strict=True))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (10, 14), (8, 33)])
@pytest.mark.parametrize("batch", [1, 3])
def test_residuals(diffbir, height, width, batch) -> None:
    compare_residuals(diffbir, height, width, batch)


@pytest.mark.parametrize("sigma", [14.0, 3.0, 0.2])
def test_guided_prediction(diffbir, encoded, sigma) -> None:
    """Both texts, cfg 4: DPM reads the text of each conditioning, as the UNet does."""
    noise = noise_like(encoded)
    model = apply(diffbir, encoded)
    x_lr = diffbir["model"].model.process_latent_in(encoded["samples"])
    expected = guided(diffbir, x_lr, sigma * noise, sigma)
    ours = diffbir["model"].model.process_latent_in(predict(model, noise, cfg=CFG, sigma=sigma))
    close(ours, expected, 5e-5)  # guidance multiplies rounding by 7


def test_the_text_of_each_conditioning_matters(diffbir, encoded) -> None:
    """What the test above would not see if the control's text did nothing."""
    config = diffbir["clearsr"].config
    noise, model = noise_like(encoded), apply(diffbir, encoded)
    with rig.count_calls(diffbir["clearsr"].control.model, "forward") as calls:
        predict(model, noise, cfg=CFG)
    texts = torch.cat([arguments[2] for arguments, _ in calls])
    assert config.control.control_text == "conditioning"
    seen = {tuple(text.flatten()[:4].tolist()) for text in texts}
    wanted = {tuple(text[0][0].flatten()[:4].tolist()) for text in (POSITIVE, NEGATIVE)}
    assert seen == wanted
    assert sum(len(arguments[0]) for arguments, _ in calls) == 2 * len(noise)  # two control passes


def test_equal_texts_share_the_control(diffbir, encoded) -> None:
    noise, model = noise_like(encoded), apply(diffbir, encoded)
    with rig.count_calls(diffbir["clearsr"].control.model, "forward") as calls:
        predict(model, noise, cfg=CFG, negative=POSITIVE)
    assert sum(len(arguments[0]) for arguments, _ in calls) == len(noise)


def test_steps_of_the_sampler_are_those_of_comfyui_s_ddpm(diffbir, encoded) -> None:
    """LSA KSampler as the template sets it, against the same loop over ComfyUI's own model and ControlNet."""
    steps, seed = 4, 3
    sampled = rig.run(
        "ClearSRLSAKSampler",
        model=apply(diffbir, encoded),
        lr_latent=encoded,
        seed=seed,
        steps=steps,
        cfg=CFG,
        scheduler="ddpm_linspace",
        alpha=0.0,
        beta=0.0,
        start_from_lr=False,
        positive=POSITIVE,
        negative=NEGATIVE,
    )["samples"]

    base = diffbir["model"].model
    x_lr = base.process_latent_in(encoded["samples"])
    sigmas = schedules.spaced_sigmas("test", diffbir["model"], steps, "ddpm_linspace")
    noise = rig.comfy.sample.prepare_noise(encoded["samples"], seed)
    generators = [torch.Generator().manual_seed(row) for row in rig.module("nodes.lsa_sampler").row_seeds(seed, (0, 1))]
    # Variance-preserving, as the paper of DDPM writes it.
    x = noise.clone()
    for sigma, after in zip(sigmas[:-1].double(), sigmas[1:].double(), strict=True):
        x_ve = (x * (1.0 + sigma**2).sqrt()).float()
        denoised = guided(diffbir, x_lr, x_ve, float(sigma))
        bar, bar_after = 1.0 / (1.0 + sigma**2), 1.0 / (1.0 + after**2)
        ratio = bar / bar_after
        mean = (bar_after.sqrt() * (1 - ratio) * denoised + ratio.sqrt() * (1 - bar_after) * x) / (1 - bar)
        fresh = torch.cat([torch.randn(1, *x.shape[1:], generator=generator) for generator in generators])
        spread = ((1 - bar_after) / (1 - bar) * (1 - ratio)).sqrt()
        x = denoised.double() if float(after) == 0.0 else mean + spread * fresh
    close(base.process_latent_in(sampled), x.float(), 5e-4)


# ---- what the nodes say ---------------------------------------------------------------------------------------------


def run_with(diffbir, encoded, caplog, **changes) -> list[str]:
    """Sample one step with the recommended settings and `changes`; return the warnings of LSA KSampler."""
    settings = {
        "steps": 50,
        "cfg": 4.0,
        "scheduler": "ddpm_linspace",
        "start_from_lr": False,
        "alpha": 0.0,
        "beta": 0.0,
        "positive": POSITIVE,
        "negative": NEGATIVE,
        "model": apply(diffbir, encoded),
        **changes,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        # The steps themselves are not of interest here.
        patch.setattr(rig.comfy.sample, "sample_custom", lambda _model, noise, *_rest, **_more: noise)
        rig.run("ClearSRLSAKSampler", lr_latent=encoded, **settings)
    return [message for message in caplog.messages if "was made for other settings" in message]


def test_recommended_settings_give_no_warning(diffbir, encoded, caplog) -> None:
    assert run_with(diffbir, encoded, caplog) == []
    assert run_with(diffbir, encoded, caplog, steps=20, cfg=7.0, sampler_name="dpmpp_2m", alpha=0.02) == []
    assert run_with(diffbir, encoded, caplog, start_from_lr=True, denoise=0.5) == []  # x_lr is where that run starts


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scheduler": "ddpm_leading"}, "scheduler is ddpm_leading instead of ddpm_linspace"),
        ({"scheduler": "karras"}, "scheduler is karras instead of ddpm_linspace"),
        ({"steps": 10}, "steps is 10, far below 50"),
        ({"cfg": 1.0}, "cfg is 1 instead of 4"),
        ({"cfg": 9.0}, "cfg is 9 instead of 4"),
        ({"start_from_lr": True}, "start_from_lr is on instead of off"),
        ({"positive": None}, "positive is not connected"),
        ({"positive": None, "negative": None}, "positive and negative are not connected"),
    ],
)
def test_each_setting_that_matters_is_warned_of(diffbir, encoded, caplog, changes, text) -> None:
    (warning,) = run_with(diffbir, encoded, caplog, **changes)
    assert warning.startswith("LSA KSampler: 'imported.safetensors' was made for other settings")
    assert text in warning


def test_the_defaults_of_the_node_give_one_warning_of_all(diffbir, encoded, caplog) -> None:
    defaults = dict.fromkeys(("cfg", "scheduler", "start_from_lr", "positive", "negative"))
    (warning,) = run_with(diffbir, encoded, caplog, **defaults)
    for text in ("scheduler", "cfg", "start_from_lr", "positive and negative"):
        assert text in warning


def test_files_of_this_pack_s_training_give_no_such_warning(tiny, lr, caplog) -> None:
    assert run_with(tiny, lr["latent"], caplog, cfg=1.0, scheduler="karras", positive=None) == []


def test_the_loader_says_what_the_file_is(diffbir, caplog) -> None:
    caplog.set_level("INFO", "clearsr")
    rig.run("ClearSRLoader", checkpoint=diffbir["name"])
    assert any("this is DiffBIR's control network (v2, Apache-2.0), imported" in text for text in caplog.messages)


def test_a_conditioning_without_text_is_refused(diffbir, encoded) -> None:
    model = apply(diffbir, encoded)
    no_text = [[None, {}]]
    with pytest.raises(ValueError, match="reads the text of the conditioning, and a conditioning of this run has none"):
        predict(model, noise_like(encoded), positive=no_text)


def test_the_control_is_kept_between_steps_by_its_text(diffbir, encoded) -> None:
    """control_every computes once for several steps, for each text anew."""
    with rig.count_calls(diffbir["clearsr"].control.model, "forward") as calls:
        rig.run(
            "ClearSRLSAKSampler",
            model=apply(diffbir, encoded, control_every=2),
            lr_latent=encoded,
            steps=4,
            cfg=CFG,
            alpha=0.0,
            beta=0.0,
            positive=POSITIVE,
            negative=NEGATIVE,
        )
    assert sum(len(arguments[0]) for arguments, _ in calls) == 2 * 2 * len(encoded["samples"])


def test_tiles_read_the_text_of_their_conditioning(diffbir) -> None:
    """Tiles read both texts; a single tile equals sampling in one piece, bit for bit."""
    latent, _ = rig.run("ClearSRLREncode", clearsr=diffbir["clearsr"], image=rig.images(1, 192, 128), scale=1.0)
    noise = noise_like(latent)
    whole = predict(apply(diffbir, latent), noise, cfg=CFG)
    assert torch.equal(predict(apply(diffbir, latent, tile_size=1024), noise, cfg=CFG), whole)
    tiled = predict(apply(diffbir, latent, **SMALL, tiles_per_batch=2), noise, cfg=CFG)
    alone = predict(apply(diffbir, latent, **SMALL), noise, cfg=CFG)
    close(tiled, alone, 1e-4)
    assert not torch.equal(tiled, whole)


# ---- full size ------------------------------------------------------------------------------------------------------


@pytest.mark.large
def test_full_size() -> None:
    """SD 2.1's size: residuals and guided prediction, with time and memory. Needs 14 GiB and some minutes."""
    python, base = sys.executable, rig.BASE / "models"
    began = time.monotonic()
    subprocess.run(
        [python, "-m", "training.full_size", f"--out={base}", "--parts=base"], check=True, cwd=rig.ROOT, timeout=900
    )
    checkpoint = base / "checkpoints" / "v2-1_512-ema-pruned.safetensors"
    rig.module("nodes.loader").folder_paths.filename_list_cache.clear()
    model, _clip, vae = rig.run("CheckpointLoaderSimple", ckpt_name=checkpoint.name)
    network = control_network(model, norm_groups=32)
    made = time.monotonic()
    name = imported(network, checkpoint, "full_size.safetensors")
    done = time.monotonic()
    adapted, _, clearsr = rig.run("ClearSRLoader", checkpoint=name, model=model, vae=vae)
    loaded = {"network": network, "model": adapted, "clearsr": clearsr}
    sys.stdout.write(f"\nmade {made - began:.0f} s, imported {done - made:.0f} s\n")

    for height, width, batch in ((64, 64, 1), (40, 56, 2)):
        largest = compare_residuals(loaded, height, width, batch)
        sys.stdout.write(f"residuals {height} x {width}, batch {batch}: largest difference {largest:.2e}\n")

    texts = [[[torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(seed)), {}]] for seed in (1, 2)]
    latent = {"samples": torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(8)) / 0.18215}
    noise = noise_like(latent)
    x_lr = model.model.process_latent_in(latent["samples"])
    expected = guided(loaded, x_lr, 3.0 * noise, 3.0, *texts)
    began = time.monotonic()
    ours = model.model.process_latent_in(predict(apply(loaded, latent), noise, CFG, *texts, sigma=3.0))
    difference = float((ours - expected).abs().max())
    memory = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    sys.stdout.write(f"guided x_0: largest difference {difference:.2e}, {time.monotonic() - began:.0f} s; {memory}\n")
    close(ours, expected, 1e-3)
