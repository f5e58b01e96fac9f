"""Name maps between diffusers and the host: one to one, complete, and the LoRA targets of the paper."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clearsr_core.config import NANO, SD21_BASE, SD21_NETWORKS, TINY, BaseConfig, ClearSRConfig
from clearsr_core.key_maps import (
    controlnet_prefixes,
    rename,
    unet_from_host,
    unet_lora_map,
    unet_to_host,
    vae_from_host,
    vae_lora_map,
    vae_lora_targets,
    vae_to_host,
)
from clearsr_core.shapes import checkpoint_shapes, unet_shapes, vae_shapes

NARROW = BaseConfig((32, 64, 128, 128), 16, 64, (32, 32, 64, 128), 1)


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(("config", "weights"), [(SD21_BASE, 686), (NANO, 684), (TINY, 682)])
def test_unet_round_trip(config, weights):
    """Each weight has one name on either side; equal widths need no shortcuts in the encoder."""
    ours = meta(unet_shapes(config))
    theirs = unet_to_host(ours, config)
    assert len(theirs) == len(ours) == weights
    back = unet_from_host(theirs, config)
    assert list(back) == list(ours) and all(back[name] is ours[name] for name in ours)


@pytest.mark.parametrize("config", [SD21_NETWORKS, NARROW])
def test_vae_round_trip(config):
    """The decoder is numbered the other way round, and attention changes its shape there and back."""
    generator = torch.Generator().manual_seed(0)
    narrow = config is NARROW
    ours = {
        name: torch.randn(shape, generator=generator) if narrow else torch.empty(shape, device="meta")
        for name, shape in vae_shapes(config).items()
    }
    theirs = vae_to_host(ours, config)
    assert len(theirs) == len(ours)
    coarsest = config.vae_widths[-1]
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (coarsest, coarsest, 1, 1)
    assert (
        theirs["decoder.up.3.upsample.conv.weight"].shape == ours["decoder.up_blocks.0.upsamplers.0.conv.weight"].shape
    )
    back = vae_from_host(theirs, config)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in ours.items()}
    if narrow:
        assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_known_names_of_stable_diffusion():
    """Places that people get wrong: shortcuts, the downsampler's block, the upsampler beside or without attention."""
    theirs = unet_to_host(meta(unet_shapes(SD21_BASE)), SD21_BASE)
    for name in (
        "input_blocks.0.0.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.11.0.out_layers.3.bias",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.transformer_blocks.0.norm1.bias",
        "time_embed.2.bias",
        "out.2.weight",
    ):
        assert name in theirs
    assert theirs["output_blocks.3.1.proj_in.weight"].ndim == 2


def test_seventy_two_targets_in_the_unet():
    """Attention of the decoder only: nine transformers, two attentions, four projections."""
    targets = unet_lora_map(SD21_BASE)
    assert len(targets) == len(set(targets.values())) == 72
    assert all(
        ours.startswith("up_blocks.") and theirs.startswith("output_blocks.") for ours, theirs in targets.items()
    )
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert targets[name] == "output_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
    assert set(targets.values()) <= set(unet_to_host(meta(unet_shapes(SD21_BASE)), SD21_BASE))


def test_thirty_one_targets_in_the_vae():
    """Every convolution and the attention of the encoder; shortcuts stand where widths change."""
    targets = vae_lora_map(SD21_NETWORKS)
    assert len(targets) == len(set(targets.values())) == 31
    assert set(targets.values()) <= set(vae_to_host(meta(vae_shapes(SD21_NETWORKS)), SD21_NETWORKS))
    assert targets["encoder.down_blocks.1.resnets.0.conv_shortcut"] == "encoder.down.1.block.0.nin_shortcut.weight"
    assert targets["encoder.mid_block.attentions.0.to_out.0"] == "encoder.mid.attn_1.proj_out.weight"
    shortcuts = [name for name in vae_lora_targets(NARROW) if "shortcut" in name]
    assert shortcuts == [f"encoder.down_blocks.{level}.resnets.0.conv_shortcut" for level in (2, 3)]


def test_unknown_weights_are_refused():
    weight = torch.zeros(1)
    with pytest.raises(ValueError, match=r"'add_embedding\.linear_1\.weight' is no weight of a UNet"):
        unet_to_host({"add_embedding.linear_1.weight": weight}, SD21_BASE)
    with pytest.raises(ValueError, match=r"'down_blocks\.0\.resnets\.2\.conv1\.weight' is no weight"):
        unet_to_host({"down_blocks.0.resnets.2.conv1.weight": weight}, SD21_BASE)
    with pytest.raises(ValueError, match="is no weight of a VAE"):
        vae_from_host({"loss.logvar": weight}, SD21_NETWORKS)


def test_a_controlnet_has_the_names_of_the_encoder_and_of_its_outputs():
    control = dataclasses.replace(SD21_BASE, control_input="lr+xt", window_attention=False, use_spm=False)
    shapes = checkpoint_shapes(ClearSRConfig(control, lora_rank=0, prompt_mode="null"))["dpm"]
    names = {name: rename(name, controlnet_prefixes(control)) for name in shapes if not name.startswith("conv_in_lr")}
    assert len(names) == len(set(names.values())) == 324  # DiffBIR's tensors
    assert names["conv_in.weight"] == "input_blocks.0.0.weight"
    assert names["controlnet_down_blocks.11.bias"] == "zero_convs.11.0.bias"
    assert names["controlnet_mid_block.weight"] == "middle_block_out.0.weight"
    assert names["down_blocks.1.downsamplers.0.conv.weight"] == "input_blocks.6.0.op.weight"
    assert names["mid_block.attentions.0.proj_in.weight"] == "middle_block.1.proj_in.weight"
