"""What the control carries of x_lr: D_kl, PCA views and power spectra (Figs. 2, 4, 8, 9; Eq. 5; App. B, C).

    python -m training.inspection --checkpoint=FILE --lr=LR --out=out/inspection --limit=20
    python -m training.inspection --checkpoint=FILE --against=CONTROLNET_FILE --lr=LR --hr=HR --out=out/inspection

One file: DPM, SPM and their sum beside each other. Two files: also Diff = D_kl(against) - D_kl(checkpoint), per picture
(Eq. 5). Every model is held against the x_lr of its own encoder. No sampling is done; `--results` takes finished ones.
With `--hr` also how far x_lr of the plain encoder E and of the adapted E' is from the latent of the good picture.
"""

from __future__ import annotations

import csv
import logging
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from clearsr_core.layers import TransformerBlock
from clearsr_core.schedule import NUM_TRAIN_TIMESTEPS, add_noise

from . import analysis, command_line, config, evaluate, loop, models, plots, provenance, tables
from .clearsr_model import ClearSRModel, require_file
from .config import first
from .picture_files import read_pixels
from .pipeline import EncodedLR, encode_lr, noise_sources, pad_to_grid
from .tables import Results

log = logging.getLogger("clearsr.training")

WHOLE = "DPM + SPM"  # what the UNet gets: x_c
OURS, AGAINST = "checkpoint", "against"
HR, RESULT = "HR", "result"  # partners of the pictures, by the names of their curves
SMALLEST = 64  # pixels of a side; of a smaller picture the coarsest c_k has less than 4 x 4, without padding
PLAIN, ADAPTED, MOVED = "plain", "adapted", "moved"  # distances of `encoder_distances`
GAIN = "adapted_minus_plain"  # their difference, picture by picture

_MAY_CHANGE = ("sheets", "threads")  # what changes no figure


@dataclass(frozen=True)
class InspectSettings:
    """Which models to look into, with which pictures."""

    checkpoint: Path  # a self-contained ClearSR file
    lr: Path  # pictures
    out: Path  # folder for tables, curves and sheets
    against: Path = Path()  # the ControlNet of Eq. 5, or any other file; empty = none
    hr: Path = Path()  # good partners, four times the size: their latents' spectrum, distance of x_lr; empty = none
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
    encoders: Results = field(default_factory=dict)  # model -> distance -> picture -> value

    def add_spectrum(self, panel: str, curve: str, features: Tensor) -> None:
        """Note the relative spectrum of (C, h, w); maps too small to have one are left out."""
        if min(features.shape[1:]) >= 4:
            self.spectra.setdefault((panel, curve), []).append(analysis.relative_spectrum(features))

    def add_distances(self, label: str, name: str, distances: dict[str, float]) -> None:
        """Note the `encoder_distances` of a model on a picture, and by how much E' is farther away than E."""
        for key, value in {**distances, GAIN: distances[ADAPTED] - distances[PLAIN]}.items():
            self.encoders.setdefault(label, {}).setdefault(key, {})[name] = value


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
) -> dict[str, EncodedLR]:
    """Add one picture to `findings`; write its PCA and spectrum sheets if `sheet`.

    Returns:
        The picture as each model encodes it.
    """
    pixels = read_pixels(lr)
    found: dict[str, EncodedLR] = {}
    pca_rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    power_rows: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    picture = pixels[0].permute(1, 2, 0).numpy()
    for label, model in loaded.items():
        of = f"{label}: " if len(loaded) > 1 else ""
        encoded = found[label] = encode_lr(model, pixels, evaluate.SCALE)
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
    return found


def _power_picture(features: Tensor) -> Tensor:
    """Return the power spectrum of (C, h, w) as a grey picture, (h, w) in [0, 1]."""
    spectrum = analysis.power_spectrum(features)
    low, high = spectrum.min(), spectrum.max()
    return (spectrum - low) / torch.where(high > low, high - low, 1.0)


def encode_good(model: ClearSRModel, path: Path) -> Tensor:
    """Return the plain encoder's latent of a full-size picture, (4, h, w) in model units."""
    return plain_latent(model, read_pixels(path))


@torch.no_grad()
def plain_latent(model: ClearSRModel, pixels: Tensor) -> Tensor:
    """Return the plain encoder's latent of (1, 3, H, W) in [0, 1], padded to the grid: (4, h, w) in model units."""
    return models.encode(model.vae, pad_to_grid(pixels) * 2.0 - 1.0)[0]


def encoder_distances(model: ClearSRModel, encoded: EncodedLR, good: Tensor) -> dict[str, float]:
    """Return how far x_lr is from the latent of the good picture: what the encoder's LoRA does (Sec. 3.1, Table 3).

    Args:
        model: whose encoders are compared.
        encoded: the picture, one of a batch of 1, as this model encodes it.
        good: (4, h, w) of `encode_good`, of the partner four times the size; padded to the same grid.

    Returns:
        Mean squared errors in model units, over channels and places, those of the padding too: `plain` of E(LR) and
        `adapted` of E'(LR) to E(HR), `moved` of E'(LR) to E(LR).
    """
    plain, adapted = plain_latent(model, encoded.upscaled), encoded.lr_latent[0]

    def error(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().mean())

    return {PLAIN: error(plain, good), ADAPTED: error(adapted, good), MOVED: error(adapted, plain)}


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


def write_findings(settings: InspectSettings, said: dict[str, object], findings: Findings) -> None:
    """Write inspection.json, with the settings as `described` says them, the CSV files and the plots."""
    with (settings.out / "dkl.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["picture", "model", "part", "residual", "d_kl"])
        for name, label, part, values in findings.divergences:
            writer.writerows([name, label, part, k, f"{value:.6f}"] for k, value in enumerate(values, start=1))

    # Means over the pictures.
    columns: dict[tuple[str, str], list[list[float]]] = {}
    for _, label, part, values in findings.divergences:
        columns.setdefault((label, part), []).append(values)
    levels = {key: [statistics.fmean(column) for column in zip(*rows, strict=True)] for key, rows in columns.items()}
    means: dict[str, dict[str, float]] = {}
    for (label, part), values in levels.items():
        means.setdefault(label, {})[part] = statistics.fmean(values)
        log.info("D_kl of %s, %s: %.4f", label, part, means[label][part])
    content: dict[str, object] = {"settings": said, "d_kl": means}
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
    if findings.encoders:
        content["encoders"] = write_distances(settings.out, findings.encoders)
    provenance.write_json(settings.out / "inspection.json", content, indent=2)
    write_spectra(settings.out, findings)


def write_distances(out: Path, encoders: Results) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Write encoders.csv and tell the means; return model -> distance -> mean, half of its 95 % interval, count."""
    distances = (PLAIN, ADAPTED, MOVED)
    with (out / "encoders.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["picture", "model", *distances])
        for name in encoders[OURS][PLAIN]:
            for label, table in encoders.items():
                writer.writerow([name, label, *(f"{table[key][name]:.6f}" for key in distances)])
    means = tables.summaries(encoders)
    for label, row in means.items():
        log.info(
            "Mean squared error to E(HR), %s: E(LR) %.4f, E'(LR) %.4f; E' minus E %+.4f ± %.4f; from E' to E %.4f.",
            label,
            row[PLAIN].mean,
            row[ADAPTED].mean,
            row[GAIN].mean,
            row[GAIN].half_width,
            row[MOVED].mean,
        )
    return tables.as_json(means)


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


def described(
    settings: InspectSettings, lr: dict[str, Path], partners: dict[str, dict[str, Path]]
) -> dict[str, object]:
    """Return the settings with the models and the pictures that they name, as inspection.json says them.

    Args:
        settings: of the run.
        lr: name -> file of the pictures.
        partners: `HR`, `RESULT` or both -> name -> file; they may hold more than are looked at.
    """

    def record(of: str) -> dict[str, object] | None:
        return provenance.pictures_record(partners[of][name] for name in lr) if of in partners else None

    return {
        **loop.plain(settings),
        "checkpoint": provenance.file_record(settings.checkpoint),
        "against": provenance.file_record(settings.against) if settings.against != Path() else None,
        "lr": provenance.pictures_record(lr.values()),
        "hr": record(HR),
        "results": record(RESULT),
    }


def warn_of_small(paths: Iterable[Path]) -> None:
    """Name in one line the pictures whose values say little; only headers are read."""
    small = []
    for path in paths:
        size = evaluate.picture_size(path)
        if min(size) < SMALLEST:
            small.append(f"{path.name} ({evaluate.size_text(size)})")
    if small:
        log.warning(
            "D_kl says little about %s: under %d pixels the coarsest c_k has so few that four components span them.",
            evaluate.listed(small),
            SMALLEST,
        )


def run(settings: InspectSettings) -> None:
    """Look into every picture, then write.

    Raises:
        ValueError: settings or pictures that cannot be, or what was made with other ones in `out`.
        CheckpointError: a file is no self-contained ClearSR file; then `out` is as it was.
    """
    if not 0 <= settings.timestep < NUM_TRAIN_TIMESTEPS:
        raise config.ConfigError(f"--timestep={settings.timestep} is not in 0 .. {NUM_TRAIN_TIMESTEPS - 1}.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pictures = dict(first(list(evaluate.pictures(settings.lr, "--lr").items()), settings.limit))
    partners = {
        curve: evaluate.pictures(folder, option)
        for curve, folder, option in ((HR, settings.hr, "--hr"), (RESULT, settings.results, "--results"))
        if folder != Path()
    }
    for curve, found in partners.items():
        missing = [name for name in pictures if name not in found]
        if missing:
            raise evaluate.EvaluationError(f"There is no {curve} picture for {missing[0]} ({len(missing)} missing).")
    if HR in partners:
        for name, path in pictures.items():
            evaluate.check_scale(partners[HR][name], path)
    files = {OURS: settings.checkpoint} | ({AGAINST: settings.against} if settings.against != Path() else {})
    for file in files.values():
        require_file(file)
    said = described(settings, pictures, partners)
    made_with = {key: value for key, value in provenance.identity(said).items() if key not in _MAY_CHANGE}
    provenance.refuse_other(settings.out, made_with)
    warn_of_small(pictures.values())
    loaded = {label: ClearSRModel.from_checkpoint(file) for label, file in files.items()}
    # Not before the files have proved good: see `training.restore`.
    provenance.claim(settings.out, made_with)
    findings = Findings()
    for index, (name, path) in enumerate(tqdm(pictures.items(), unit="picture")):
        encoded = inspect_picture(name, loaded, path, settings, findings, index < settings.sheets)
        if HR in partners:
            good = {label: encode_good(model, partners[HR][name]) for label, model in loaded.items()}
            findings.add_spectrum("latents", HR, good[OURS])
            for label, model in loaded.items():
                findings.add_distances(label, name, encoder_distances(model, encoded[label], good[label]))
        if RESULT in partners:
            findings.add_spectrum("latents", RESULT, encode_good(loaded[OURS], partners[RESULT][name]))
    write_findings(settings, said, findings)


@command_line.command()
def main(arguments: list[str]) -> int:
    """Run from the command line; return the exit status."""
    settings = command_line.settings(InspectSettings, arguments, __doc__)
    run(settings)
    log.info("Written to %s: inspection.json, *.csv, *.png.", settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
