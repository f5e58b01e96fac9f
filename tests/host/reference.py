"""Runs the diffusers reference pipeline in its own process: checkpoint, picture, seed, steps -> latents and result.

Usage: python reference.py ROOT CHECKPOINT INPUT.safetensors OUTPUT.safetensors SEED STEPS ELA LLA DENOISE TARGET
"""

from __future__ import annotations

import sys

sys.path.insert(0, sys.argv[1])

import torch
from safetensors.torch import load_file, save_file

from clearsr_core.lsa import LSAConfig
from training import models
from training.clearsr_model import ClearSRModel
from training.pipeline import noise_sources, pad_to_grid, sample, upscale_lr

checkpoint, source, target = sys.argv[2:5]
seed, steps = int(sys.argv[5]), int(sys.argv[6])
ela_strength, lla_strength, denoise = map(float, sys.argv[7:10])
with torch.inference_mode():
    model = ClearSRModel.from_checkpoint(checkpoint)  # type: ignore[arg-type]
    images = load_file(source)["image"].movedim(-1, 1)
    upscaled = upscale_lr(images, (images.shape[-2] * 4, images.shape[-1] * 4))
    lr_latent = model.lr_encoder(pad_to_grid(upscaled) * 2.0 - 1.0)
    prompt = model.image_prompt(upscaled)
    noise, generator = noise_sources(lr_latent.shape, seed)
    x_0 = sample(
        lambda x_t, t: model.eps(x_t, t, lr_latent, prompt),
        lr_latent,
        noise,
        generator,
        steps=steps,
        denoise=denoise,
        lsa=LSAConfig(ela_strength, lla_strength),
        target=sys.argv[10],  # type: ignore[arg-type]
    )
    results = {"lr_latent": lr_latent, "x_0": x_0, "image": models.decode(model.vae, x_0)}
    save_file({name: value.contiguous() for name, value in results.items()}, target)
