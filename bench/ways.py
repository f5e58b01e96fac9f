"""The ways to sample that are compared, from a bare loop around the UNet to the nodes in each mode."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..nodes.compat import HostObject
from ..nodes.sockets import KEY
from ..nodes.tiled_diffusion import AUTOMATIC_AREA

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from ..nodes.sockets import ClearSRBundle, LREntry

BARE, HOST, NAIVE, EACH, ONCE = "bare UNet", "host sampler", "naive ControlNet", "ours", "ours, control once"
INTERVAL, TILED = "ours, guidance in the first half", "ours in tiles"
AUTOMATIC = "ours, automatic tiles"  # as the nodes do by themselves: one piece up to 1024 x 1024
# A file of training.import_control, whose control reads x_t and the text of each conditioning.
IMPORTED, IMPORTED_TWO_TEXTS = "imported control", "imported control, two texts"
REUSE = {f"ours, control every {every}": every for every in (2, 5)}
_WIDE = 8  # pixels per latent pixel


@dataclass
class Scene:
    """One picture at one size and guidance, ready to be sampled."""

    model: ModelPatcher
    vae: VAE
    clearsr: ClearSRBundle
    image: Tensor  # (1, H, W, 3) in [0, 1], a quarter of the size
    lr_latent: dict
    steps: int
    cfg: float
    tile: int  # pixels
    seed: int = 0
    imported: ClearSRBundle | None = None  # the same base with an imported control network

    @property
    def device(self) -> torch.device:
        return comfy.model_management.get_torch_device()

    @property
    def halves(self) -> int:
        """Rows of a model call: conditional, and unconditional where there is guidance."""
        return 1 if self.cfg == 1.0 else 2


def node(node_id: str, **inputs: HostObject) -> HostObject:
    """Execute one node as the host does; return its only output, or all of them."""
    kind = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[node_id]  # the host's `nodes`
    if hasattr(kind, "define_schema"):
        result = kind.PREPARE_CLASS_CLONE({}).EXECUTE_NORMALIZED(**inputs).args
    else:
        result = getattr(kind(), kind.FUNCTION)(**inputs)
    return result[0] if len(result) == 1 else tuple(result)


def prepare(
    model: ModelPatcher, vae: VAE, clearsr: ClearSRBundle, pixels: int, steps: int, cfg: float, tile: int
) -> Scene:
    """Make a scene of an output of `pixels` x `pixels`; its x_lr is drawn, so that no size has to be encoded."""
    generator = torch.Generator().manual_seed(pixels)
    image = torch.rand(1, pixels // 4, pixels // 4, 3, generator=generator)
    channels = clearsr.config.control.latent_channels
    samples = torch.randn(1, channels, pixels // _WIDE, pixels // _WIDE, generator=generator)
    prompt = None
    if clearsr.image_encoder is not None:
        prompt = torch.randn(1, 1, clearsr.config.control.context_dim, generator=generator)
    size = (pixels, pixels)
    entry: LREntry = {
        "encoded": samples,
        "image_prompt": prompt,
        "anchor": None,
        "content_size": size,
        "padded_size": size,
    }
    return Scene(model, vae, clearsr, image, {"samples": samples, KEY: entry}, steps, cfg, tile)


def ways(scene: Scene) -> dict[str, Callable[[Scene], object]]:
    """Return every way that makes sense for a scene, by name."""
    found: dict[str, Callable[[Scene], object]] = {BARE: bare, HOST: host, NAIVE: naive, EACH: ours}
    found |= {name: _reuse(every) for name, every in REUSE.items() if every < scene.steps}
    if scene.steps > 1:
        found[ONCE] = _reuse(scene.steps)
    if scene.cfg != 1.0:
        found[INTERVAL] = lambda scene: ours(scene, cfg_end=0.5)
    if scene.imported is not None:
        found[IMPORTED if scene.cfg == 1.0 else IMPORTED_TWO_TEXTS] = imported
    if scene.lr_latent["samples"].shape[-1] * _WIDE > scene.tile:
        found[TILED] = lambda scene: ours(scene, tile=scene.tile)
    if scene.lr_latent["samples"][0, 0].numel() >= AUTOMATIC_AREA:
        found[AUTOMATIC] = lambda scene: ours(scene, tile=0)
    return found


def load(scene: Scene) -> None:
    """Bring all networks to the device, so that no way pays for it."""
    controls = [bundle.control for bundle in (scene.clearsr, scene.imported) if bundle is not None]
    comfy.model_management.load_models_gpu([scene.model, *controls, scene.vae.patcher])


def unet_inputs(scene: Scene, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (rows, 4, h, w), timestep (rows,) and the empty prompt (rows, n, C) for a call of the UNet alone."""
    base = scene.model.model
    dtype = base.manual_cast_dtype or base.get_dtype()
    x = scene.lr_latent["samples"].to(scene.device, dtype).expand(rows, -1, -1, -1)
    text = scene.clearsr.null_text[None].to(scene.device, dtype).expand(rows, -1, -1)
    return x, torch.full((rows,), 500.0, device=scene.device), text


def bare(scene: Scene) -> Tensor:
    """Spaced DDPM with nothing around the UNet: the least that this model's steps can cost."""
    base = scene.model.model
    x, _, text = unet_inputs(scene, 1)
    text = text.expand(scene.halves, -1, -1)
    steps = _sigmas(scene)
    timesteps = base.model_sampling.timestep(steps[:-1]).float().to(x.device)
    variances = (1.0 / (steps**2 + 1.0)).tolist()  # alphas_cumprod of the steps, then 1
    for index, (now, later) in enumerate(itertools.pairwise(variances)):
        rows = x.expand(scene.halves, -1, -1, -1)
        eps = base.diffusion_model(
            rows.to(text.dtype), timesteps[index].expand(scene.halves), context=text, transformer_options={}
        )
        if scene.halves == 2:
            uncond, cond = eps.chunk(2)
            eps = uncond + scene.cfg * (cond - uncond)
        ratio = now / later
        x = (x - (1.0 - ratio) / (1.0 - now) ** 0.5 * eps) / ratio**0.5
        if later < 1.0:
            x = x + ((1.0 - ratio) * (1.0 - later) / (1.0 - now)) ** 0.5 * torch.randn_like(x)
    return x


def host(scene: Scene, model: ModelPatcher | None = None) -> Tensor:
    """The host's own ddpm sampler, with the MODEL as it is or as given."""
    latent = scene.lr_latent["samples"]
    empty = [[scene.clearsr.null_text[None], {}]]
    noise = comfy.sample.prepare_noise(latent, scene.seed)
    sampler, sigmas = comfy.samplers.sampler_object("ddpm"), _sigmas(scene)
    return comfy.sample.sample_custom(
        model or scene.model, noise, scene.cfg, sampler, sigmas, empty, empty, latent, disable_pbar=True
    )


def naive(scene: Scene) -> Tensor:
    """DPM and SPM as SeeSR and PASD run their control: anew at every step, for every row of guidance."""
    net, null_text = scene.clearsr.control.model, scene.clearsr.null_text[None]
    x_lr = scene.model.model.process_latent_in(scene.lr_latent["samples"])

    def control(
        executor: HostObject,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None,
        c_crossattn: Tensor | None,
        _control: dict | None,
        options: dict,
        **conds: HostObject,
    ) -> Tensor:
        base = executor.class_obj
        dtype = base.manual_cast_dtype or base.get_dtype()
        rows = x_lr.to(x.device, dtype).expand(x.shape[0], -1, -1, -1)
        residuals = net(rows, base.model_sampling.timestep(t).float(), null_text.to(x.device, dtype))
        added = {"output": list(residuals.down), "middle": [residuals.mid]}
        return executor(x, t, c_concat, c_crossattn, added, options, **conds)

    model = scene.model.clone()
    model.set_additional_models("bench", [scene.clearsr.control])
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench", control)
    return host(scene, model)


def imported(scene: Scene) -> Tensor:
    """The nodes with an imported control network and its settings; with guidance, two different texts."""
    generator = torch.Generator().manual_seed(1)
    shape = scene.clearsr.null_text[None].shape
    texts: dict[str, HostObject] = {
        name: [[torch.randn(shape, generator=generator), {}]] for name in ("positive", "negative")
    }
    settings: dict[str, HostObject] = {"scheduler": "ddpm_linspace", "start_from_lr": False, "alpha": 0.0, "beta": 0.0}
    return ours(scene, clearsr=scene.imported, **settings, **texts)


def ours(
    scene: Scene,
    every: int = 1,
    tile: int | None = None,
    clearsr: ClearSRBundle | None = None,
    **settings: HostObject,
) -> Tensor:
    """The nodes, with the paper's settings unless told otherwise.

    Args:
        scene: what to sample.
        every: steps that share a control.
        tile: pixels of a tile; 0 = automatic, None = one piece.
        clearsr: networks; None = the scene's.
        settings: other inputs of LSA KSampler.
    """
    tile = tile if tile is not None else scene.lr_latent["samples"].shape[-1] * _WIDE
    controlled = node(
        "ClearSRControlApply",
        model=scene.model,
        clearsr=clearsr or scene.clearsr,
        lr_latent=scene.lr_latent,
        control_every=every,
        tile_size=tile,
        tile_overlap=64,
    )
    return node(
        "ClearSRLSAKSampler",
        model=controlled,
        lr_latent=scene.lr_latent,
        seed=scene.seed,
        steps=scene.steps,
        cfg=scene.cfg,
        **settings,
    )["samples"]


def _reuse(every: int) -> Callable[[Scene], object]:
    return lambda scene: ours(scene, every=every)


def _sigmas(scene: Scene) -> Tensor:
    return node("ClearSRScheduler", model=scene.model, steps=scene.steps)
