"""Ways to sample with the finished model, side by side: what the paper leaves open about the sampler (0006 to 0009)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from clearsr_core.lsa import LSAConfig
from clearsr_core.schedule import Spacing

from .. import config, models, provenance
from ..clearsr_model import ClearSRModel
from ..picture_files import read_pixels, to_bytes, write_png
from ..pipeline import ColorFix, Target, bound_eps, encode_lr, noise_sources, pad_to_grid, sample, to_pixels
from ..tables import REFERENCE, Results
from . import finished, results, work
from .experiments import Experiment
from .work import Work


@dataclass(frozen=True)
class Way:
    """One way to sample; the defaults are the paper's, without LSA."""

    steps: int = 50
    denoise: float = 1.0
    spacing: Spacing = "leading"
    start_from_lr: bool = True  # False: from noise alone
    cfg: float = 1.0
    anchor: Literal["file", "lr_encoder", "plain"] = "file"  # encoder of x_lr of start and LSA
    target: Target = "step"
    alpha: float = 0.0
    beta: float = 0.0
    ela_end: float = 0.3
    lla_start: float = 0.88
    accumulate: Literal["per_step", "over_phase"] = "per_step"
    color_fix: ColorFix = "none"
    seed: int = 0

    @property
    def lsa(self) -> LSAConfig:
        """Return its strengths and phases."""
        return LSAConfig(self.alpha, self.beta, self.ela_end, self.lla_start, self.accumulate)


def ways(settings: dict[str, Any]) -> dict[str, Way]:
    """Return name -> way, of an experiment's settings: those of all of them, and the `ways`, which differ from them."""
    shared = {key: value for key, value in settings.items() if key != "ways"}
    return {name: config.build(Way, shared, differs) for name, differs in settings["ways"].items()}


@torch.no_grad()
def restored(model: ClearSRModel, lr_images: Tensor, way: Way) -> Tensor:
    """Upscale (B, 3, h, w) pictures in [0, 1] by four; return (B, 3, 4 h, 4 w) in [0, 1]."""
    encoded = encode_lr(model, lr_images)
    anchor = encoded.anchor
    if way.anchor == "lr_encoder":
        anchor = encoded.lr_latent
    elif way.anchor == "plain":
        anchor = models.encode(model.vae, pad_to_grid(encoded.upscaled) * 2.0 - 1.0)
    start_noise, generator = noise_sources(encoded.lr_latent.shape, way.seed)
    x_0 = sample(
        bound_eps(model, encoded, way.cfg),
        encoded.lr_latent,
        start_noise,
        generator,
        steps=way.steps,
        spacing=way.spacing,
        denoise=way.denoise,
        lsa=way.lsa,
        target=way.target,
        anchor=anchor,
        start_from_lr=way.start_from_lr,
    )
    return to_pixels(model, x_0, encoded, way.color_fix)


def sampling(experiment: Experiment, here: Work) -> results.Stored:
    """Restore and measure the pictures in every way."""
    named = ways(experiment.settings(here.budget))
    found: Results = {REFERENCE: work.measured_reference(here)}
    progress = work.Progress(len(named))
    model = None
    for name, way in named.items():
        progress.begin(f"{experiment.name}, {name}")
        folder = here.here / "ways" / experiment.name / name
        provenance.claim(folder, {**asdict(way), "checkpoint": here.sha256})
        missing = [pair for pair in here.pairs if not _picture(folder, pair.name).is_file()]
        for pair in tqdm(missing, unit="picture", desc=name, leave=False):
            model = model or ClearSRModel.from_checkpoint(here.checkpoint)
            write_png(to_bytes(restored(model, read_pixels(pair.lr), way)[0]), _picture(folder, pair.name))
        found[name] = work.measured(here, name, folder, here.here / "measured" / experiment.name / f"{name}.json")
        progress.end(repeated=not missing)
    return finished.store(experiment, here, found)


def _picture(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"
