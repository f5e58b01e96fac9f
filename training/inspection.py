"""What the control carries of x_lr: D_kl, PCA views and power spectra (Figs. 2, 4, 8, 9; Eq. 5; App. B, C).

    python -m training.inspection --checkpoint=FILE --lr=LR --out=out/inspection --limit=20
    python -m training.inspection --checkpoint=FILE --against=CONTROLNET_FILE --lr=LR --hr=HR --out=out/inspection

One file: DPM, SPM and their sum beside each other. Two files: also Diff = D_kl(against) - D_kl(checkpoint), per picture
(Eq. 5). Every model is held against the x_lr of its own encoder. No sampling is done; `--results` takes finished ones.
"""

from __future__ import annotations

import csv
import json
import logging
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from clearsr_core.layers import TransformerBlock
from clearsr_core.schedule import NUM_TRAIN_TIMESTEPS, add_noise

from . import analysis, command_line, config, evaluate, loop, models, plots
from .clearsr_model import ClearSRModel
from .config import first
from .picture_files import read_pixels
from .pipeline import EncodedLR, encode_lr, noise_sources, pad_to_grid

log = logging.getLogger("clearsr.training")

WHOLE = "DPM + SPM"  # what the UNet gets: x_c
OURS, AGAINST = "checkpoint", "against"


@dataclass(frozen=True)
class InspectSettings:
    """Which models to look into, with which pictures."""

    checkpoint: Path  # a self-contained ClearSR file
    lr: Path  # pictures
    out: Path  # folder for tables, curves and sheets
    against: Path = Path()  # the ControlNet of Eq. 5, or any other file; empty = none
    hr: Path = Path()  # good partners of the pictures: the spectrum of their latents; empty = none
    results: Path = Path()  # finished pictures of `training.restore`, for the same; empty = none
    timestep: int = 500  # at which the control is computed, 0 .. 999; a model of fixed time does not read it
    sheets: int = 8  # PCA and spectrum sheets are made of so many pictures
    limit: int = 0  # only the first pictures by name; 0 = all
    seed: int = 0  # of the noise in x_t, which only models with control_input = "lr+xt" read
    threads: int = 0  # of the CPU; 0 = torch's default


@dataclass
class Findings:
    """What is collected over the pictures."""

    divergences: list[tuple[str, str, str, list[float]]] = field(default_factory=list)  # picture, model, part, per c_k
    spectra: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # (panel, curve) -> rings

    def add_spectrum(self, panel: str, curve: str, features: Tensor) -> None:
        """Note the relative spectrum of (C, h, w); maps too small to have one are left out."""
        if min(features.shape[1:]) >= 4:
            self.spectra.setdefault((panel, curve), []).append(analysis.relative_spectrum(features))


@torch.no_grad()
def control_parts(model: ClearSRModel, encoded: EncodedLR, timestep: int, seed: int) -> dict[str, list[Tensor]]:
    """Return the residuals c_1, c_2, ... of one picture, each (C_k, h_k, w_k): of the sum, and of DPM and SPM alone."""
    noise, _ = noise_sources(encoded.lr_latent.shape, seed)
    x_t = add_noise(encoded.anchor, noise.to(encoded.anchor), timestep)

    def run(dpm_strength: float = 1.0, spm_strength: float = 1.0) -> list[Tensor]:
        residuals = model.control(
            encoded.lr_latent,
            torch.tensor([timestep]),
            model.null_text.expand(1, -1, -1),
            x_t,
            dpm_strength=dpm_strength,
            spm_strength=spm_strength,
        )
        return [residual[0] for residual in (*residuals.down, residuals.mid)]

    if model.control.dpm is None or model.control.spm is None:
        return {"SPM" if model.control.dpm is None else "DPM": run()}
    detail, structure = run(spm_strength=0.0), run(dpm_strength=0.0)
    return {"DPM": detail, "SPM": structure, WHOLE: [d + s for d, s in zip(detail, structure, strict=True)]}


@contextmanager
def window_attention_features(model: ClearSRModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect DPM's features before and after each window cross-attention layer (Fig. 4), (C, h, w) each, in order."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = []
    for block in model.control.modules():
        if not isinstance(block, TransformerBlock) or block.window_attention is None or block.norm_window is None:
            continue
        before: list[Tensor] = []

        def keep(_module: nn.Module, inputs: tuple, _output: Tensor, before: list[Tensor] = before) -> None:
            before[:] = [inputs[0]]

        def note(_module: nn.Module, inputs: tuple, output: Tensor, before: list[Tensor] = before) -> None:
            pair = (before[0], before[0] + output)  # (B, L, C)
            first, second = (tokens[0].T.unflatten(1, inputs[1]) for tokens in pair)
            seen.append((first, second))

        handles += [block.norm_window.register_forward_hook(keep), block.window_attention.register_forward_hook(note)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _size(lr_latent: Tensor, features: Tensor) -> str:
    """Say how much coarser than x_lr a feature map is."""
    ratio = round(lr_latent.shape[-1] / features.shape[-1])
    return "side of x_lr" if ratio == 1 else f"side 1/{ratio}"


def inspect_picture(
    name: str, loaded: dict[str, ClearSRModel], lr: Path, settings: InspectSettings, findings: Findings, sheet: bool
) -> None:
    """Add one picture to `findings`; write its PCA and spectrum sheets if `sheet`."""
    pixels = read_pixels(lr)
    pca_rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    power_rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    picture = pixels[0].permute(1, 2, 0).numpy()
    for label, model in loaded.items():
        of = f"{label}: " if len(loaded) > 1 else ""
        encoded = encode_lr(model, pixels, evaluate.SCALE)
        lr_latent = encoded.lr_latent[0]
        findings.add_spectrum("latents", f"{of}x_lr", lr_latent)
        with window_attention_features(model) as attention:
            parts = control_parts(model, encoded, settings.timestep, settings.seed)
        for before, after in attention:
            panel = f"DPM's window attention, {_size(lr_latent, before)}"
            findings.add_spectrum(panel, f"{of}before", before)
            findings.add_spectrum(panel, f"{of}after", after)
        for part, residuals in parts.items():
            findings.divergences.append((name, label, part, analysis.control_divergence(lr_latent, residuals)))
            for residual in residuals:
                findings.add_spectrum(f"control, {_size(lr_latent, residual)}", f"{of}{part}", residual)
            if sheet:
                for rows, view in ((pca_rows, analysis.pca_picture), (power_rows, _power_picture)):
                    shown = [("LR", picture), ("x_lr", view(lr_latent).numpy())]
                    shown += [(f"c_{k}", view(c).numpy()) for k, c in enumerate(residuals, start=1)]
                    rows.append((f"{of}{part}", shown))
    if sheet:
        plots.write_pictures(settings.out / f"pca_{name}.png", pca_rows)
        plots.write_pictures(settings.out / f"spectrum_{name}.png", power_rows)


def _power_picture(features: Tensor) -> Tensor:
    """Return the power spectrum of (C, h, w) as a grey picture, (h, w) in [0, 1]."""
    spectrum = analysis.power_spectrum(features)
    low, high = spectrum.min(), spectrum.max()
    return (spectrum - low) / torch.where(high > low, high - low, 1.0)


def encode_good(model: ClearSRModel, path: Path) -> Tensor:
    """Return the plain encoder's latent of a full-size picture, (4, h, w) in model units."""
    return models.encode(model.vae, pad_to_grid(read_pixels(path)) * 2.0 - 1.0)[0]


def mean_curve(rings: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Average radial means of maps of any sizes, on the radii of the smallest one."""
    radii = min((radii for radii, _ in rings), key=len).numpy()
    return radii, np.mean([np.interp(radii, own.numpy(), values.numpy()) for own, values in rings], axis=0)


def differences(findings: Findings) -> dict[str, float]:
    """Return Diff(I) = D_kl(against) - D_kl(checkpoint) of every picture (Eq. 5), of the whole control of both."""
    whole: dict[str, dict[str, float]] = {OURS: {}, AGAINST: {}}
    for name, label, _, values in findings.divergences:
        whole[label][name] = statistics.fmean(values)  # the last part of a model is its whole control
    return {name: value - whole[OURS][name] for name, value in whole[AGAINST].items()}


def write_findings(settings: InspectSettings, findings: Findings) -> None:
    """Write inspection.json, dkl.csv, spectra.csv and the plots."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / "dkl.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["picture", "model", "part", "residual", "d_kl"])
        for name, label, part, values in findings.divergences:
            writer.writerows([name, label, part, k, f"{value:.6f}"] for k, value in enumerate(values, start=1))

    # Means over the pictures.
    tables: dict[tuple[str, str], list[list[float]]] = {}
    for _, label, part, values in findings.divergences:
        tables.setdefault((label, part), []).append(values)
    levels = {key: [statistics.fmean(column) for column in zip(*rows, strict=True)] for key, rows in tables.items()}
    means: dict[str, dict[str, float]] = {}
    for (label, part), values in levels.items():
        means.setdefault(label, {})[part] = statistics.fmean(values)
        log.info("D_kl of %s, %s: %.4f", label, part, means[label][part])
    content: dict[str, object] = {"settings": loop.plain(settings), "d_kl": means}
    curves = [
        plots.Curve(
            f"{label}: {part}" if len(means) > 1 else part, range(1, len(values) + 1), values, dashed=label == AGAINST
        )
        for (label, part), values in levels.items()
    ]
    plots.write_curves(settings.out / "dkl.png", [plots.Panel("D_kl of the control", curves, "c_k", "nats")])

    if AGAINST in means:
        diff = differences(findings)
        mean, above = statistics.fmean(diff.values()), sum(value > 0 for value in diff.values())
        content["diff"] = {"mean": mean, "above_zero": above, "pictures": diff}
        log.info("Diff (Eq. 5): mean %.4f, above 0 for %d of %d pictures.", mean, above, len(diff))
        title = "Diff = D_kl(against) - D_kl(checkpoint)"
        plots.write_bars(settings.out / "diff.png", title, "nats", list(diff), list(diff.values()))
    (settings.out / "inspection.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_spectra(settings.out, findings)


def write_spectra(out: Path, findings: Findings) -> None:
    """Write spectra.csv and spectra.png."""
    panels: dict[str, list[plots.Curve]] = {}
    with (out / "spectra.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["of", "curve", "frequency", "log_power_minus_value_at_0"])
        for (panel, curve), rings in findings.spectra.items():
            radii, values = mean_curve(rings)
            writer.writerows([panel, curve, f"{r:.6f}", f"{value:.6f}"] for r, value in zip(radii, values, strict=True))
            panels.setdefault(panel, []).append(plots.Curve(curve, radii.tolist(), values.tolist()))
    if panels:
        axes = ("frequency, share of the highest", "log power minus value at 0")
        plots.write_curves(out / "spectra.png", [plots.Panel(name, found, *axes) for name, found in panels.items()])


def run(settings: InspectSettings) -> None:
    """Look into every picture, then write."""
    if not 0 <= settings.timestep < NUM_TRAIN_TIMESTEPS:
        raise config.ConfigError(f"--timestep={settings.timestep} is not in 0 .. {NUM_TRAIN_TIMESTEPS - 1}.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pictures = first(list(evaluate.pictures(settings.lr, "--lr").items()), settings.limit)
    partners = {
        curve: evaluate.pictures(folder, option)
        for curve, folder, option in (("HR", settings.hr, "--hr"), ("result", settings.results, "--results"))
        if folder != Path()
    }
    for curve, found in partners.items():
        missing = [name for name, _ in pictures if name not in found]
        if missing:
            raise evaluate.EvaluationError(f"There is no {curve} picture for {missing[0]} ({len(missing)} missing).")
    loaded = {OURS: ClearSRModel.from_checkpoint(settings.checkpoint)}
    if settings.against != Path():
        loaded[AGAINST] = ClearSRModel.from_checkpoint(settings.against)
    findings = Findings()
    with torch.no_grad():
        for index, (name, path) in enumerate(tqdm(pictures, unit="picture")):
            inspect_picture(name, loaded, path, settings, findings, index < settings.sheets)
            for curve, found in partners.items():
                findings.add_spectrum("latents", curve, encode_good(loaded[OURS], found[name]))
    write_findings(settings, findings)


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    settings = command_line.settings(InspectSettings, arguments, __doc__)
    run(settings)
    log.info("Written to %s: inspection.json, dkl.csv, spectra.csv, *.png.", settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
