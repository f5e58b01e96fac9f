"""Runs the reference pipeline of `training` in its own process: checkpoint, picture, seed, steps -> what it makes.

Usage: python reference.py ROOT CHECKPOINT INPUT.safetensors OUTPUT.safetensors SEED STEPS ELA LLA DENOISE TARGET
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import torch
from safetensors.torch import load_file, save_file

from clearsr_core.lsa import LSAConfig
from training.clearsr_model import ClearSRModel
from training.pipeline import bound_eps, encode_lr, noise_sources, sample, to_pixels

checkpoint, source, target = sys.argv[2:5]
seed, steps = int(sys.argv[5]), int(sys.argv[6])
ela_strength, lla_strength, denoise = map(float, sys.argv[7:10])
with torch.inference_mode():
    model = ClearSRModel.from_checkpoint(Path(checkpoint))
    encoded = encode_lr(model, load_file(source)["image"].movedim(-1, 1))
    noise, generator = noise_sources(encoded.lr_latent.shape, seed)
    x_0 = sample(
        bound_eps(model, encoded),
        encoded.lr_latent,
        noise,
        generator,
        steps=steps,
        denoise=denoise,
        lsa=LSAConfig(ela_strength, lla_strength),
        anchor=encoded.anchor,
        target=sys.argv[10],  # type: ignore[arg-type]
    )
    results = {"lr_latent": encoded.lr_latent, "x_0": x_0}
    for color_fix in ("none", "adain", "wavelet", "lab"):
        results[color_fix] = to_pixels(model, x_0, encoded, color_fix).movedim(1, -1)
    save_file({name: value.contiguous() for name, value in results.items()}, target)
