"""Half precision and less: DPM and SPM are kept and computed in the UNet's dtype, attention logits do not overflow.

A processor computes in every dtype that torch has, so what graphics cards do is done here too, slowly.
"""

from __future__ import annotations

import clearsr_rig as rig
import comfy.ldm.modules.attention as kernels
import comfy.model_management
import comfy.sd
import pytest
import torch

attention = rig.module("nodes.host_attention")
finite = rig.module("nodes.finite")
loader = rig.module("nodes.loader")
vae_precision = rig.module("nodes.vae_precision")

FP8 = torch.float8_e4m3fn
# (weights of the UNet, what it computes in where that is another)
DTYPES = [
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float16, torch.float32),
    (FP8, torch.bfloat16),
    (FP8, torch.float16),
    (FP8, torch.float32),
]


def load(monkeypatch, name, weights, computed_in):
    """Load a self-contained file as a host that decided for these dtypes would."""
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "unet_dtype", lambda *_a, **_o: weights)
        patch.setattr(comfy.model_management, "unet_manual_cast", lambda *_a, **_o: computed_in)
        return rig.run("ClearSRLoader", checkpoint=name)


def sample(model, clearsr, latent):
    controlled = rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=latent)
    return rig.run("ClearSRLSAKSampler", model=controlled, lr_latent=latent, seed=1, steps=2)["samples"]


def dtypes_of(patcher):
    return {parameter.dtype for parameter in patcher.model.parameters()}


@pytest.mark.parametrize(("weights", "computed_in"), DTYPES)
def test_control_computes_in_the_dtype_of_the_unet(monkeypatch, tiny, lr, weights, computed_in) -> None:
    """Measured 2.4 units of rounding for bfloat16 and float16, 1.1 for fp8, whose activations are finer; 4 allowed."""
    model, _, clearsr = load(monkeypatch, tiny["name"], weights, computed_in)
    assert dtypes_of(model) == {weights}
    assert dtypes_of(clearsr.control) == {computed_in or weights}
    seen = []
    inner = clearsr.control.model.forward

    def forward(x_lr, *rest, **options):
        residuals = inner(x_lr, *rest, **options)
        seen.extend([x_lr.dtype, *(residual.dtype for residual in finite.flat(residuals))])
        return residuals

    monkeypatch.setattr(clearsr.control.model, "forward", forward)
    result = sample(model, clearsr, lr["latent"])
    assert set(seen) == {computed_in or weights}
    exact = sample(tiny["model"], tiny["clearsr"], lr["latent"])
    unit = torch.finfo(weights).eps / 2
    error = float((result - exact).norm() / exact.norm())
    assert 0.02 * unit < error < 4 * unit, f"{error / unit:.2f} units"


def test_weights_kept_in_half_give_the_bits_of_weights_cast_at_each_step(monkeypatch, tiny, lr) -> None:
    """Half the memory for nothing: the file's float32 would be cast to the same numbers at every call."""
    model, _, half = load(monkeypatch, tiny["name"], torch.bfloat16, None)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "inference_dtype", lambda _base: torch.float32)
        _, _, whole = load(patch, tiny["name"], torch.bfloat16, None)
    assert dtypes_of(whole.control) == {torch.float32}
    assert half.control.model_size() * 2 == whole.control.model_size()
    assert torch.equal(sample(model, half, lr["latent"]), sample(model, whole, lr["latent"]))


def test_copies_for_further_devices_have_the_same_dtype(monkeypatch, tiny) -> None:
    _, _, clearsr = load(monkeypatch, tiny["name"], torch.float16, None)
    factory, arguments = clearsr.control.cached_patcher_init
    assert dtypes_of(factory(*arguments)) == dtypes_of(factory(*arguments, disable_dynamic=True)) == {torch.float16}


@pytest.mark.parametrize("kernel", ["attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch"])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_logits_beyond_float16_stay_numbers(monkeypatch, kernel, biased) -> None:
    """SD 2's logits leave float16's range: 64 channels of 64 x 64 are 262144 before the division."""
    chosen = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, "optimized_attention", chosen)
    monkeypatch.setattr(kernels, "optimized_attention_for_device", lambda *_a, **_o: chosen)
    generator = torch.Generator().manual_seed(0)
    q = 64.0 * torch.randn(2, 3, 16, 64, generator=generator).sign()
    k, v = q.clone(), torch.randn(2, 3, 16, 64, generator=generator)
    bias = torch.randn(1, 3, 16, 16, generator=generator) if biased else None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    half = [None if tensor is None else tensor.half() for tensor in (q, k, v, bias)]
    result = attention.host_attention(*half)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def half_vae():
    """Stable Diffusion's VAE at its size, random, as graphics cards run it."""
    config = rig.module("clearsr_core.config")
    networks = config.SD21_NETWORKS
    shapes = rig.module("clearsr_core.shapes").vae_shapes(networks)
    weights = rig.draw(shapes, torch.Generator().manual_seed(0))
    return comfy.sd.VAE(sd=rig.module("clearsr_core.key_maps").vae_to_host(weights, networks), dtype=torch.bfloat16)


def test_a_float32_vae_beside_a_half_one(half_vae) -> None:
    """Same weights, computed exactly; the half one stays what it was, and patches on it are not taken along."""
    pixels = rig.images(1, 64, 64)
    before = half_vae.encode(pixels)
    patched = half_vae.patcher.clone()
    key = "encoder.conv_in.weight"
    patched.add_patches({key: (torch.ones_like(half_vae.first_stage_model.state_dict()[key]),)}, 1.0)
    comfy.model_management.load_models_gpu([patched])
    whole = vae_precision.float32_vae(half_vae)
    assert whole.vae_dtype == torch.float32 and dtypes_of(whole.patcher) == {torch.float32}
    assert vae_precision.float32_vae(whole) is whole
    assert torch.equal(half_vae.encode(pixels), before)
    exact = comfy.sd.VAE(sd={**half_vae.first_stage_model.state_dict()}, dtype=torch.float32)
    assert torch.equal(whole.encode(pixels), exact.encode(pixels))
    error = float((before - whole.encode(pixels)).norm() / before.norm())
    assert 1e-4 < error < 0.1


def test_encoder_precision_reaches_what_makes_x_lr_and_nothing_else(monkeypatch, tiny) -> None:
    other = rig.run("ClearSRLoader", checkpoint=tiny["name"])[1]
    monkeypatch.setattr(loader, "float32_vae", lambda _vae: other)
    _, vae, clearsr = rig.run("ClearSRLoader", checkpoint=tiny["name"], encoder_precision="float32")
    assert vae is not other and clearsr.vae is other
    assert clearsr.lr_encoder.first_stage_model is other.first_stage_model
    _, vae, clearsr = rig.run("ClearSRLoader", checkpoint=tiny["name"])
    assert clearsr.vae is vae
