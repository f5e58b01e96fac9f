"""Measures every way at every size and guidance, in turns; runs inside a ComfyUI process (host_process.py).

Nothing is compared across processes or single timings: a round takes each way once, the next round begins with another
way, and every ratio is of two turns of one round.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import comfyui_version
import folder_paths
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from . import subjects, ways
from .clocks import Turn, Watch, measure
from .ways import Scene, node

if TYPE_CHECKING:
    from ..nodes.sockets import ClearSRBundle

log = logging.getLogger("clearsr.bench")

PARTS = ("UNet", "DPM", "SPM", "VAE encode", "VAE decode")
UNET, DPM, SPM, ENCODE, DECODE = PARTS
# torch counts the attention of GPUs only.
_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_rest, **_more: sdpa_flop_count(
        q, k, v
    )
}


@dataclass(frozen=True)
class Request:
    """What to measure."""

    size: str  # of the model: one of subjects.SIZES
    device: str  # "cpu" or "cuda"
    pixels: tuple[int, ...]  # sides of the output
    cfgs: tuple[float, ...]
    steps: int
    rounds: int
    tile: int = 512  # pixels, of the tiled way
    vae_pixels: int = 1024  # largest side that is encoded and decoded
    only: tuple[str, ...] = ()  # of the ways; none = all
    parts: bool = True
    clock: str = "wall"  # or "processor", of a CPU


@dataclass
class Series:
    """All turns of one size and guidance: name -> one turn for each round."""

    pixels: int
    cfg: float
    ways: dict[str, list[Turn]] = field(default_factory=dict)
    parts: dict[str, list[Turn]] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)  # multiply-adds of one forward of each part


def run(request: Request, keep: Callable[[dict], None] = lambda _result: None) -> dict:
    """Measure and return plain values for JSON; `keep` gets what there is after every round."""
    folder = Path(folder_paths.models_dir) / "clearsr"
    series: list[Series] = []
    with torch.inference_mode():
        model, vae, clearsr = node("ClearSRLoader", checkpoint=subjects.file_of(request.size, folder))
        wanted = {ways.IMPORTED, ways.IMPORTED_TWO_TEXTS}
        imported = subjects.imported(model, clearsr) if not request.only or wanted & set(request.only) else None
        for pixels in request.pixels:
            for cfg in request.cfgs:
                scene = ways.prepare(model, vae, clearsr, pixels, request.steps, cfg, request.tile)
                scene.imported = imported
                series.append(Series(pixels, cfg))
                for _ in _rounds(scene, series[-1], request):
                    keep(_result(scene, request, series))
    return _result(scene, request, series)


def _result(scene: Scene, request: Request, series: list[Series]) -> dict:
    device, base = scene.device, scene.model.model
    return {
        "request": dataclasses.asdict(request),
        "machine": {
            "comfyui": comfyui_version.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "dtype": str(base.manual_cast_dtype or base.get_dtype()),
            "date": time.strftime("%Y-%m-%d"),
        },
        "parameters": {
            name: sum(weight.numel() for weight in network.parameters())
            for name, network in _networks(scene, scene.clearsr).items()
        },
        "series": [dataclasses.asdict(one) for one in series],
    }


def _rounds(scene: Scene, series: Series, request: Request) -> Iterator[int]:
    """Take the turns of one round after the other, and yield the number of each."""
    ways.load(scene)
    every_way = ways.ways(scene)
    unknown = sorted(set(request.only) - set(every_way))
    if unknown:
        log.info("not at %d pixels with cfg %g: %s", series.pixels, scene.cfg, ", ".join(unknown))
    chosen = {name: way for name, way in every_way.items() if not request.only or name in request.only}
    parts = _parts(scene, series.pixels <= request.vae_pixels) if request.parts else {}
    series.ways, series.parts = {name: [] for name in chosen}, {name: [] for name in parts}
    for name, part in parts.items():  # also the first, slow call of each network
        series.operations[name] = _multiply_adds(part)

    own = Watch(scene.device, _networks(scene, scene.clearsr), request.clock)
    watches = dict.fromkeys(chosen, own)
    if scene.imported is not None:
        theirs = Watch(scene.device, _networks(scene, scene.imported), request.clock)
        watches |= dict.fromkeys((ways.IMPORTED, ways.IMPORTED_TWO_TEXTS), theirs)
    for number in range(request.rounds):
        for name, part in parts.items():
            series.parts[name].append(measure(scene.device, part, clock=request.clock))
        for name in _turned(list(chosen), number):
            scene.seed += 1  # LSA KSampler would repeat only the last steps of an equal run
            way = chosen[name]
            turn = measure(scene.device, lambda way=way: way(scene), watches[name], request.clock)
            series.ways[name].append(turn)
            place = (series.pixels, scene.cfg, number + 1, name)
            log.info("%d pixels, cfg %g, round %d, %s: %.2f s", *place, turn.seconds)
        yield number


def _turned(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


def _networks(scene: Scene, clearsr: ClearSRBundle) -> dict[str, torch.nn.Module]:
    """Return what runs in a step with `clearsr`; an empty module stands for an SPM that it lacks."""
    control = clearsr.control.model
    return {UNET: scene.model.model.diffusion_model, DPM: control.dpm, SPM: control.spm or torch.nn.Identity()}


def _parts(scene: Scene, with_vae: bool) -> dict[str, Callable[[], object]]:
    """Return each network's own forward as one step needs it: the UNet for all rows, the control once."""
    unet, dpm, spm = _networks(scene, scene.clearsr).values()
    x, timestep, text = ways.unet_inputs(scene, scene.halves)
    x_lr = x[:1]
    parts: dict[str, Callable[[], object]] = {
        UNET: lambda: unet(x, timestep, context=text, transformer_options={}),
        DPM: lambda: dpm(x_lr, timestep[:1], text[:1], None),
        SPM: lambda: spm(x_lr, timestep[:1], text[:1], None),
    }
    if with_vae:
        side = 4 * scene.image.shape[1]
        picture = torch.nn.functional.interpolate(scene.image.movedim(-1, 1), (side, side)).movedim(1, -1)
        parts[ENCODE] = lambda: scene.clearsr.lr_encoder.encode(picture)
        parts[DECODE] = lambda: scene.vae.decode(scene.lr_latent["samples"])
    return parts


def _multiply_adds(work: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
    with counter:
        work()
    return counter.get_total_flops() / 2


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
