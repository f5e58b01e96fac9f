"""ClearSR Loader: one file becomes MODEL, VAE and CLEARSR."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..clearsr_core import checkpoint as checkpoints
from ..clearsr_core import key_maps
from ..clearsr_core.control import ClearSRControl
from ..clearsr_core.image_encoder import ImagePromptEncoder
from .compat import inference_dtype, notice, schema, widget
from .host_attention import host_attention
from .lora import add_lora, add_vae_lora
from .model_checks import BASE_HELP, base_fingerprint, check_model, check_vae, other_base
from .self_contained import build_model, build_vae, is_dynamic, patcher_class
from .sockets import KEY, ClearSRBundle, ClearSRSocket
from .vae_precision import float32_vae

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

FOLDER = "clearsr"
SHIPPED = Path(__file__).resolve().parent.parent / "models"
NODE = "ClearSR Loader"
PRECISIONS = ("as the VAE", "float32")


def register_model_folder() -> None:
    """Make `models/clearsr` known to the host, beside the folders that extra_model_paths.yaml may have named."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, extensions or {".safetensors"})


def list_files() -> list[str]:
    """Return the user's files, then the shipped ones; a user's file hides a shipped one of the same name."""
    own = folder_paths.get_filename_list(FOLDER) if FOLDER in folder_paths.folder_names_and_paths else []
    shipped = sorted(path.name for path in SHIPPED.glob("*.safetensors"))
    return [*own, *(name for name in shipped if name not in own)]


def find_file(name: str) -> Path | None:
    """Return where the file of that name is, or None."""
    if FOLDER in folder_paths.folder_names_and_paths:
        own = folder_paths.get_full_path(FOLDER, name)
        if own is not None:
            return Path(own)
    shipped = SHIPPED / Path(name).name
    return shipped if shipped.is_file() and shipped.name == name else None


def load_control(path: str, computed_in: torch.dtype, disable_dynamic: bool = False) -> ModelPatcher:
    """Read DPM and SPM again: what the host calls to make copies for further devices."""
    return _control_patcher(checkpoints.read(Path(path)), path, computed_in, disable_dynamic)


def load_base_model(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """Read the UNet of a self-contained file; also what the host calls to make copies for further devices."""
    file = checkpoints.read(Path(path))
    return build_model(file.tensors["base.unet"], file.config, disable_dynamic)


def load_image_encoder(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """Read the image prompt encoder of a self-contained file."""
    return _image_encoder_patcher(checkpoints.read(Path(path)), path, disable_dynamic)


def _control_patcher(
    file: checkpoints.Checkpoint, path: str, computed_in: torch.dtype, disable_dynamic: bool = False
) -> ModelPatcher:
    """Build DPM and SPM.

    `computed_in` is the dtype that the UNet computes in, and DPM and SPM with it. Weights that the file holds wider are
    kept in it: casting them at each step would give the same numbers, take time and hold twice the memory.
    """
    weights = {f"{part}.{name}": value for part in ("dpm", "spm") for name, value in file.tensors.get(part, {}).items()}
    size = comfy.model_management.dtype_size
    weights = {
        name: value.to(computed_in) if size(value.dtype) > size(computed_in) else value
        for name, value in weights.items()
    }
    net = ClearSRControl(
        file.config.control,
        ops=comfy.ops.manual_cast,
        attention=host_attention,
        dtype=comfy.utils.weight_dtype(weights),
        device=comfy.model_management.unet_offload_device(),
    )
    return _patcher(net, weights, load_control, (path, computed_in), disable_dynamic)


def _image_encoder_patcher(file: checkpoints.Checkpoint, path: str, disable_dynamic: bool = False) -> ModelPatcher:
    weights = file.tensors["image_encoder"]
    net = ImagePromptEncoder(
        file.config.control.context_dim,
        patch=file.config.prompt_mode == "patch",
        ops=comfy.ops.manual_cast,
        dtype=comfy.utils.weight_dtype(weights),
        device=comfy.model_management.unet_offload_device(),
    )
    return _patcher(net, weights, load_image_encoder, (path,), disable_dynamic)


def _patcher(
    net: torch.nn.Module,
    weights: dict[str, Tensor],
    factory: Callable[..., ModelPatcher],
    arguments: tuple,
    disable_dynamic: bool,
) -> ModelPatcher:
    """Put a network of ours under the host's model management."""
    patcher = patcher_class(disable_dynamic)(
        net,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    if comfy.model_management.force_channels_last():
        # As the host lays out its UNet then. Torch takes this form, its annotations do not know it.
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    net.load_state_dict(weights, strict=True, assign=is_dynamic(patcher))
    net.eval().requires_grad_(False)
    patcher.cached_patcher_init = (factory, arguments)
    return patcher


def _check_base_sockets(file: checkpoints.Checkpoint, name: str, model: object, vae: object) -> None:
    """A file either brings its own MODEL and VAE or needs both; a mixture is never what was meant."""
    connected = [socket for socket, value in (("MODEL", model), ("VAE", vae)) if value is not None]
    if file.config.base is not None and connected:
        raise ValueError(
            f"{NODE}: '{name}' brings its own MODEL and VAE, but {' and '.join(connected)} "
            f"{'are' if len(connected) > 1 else 'is'} connected. Disconnect the optional model and vae inputs, or "
            "choose a checkpoint made for Stable Diffusion 2.1-base."
        )
    missing = [socket for socket, value in (("MODEL", model), ("VAE", vae)) if value is None]
    if file.config.base is None and missing:
        raise ValueError(
            f"{NODE}: '{name}' does not carry a base model, and {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not connected. {BASE_HELP}"
        )


class ClearSRLoader(io.ComfyNode):
    """File -> MODEL with the decoder LoRA, plain VAE, CLEARSR."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ClearSRLoader",
            display_name="ClearSR Loader",
            description=(
                "Loads a ClearSR checkpoint: the control networks DPM and SPM, the adapted encoder for low-resolution "
                "pictures and the decoder LoRA. Self-contained files bring their own base model; others need a Stable "
                "Diffusion 2.1-base MODEL and VAE."
            ),
            search_aliases=["clearsr", "super resolution", "upscale", "restore", "sr model"],
            inputs=[
                widget(
                    io.Combo,
                    "checkpoint",
                    options=list_files(),
                    tooltip="A .safetensors file from ComfyUI/models/clearsr, or the small model that comes with this "
                    "pack.",
                ),
                widget(
                    io.Float,
                    "lora_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the LoRA on the UNet's decoder. 1 = as trained, 0 = not applied.",
                ),
                widget(
                    io.Float,
                    "encoder_lora_strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the LoRA on the VAE's encoder, which turns the low-resolution picture into "
                    "x_lr. 1 = as trained, 0 = the plain encoder.",
                ),
                widget(
                    io.Model,
                    "model",
                    optional=True,
                    tooltip="Stable Diffusion 2.1-base. Needed unless the file brings its own base model.",
                ),
                widget(
                    io.Vae,
                    "vae",
                    optional=True,
                    tooltip="The VAE of Stable Diffusion 2.1-base. Needed unless the file brings its own.",
                ),
                widget(
                    io.Combo,
                    "encoder_precision",
                    options=list(PRECISIONS),
                    default="as the VAE",
                    optional=True,
                    advanced=True,
                    tooltip="In which precision LR Latent Encode makes x_lr. On graphics cards ComfyUI mostly runs the "
                    "VAE in bfloat16; float32 is exact as in training, and takes 0.3 GB of memory for a second VAE.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The base model with the decoder LoRA."),
                io.Vae.Output(display_name="VAE", tooltip="The plain VAE: use it to decode the result."),
                ClearSRSocket.Output(display_name="CLEARSR", tooltip="For LR Latent Encode and DPM/SPM Control Apply."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None) -> bool | str:
        if checkpoint is None:  # linked: the host knows the value only when the graph runs
            return True
        if find_file(checkpoint) is not None:
            return True
        folder = os.path.join(folder_paths.models_dir, FOLDER)
        return f"checkpoint: '{checkpoint}' was not found. Put the file into {folder} and press R to refresh the list."

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None = None, **_other: object) -> tuple[int, int] | None:
        path = None if checkpoint is None else find_file(checkpoint)
        if path is None:
            return None
        status = path.stat()
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        lora_strength: float = 1.0,
        encoder_lora_strength: float = 1.0,
        model: ModelPatcher | None = None,
        vae: VAE | None = None,
        encoder_precision: str = "as the VAE",
    ) -> io.NodeOutput:
        path = find_file(checkpoint)
        if path is None:
            raise FileNotFoundError(f"{NODE}: {cls.validate_inputs(checkpoint)}")
        try:
            file = checkpoints.read(path)
        except checkpoints.CheckpointError as error:
            raise ValueError(f"{NODE}: {error}") from None
        config = file.config
        _check_base_sockets(file, checkpoint, model, vae)
        if model is None or vae is None:
            model = build_model(file.tensors["base.unet"], config)
            model.cached_patcher_init = (load_base_model, (str(path),))
            vae = build_vae(file.tensors["base.vae"], config)
        else:
            check_model(NODE, model, config, checkpoint)
            check_vae(NODE, vae, config, checkpoint)
        about = file.training.get("about")
        if isinstance(about, str) and about:
            notice(cls, f"{NODE}: '{checkpoint}': {about}", logging.INFO)
        base = base_fingerprint(model, config)
        if config.base is None:
            difference = other_base(NODE, base, config.base_fingerprint, checkpoint)
            if difference is not None:
                notice(cls, difference)

        unet_map = {
            layer: f"diffusion_model.{weight}" for layer, weight in key_maps.unet_lora_map(config.control).items()
        }
        adapted = add_lora(model, file.tensors.get("unet_lora", {}), unet_map, lora_strength, checkpoint)
        null_text = file.tensors["null_text"][""].float()
        adapted.set_attachments(KEY, {"null_text": null_text, "base": base})
        source = float32_vae(vae) if encoder_precision == "float32" else vae
        lr_encoder = add_vae_lora(
            source,
            file.tensors.get("vae_lora", {}),
            key_maps.vae_lora_map(config.networks),
            encoder_lora_strength,
            checkpoint,
        )
        bundle = ClearSRBundle(
            name=checkpoint,
            config=config,
            control=_control_patcher(file, str(path), inference_dtype(adapted.model)),
            vae=source,
            lr_encoder=lr_encoder,
            null_text=null_text,
            base=base,
            image_encoder=_image_encoder_patcher(file, str(path)) if config.image_encoder else None,
            image_projection=file.tensors.get("image_projection"),
        )
        return io.NodeOutput(adapted, vae, bundle)
