"""Merged LoRA is peft's forward pass, and the key maps bring it to the right weights of the host's networks."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from clearsr_core.config import NANO, SD21_NETWORKS, BaseConfig
from clearsr_core.key_maps import (
    unet_from_host,
    unet_lora_map,
    unet_lora_targets,
    unet_to_host,
    vae_from_host,
    vae_lora_map,
    vae_lora_targets,
    vae_to_host,
)
from clearsr_core.merge import merged
from clearsr_core.shapes import lora_shapes, unet_shapes, vae_shapes

pytestmark = pytest.mark.parity

RANK, ALPHA = 3, 5.0
# Shortcuts stand where widths change: at levels 2 and 3 here, at 1 and 2 in SD.
NARROW = BaseConfig(NANO.widths, NANO.head_channels, NANO.context_dim, (32, 32, 64, 128), 1, 8)
SD_LIKE = BaseConfig(NANO.widths, NANO.head_channels, NANO.context_dim, (32, 64, 128, 128), 2, 8)


def make_vae(base):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=base.vae_widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=base.vae_blocks,
            latent_channels=4,
            norm_num_groups=base.norm_groups,
        ).eval()


def make_unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            block_out_channels=NANO.widths,
            attention_head_dim=[width // NANO.head_channels for width in NANO.widths],
            cross_attention_dim=NANO.context_dim,
            norm_num_groups=NANO.norm_groups,
            use_linear_projection=True,
        ).eval()


def with_lora(network, targets):
    """Return peft's model with trained-looking adapters on `targets`, and its tensors under their base names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(
            copy.deepcopy(network), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    state = get_peft_model_state_dict(model)
    return model.eval(), {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


def merge_into(weights, lora, names):
    """Merge adapters (PEFT base names) into weights whose names `names` gives."""
    return weights | {
        key: merged(weights[key], lora[f"{target}.lora_A.weight"], lora[f"{target}.lora_B.weight"], ALPHA)
        for target, key in names.items()
    }


@torch.no_grad()
def test_merged_weights_are_pefts_forward():
    """Linear, 3x3, 1x1 and strided convolution, with alpha other than the rank."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.strided = nn.Conv2d(8, 8, 3, stride=2)
            self.mix = nn.Conv2d(8, 6, 1)
            self.linear = nn.Linear(6, 5)

        def forward(self, x):
            return self.linear(self.mix(self.strided(self.conv(x))).movedim(1, -1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, x = Network(), torch.randn(2, 4, 9, 7)
    targets = ["conv", "strided", "mix", "linear"]
    model, lora = with_lora(network, targets)
    plain, expected = network(x), model(x)
    names = {target: f"{target}.weight" for target in targets}
    network.load_state_dict(merge_into(network.state_dict(), lora, names))
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize(("base", "count"), [(NARROW, 23), (SD_LIKE, 31)])
@torch.no_grad()
def test_vae_lora_through_the_hosts_names(base, count):
    """Every convolution and the attention of the encoder, merged under host names, read back, equals peft."""
    vae = make_vae(base)
    targets = vae_lora_targets(base)
    layers = {f"encoder.{n}" for n, m in vae.encoder.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(targets) == layers and len(targets) == count

    model, lora = with_lora(vae, targets)
    shapes = {name: shape for name, shape in lora_shapes(targets, vae_shapes(base), RANK).items() if "lora" in name}
    assert {name: tuple(tensor.shape) for name, tensor in lora.items()} == shapes
    image = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected, plain = model.encode(image).latent_dist.mode(), vae.encode(image).latent_dist.mode()
    host = merge_into(vae_to_host(vae.state_dict(), base), lora, vae_lora_map(base))
    vae.load_state_dict(vae_from_host(host, base))
    torch.testing.assert_close(vae.encode(image).latent_dist.mode(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


@torch.no_grad()
def test_unet_lora_through_the_hosts_names():
    """The 72 projections of the decoder, merged under host names, read back, equal peft; the encoder is untouched."""
    unet = make_unet()
    targets = unet_lora_targets(NANO)
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    layers = {n for n, _ in unet.named_modules() if n.startswith("up_blocks.") and n.endswith(projections)}
    assert set(targets) == layers and len(targets) == 72

    model, lora = with_lora(unet, targets)
    shapes = {name: shape for name, shape in lora_shapes(targets, unet_shapes(NANO), RANK).items() if "lora" in name}
    assert {name: tuple(tensor.shape) for name, tensor in lora.items()} == shapes
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 4, 16, 8, generator=generator), torch.randn(1, 5, NANO.context_dim, generator=generator)
    expected, plain = model(x, 400, context).sample, unet(x, 400, context).sample
    host = merge_into(unet_to_host(unet.state_dict(), NANO), lora, unet_lora_map(NANO))
    unet.load_state_dict(unet_from_host(host, NANO))
    torch.testing.assert_close(unet(x, 400, context).sample, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-3)


@pytest.mark.parametrize("base", [NARROW, SD_LIKE, SD21_NETWORKS])
def test_our_table_of_vae_weights_is_diffusers_own(base):
    """Names and shapes, and each goes to the host and back."""
    with torch.device("meta"):
        state = make_vae(base).state_dict()
    assert vae_shapes(base) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    back = vae_from_host(vae_to_host(state, base), base)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in state.items()}
