"""What keeps the controlled run near the cost of its networks: kernels, calls, copies."""

from __future__ import annotations

import clearsr_rig as rig
import comfy.ldm.modules.attention as host_kernels
import pytest
import torch
from clearsr_runs import apply
from torch.utils._python_dispatch import TorchDispatchMode

hooks = rig.module("nodes.control_hooks")
control = rig.module("clearsr_core.control")


def sample(model, lr, **settings):
    values = {"seed": 3, "steps": 4, "alpha": 0.0, "beta": 0.0, **settings}
    return rig.run("ClearSRLSAKSampler", model=model, lr_latent=lr["latent"], **values)["samples"]


def test_dpm_attends_with_the_kernel_of_the_unet(tiny, monkeypatch) -> None:
    """The host's choice by device is another, far slower one on a CPU started with --use-pytorch-cross-attention."""
    calls = []

    def kernel(*args, **options):
        calls.append(options.get("mask"))
        return host_kernels.attention_pytorch(*args, **options)

    monkeypatch.setattr(host_kernels, "optimized_attention", kernel)
    net = tiny["clearsr"].control.model
    net(torch.randn(1, 4, 16, 16), torch.tensor([5]), tiny["clearsr"].null_text[None])
    blocks = [module for module in net.modules() if type(module).__name__ == "TransformerBlock"]
    assert calls == [None] * 2 * len(blocks)


def test_both_halves_of_guidance_share_memory() -> None:
    """One picture's residuals serve cond and uncond as a view, not as a copy."""
    residuals = control.ControlResiduals((torch.randn(1, 3, 4, 4),), torch.randn(1, 3, 2, 2))
    twice = hooks._repeated(residuals, 2)
    assert twice.down[0].shape == (2, 3, 4, 4)
    assert twice.down[0].data_ptr() == residuals.down[0].data_ptr()
    several = control.ControlResiduals((torch.randn(2, 3, 4, 4),), torch.randn(2, 3, 2, 2))
    assert torch.equal(hooks._repeated(several, 2).down[0], several.down[0].repeat(2, 1, 1, 1))


@pytest.mark.parametrize(("every", "expected"), [(1, 10), (2, 5), (3, 4), (5, 2), (10, 1), (50, 1)])
def test_control_is_computed_as_often_as_asked_for(tiny, lr, every, expected) -> None:
    """Once for both halves of guidance, and anew at every n-th step only."""
    model = apply(tiny, lr["latent"], control_every=every)
    with rig.count_calls(tiny["clearsr"].control.model.dpm, "forward") as calls:
        sample(model, lr, steps=10, cfg=2.0)
    assert len(calls) == expected
    assert {args[0].shape[0] for args, _options in calls} == {1}


def test_control_follows_the_hosts_option_for_the_layout_of_weights(tiny, lr, monkeypatch) -> None:
    """--force-channels-last: as the UNet, so that no convolution has to change the layout of what it gets."""
    monkeypatch.setattr("comfy.cli_args.args.force_channels_last", True)
    model, _vae, clearsr = rig.run("ClearSRLoader", checkpoint=tiny["name"])
    for network in (model.model.diffusion_model, clearsr.control.model):
        weights = [weight for weight in network.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    inputs = {"model": model, "clearsr": clearsr, "lr_latent": lr["latent"]}
    result = sample(rig.run("ClearSRControlApply", **inputs), lr)
    monkeypatch.undo()
    plain = {"model": tiny["model"], "clearsr": tiny["clearsr"], "lr_latent": lr["latent"]}
    expected = sample(rig.run("ClearSRControlApply", **plain), lr)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


class Waits(TorchDispatchMode):
    """Counts what makes the processor wait for a device: a number read out of a tensor, a comparison of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def waits(work) -> int:
    with Waits() as counter:
        work()
    return counter.count


@pytest.mark.parametrize(("cfg", "every", "allowed"), [(1.0, 1, 1), (2.0, 1, 2), (1.0, 4, 2), (2.0, 4, 3)])
def test_a_step_waits_for_the_device_only_to_know_its_noise_level(tiny, controlled, lr, cfg, every, allowed) -> None:
    """Beyond the host's own: the sigma, whether both halves are equal, and whether the kept control still fits."""
    model = controlled
    if every > 1:
        inputs = {"model": tiny["model"], "clearsr": tiny["clearsr"], "lr_latent": lr["latent"]}
        model = rig.run("ClearSRControlApply", **inputs, control_every=every)

    def added(steps: int) -> int:
        settings = {"steps": steps, "cfg": cfg, "scheduler": "normal"}
        plain = waits(lambda: sample(tiny["model"], lr, **settings))
        return waits(lambda: sample(model, lr, **settings)) - plain

    assert (added(12) - added(4)) / 8 <= allowed
