"""Reads Stable Diffusion 2.1-base out of one file in the original layout, and says what another file is instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clearsr_core.config import SD21_NETWORKS, BaseConfig, ControlConfig
from clearsr_core.key_maps import rename, unet_from_host, unet_prefixes, unet_to_host, vae_from_host, vae_to_host
from clearsr_core.safetensors_header import FLOATS, SafetensorsHeader, read_safetensors_header
from clearsr_core.shapes import unet_shapes, vae_shapes

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
HELP = "Please give the checkpoint of Stable Diffusion 2.1-base (512 px), usually v2-1_512-ema-pruned.safetensors."
_CROSS_ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# v-prediction has the same names and shapes. The spread of this bias is what hosts guess it by: above 0.09 in SD 2.x
# models of 768 px, far below in those of 512 px.
SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_PREDICTION_SPREAD = 0.09
_LAST_ALPHA = 1e-3  # SD's schedule ends at 0.0047, one with zero terminal SNR at 0
ZERO_SNR = "zero terminal SNR (its noise schedule ends in pure noise); ClearSR needs Stable Diffusion's own schedule"


def read_single_file(
    path: Path, networks: BaseConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return UNet and autoencoder in diffusers' names and the OpenCLIP text encoder in its own, all float32.

    Args:
        path: a `.safetensors` file with `model.diffusion_model.*`, `first_stage_model.*` and, if the text encoder is in
            it, `cond_stage_model.model.*`; anything else in it is ignored.
        networks: sizes that UNet and autoencoder must have.

    Raises:
        ValueError: the file is damaged, or of another kind or size; one sentence that says which, and what to do.
    """
    keys, control = _checked_keys(path, networks), _control(networks)
    unet, vae, text = (_tensors(path, prefix, keys[prefix]) for prefix in (UNET, VAE, TEXT))
    refuse_v_prediction(path, unet.get(SPREAD), networks.unet_widths)
    return unet_from_host(unet, control), vae_from_host(vae, networks), text


def read_part_of_single_file(
    path: Path, networks: BaseConfig, unet_names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return some weights of the UNet, in diffusers' names, and the text encoder: as `read_single_file` otherwise."""
    keys, prefixes = _checked_keys(path, networks), unet_prefixes(_control(networks))
    host_names = {name: rename(name, prefixes) for name in unet_names}
    unet = _tensors(path, UNET, list(host_names.values()))
    return {name: unet[key] for name, key in host_names.items()}, _tensors(path, TEXT, keys[TEXT])


def _control(networks: BaseConfig) -> ControlConfig:
    return ControlConfig(
        widths=networks.unet_widths,
        head_channels=networks.head_channels,
        context_dim=networks.context_dim,
        latent_channels=networks.latent_channels,
        norm_groups=networks.norm_groups,
    )


def _checked_keys(path: Path, networks: BaseConfig) -> dict[str, list[str]]:
    """Check kind, names and shapes; return the keys to read under each prefix, without it."""
    header = read_safetensors_header(path, "Stable Diffusion 2.1-base")
    _refuse_other_models(path, header, networks)
    control = _control(networks)
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in unet_shapes(control).items()}
    unet_keys = unet_to_host(on_meta, control)
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in vae_shapes(networks).items()}
    vae_keys = vae_to_host(on_meta, networks)
    _check_shapes(path, header, UNET, unet_keys)
    _check_shapes(path, header, VAE, vae_keys)
    _refuse_zero_snr(path, header)
    text_keys = [key.removeprefix(TEXT) for key in header.shapes if key.startswith(TEXT)]
    return {UNET: list(unet_keys), VAE: list(vae_keys), TEXT: text_keys}


def _tensors(path: Path, prefix: str, keys: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights under a prefix, without it, float32."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(prefix + key).float() for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}). Please download or copy it again.") from error


def _refuse_zero_snr(path: Path, header: SafetensorsHeader) -> None:
    """Refuse a model whose noise schedule ends in pure noise, where the file says so."""
    marked = "ztsnr" in header.shapes  # the mark that hosts write
    if not marked and "alphas_cumprod" in header.shapes:
        marked = float(_tensors(path, "", ["alphas_cumprod"])["alphas_cumprod"].flatten()[-1]) < _LAST_ALPHA
    if marked:
        raise ValueError(f"{path} is a model with {ZERO_SNR}. {HELP}")


def refuse_v_prediction(path: Path, spread_bias: Tensor | None, widths: Sequence[int]) -> None:
    """Refuse weights that ComfyUI takes for v-prediction: a model trained on them would be refused there.

    Args:
        path: for the message.
        spread_bias: norm1.bias of the last transformer of the UNet.
        widths: of the UNet; narrow models are not judged, because the spread says nothing about them.
    """
    if spread_bias is None or tuple(widths) != SD21_NETWORKS.unet_widths:
        return
    if float(spread_bias.float().std(unbiased=False)) > _V_PREDICTION_SPREAD:
        raise ValueError(
            f"{path} looks like Stable Diffusion 2.1-768, which predicts v; ClearSR needs the 512 px model, which "
            f"predicts the noise. {HELP}"
        )


def _refuse_other_models(path: Path, header: SafetensorsHeader, networks: BaseConfig) -> None:
    """Name the models that are often given instead."""
    keys = header.shapes
    found = None
    if any(".lora_" in key or "lora_unet" in key or "hada_" in key for key in keys):
        found = "a LoRA, not a whole model"
    elif any(key.startswith(("conditioner.", f"{UNET}label_emb.")) for key in keys):
        found = "SDXL or another model with more than one text encoder"
    elif not any(key.startswith(UNET) for key in keys):
        found = _without_unet(list(keys))
    elif keys.get(f"{UNET}{_CROSS_ATTENTION}", (0, 0))[-1] == 768 != networks.context_dim:
        found = "Stable Diffusion 1.x (its text is 768 wide)"
    elif keys.get(f"{UNET}input_blocks.0.0.weight", (0, 4))[1] != 4:
        found = f"an inpainting, depth or edit model with {keys[f'{UNET}input_blocks.0.0.weight'][1]} input channels"
    elif not any(key.startswith(VAE) for key in keys):
        found = "a UNet alone, without the autoencoder (first_stage_model)"
    elif header.metadata.get("modelspec.prediction_type", "epsilon") not in ("epsilon", "eps"):
        found = f"a model with {header.metadata['modelspec.prediction_type']}-prediction, by its metadata"
    if found is not None:
        raise ValueError(f"{path} is {found}. {HELP}")
    ours = {key: dtype for key, dtype in header.dtypes.items() if key.startswith((UNET, VAE))}
    other = next((key for key, dtype in ours.items() if dtype not in FLOATS), None)
    if other is not None:
        raise ValueError(f"{path} holds {other} as {header.dtypes[other]}; training needs {', '.join(FLOATS)}. {HELP}")


def _without_unet(keys: list[str]) -> str:
    if all(key.startswith((VAE, "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for key in keys):
        return "an autoencoder (VAE) alone, not a whole model"
    if any(key.startswith(("down_blocks.", "conv_in.", "input_blocks.")) for key in keys):
        return "a UNet alone, not a whole model"
    if any(key.startswith(("text_model.", "vision_model.", "transformer.", "visual.")) for key in keys):
        return "a text or image encoder alone, not a whole model"
    return "no Stable Diffusion checkpoint in the original layout (it has no model.diffusion_model)"


def _check_shapes(path: Path, header: SafetensorsHeader, prefix: str, expected: Mapping[str, Tensor]) -> None:
    """Compare with the shapes of the wanted size; 1x1 convolutions may be stored as linear layers."""
    missing = [prefix + key for key in expected if prefix + key not in header.shapes]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(expected)} weights under {prefix[:-1]} ({missing[0]}, ...): it "
            f"is incomplete or another model. {HELP}"
        )
    for key, tensor in expected.items():
        found, wanted = header.shapes[prefix + key], tuple(tensor.shape)
        if found not in (wanted, wanted[:2] if wanted[2:] == (1, 1) else wanted):
            raise ValueError(f"{path} holds {prefix + key} with the shape {found}, expected {wanted}. {HELP}")
