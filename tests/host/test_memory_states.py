"""The host's states of memory: weights that wait outside of the device, models that go and come back.

A machine without a graphics card loads everything completely, whatever is asked for. So the host is told here that its
CPU is one and how much of its memory is free: what it then does with weights is its own code. Models are unloaded
before and after, as the host's own button does: as one state has loaded them, the next would take them over.
"""

from __future__ import annotations

import gc
import weakref

import clearsr_rig as rig
import comfy.model_management as management
import comfy.model_patcher
import pytest
import torch
from clearsr_runs import SMALL, apply, sample


@pytest.fixture
def latent(tiny):
    """x_lr of one picture, 24 x 16 latent."""
    return rig.run("ClearSRLREncode", clearsr=tiny["clearsr"], image=rig.images(1, 48, 32), scale=4.0)[0]


def weights(patcher):
    """A copy of all weights as they stand."""
    return {name: value.clone() for name, value in patcher.model.state_dict().items()}


def equal_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def offloaded(patcher):
    """How many layers take their weights from outside of the device for each call."""
    return sum(hasattr(module, "prev_comfy_cast_weights") for module in patcher.model.modules())


@pytest.fixture
def pretend(monkeypatch):
    """Let the host take its CPU for a device in one of its states, with so many bytes free for weights."""

    def state(name, room):
        management.unload_all_models()
        inner = management.get_free_memory

        def free(device=None, torch_free_too=False):
            there = management.minimum_inference_memory() + room
            return (there, there) if torch_free_too else there

        monkeypatch.setattr(management, "vram_state", management.VRAMState[name])
        monkeypatch.setattr(management, "is_device_cpu", lambda _device: False)
        monkeypatch.setattr(management, "get_free_memory", free)
        return inner

    yield state
    monkeypatch.undo()
    management.unload_all_models()


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["one piece", "tiles"])
@pytest.mark.parametrize(
    ("state", "room", "waits"),
    [
        ("LOW_VRAM", 3 * 2**20, True),
        ("NORMAL_VRAM", 3 * 2**20, True),
        ("NO_VRAM", 0, True),
        ("HIGH_VRAM", 2**40, False),
    ],
)
def test_states_of_memory(tiny, latent, pretend, state, room, waits, settings) -> None:
    """UNet and control in part, not at all or completely on the device: one picture, and everything as it was after."""
    expected = sample(apply(tiny, latent, **settings), latent, cfg=2.0)
    pretend(state, room)
    model = apply(tiny, latent, **settings)
    with rig.count_calls(model.model.diffusion_model, "forward") as calls:
        result = sample(model, latent, cfg=2.0)
    assert calls and (offloaded(model) > 0) == waits
    assert (offloaded(tiny["clearsr"].control) > 0) == waits
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_the_state_ends_with_the_pretence(tiny, latent) -> None:
    assert offloaded(tiny["model"]) == 0 and offloaded(tiny["clearsr"].control) == 0


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["one piece", "tiles"])
def test_unloading_between_runs(tiny, latent, settings) -> None:
    """The same bits after the host has thrown all models out; at rest the weights are those of the file."""
    management.unload_all_models()
    at_rest = [weights(patcher) for patcher in (tiny["model"], tiny["clearsr"].control)]
    model = apply(tiny, latent, **settings)
    first = sample(model, latent, cfg=2.0)
    for _ in range(2):
        management.unload_all_models()
        management.soft_empty_cache()
        for patcher, before in zip((tiny["model"], tiny["clearsr"].control), at_rest, strict=True):
            assert equal_weights(weights(patcher), before)
        assert torch.equal(sample(model, latent, cfg=2.0), first)


def test_a_part_is_unloaded_between_runs(tiny, latent, pretend) -> None:
    """Another model needs room: the host takes some layers of the UNet off the device, and they work from there."""
    model = apply(tiny, latent)
    expected = sample(model, latent, cfg=2.0)
    pretend("NORMAL_VRAM", 2**40)
    sample(model, latent, cfg=2.0)
    loaded = next(one for one in management.current_loaded_models if one.model.is_clone(model))
    assert loaded.model.partially_unload(torch.device("cpu"), 2 * 2**20) > 0
    assert offloaded(model) > 0
    torch.testing.assert_close(sample(model, latent, cfg=2.0), expected, rtol=1e-3, atol=1e-3)


def test_a_forgotten_model_frees_its_memory(latent) -> None:
    """Nothing of the pack keeps a model alive after a run."""
    name = rig.write("forgotten.safetensors", rig.tiny_checkpoint(rig.tiny_config(), seed=3))
    model, vae, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    sample(apply({"model": model, "clearsr": clearsr}, latent, **SMALL), latent)
    kept = [weakref.ref(thing) for thing in (model.model, clearsr.control.model, vae.first_stage_model)]
    del model, vae, clearsr
    management.unload_all_models()
    gc.collect()
    assert [thing() is None for thing in kept] == [True, True, True]


@pytest.mark.skipif(not hasattr(comfy.model_patcher, "ModelPatcherDynamic"), reason="newer than this ComfyUI")
def test_lazily_loaded_weights(latent, monkeypatch) -> None:
    """The host's dynamic patchers around all our models, as far as they go without a card: no LoRA, no pages."""
    import comfy.memory_management
    import comfy_aimdo.host_buffer

    class NoPages:
        """Stands for memory that only the card's library can reserve."""

        size = 0

        def __init__(self, *_sizes):
            pass

    def picture():
        loaded = rig.run("ClearSRLoader", checkpoint=name, lora_strength=0.0, encoder_lora_strength=0.0)
        model, vae, clearsr = loaded
        kinds = {type(patcher).__name__ for patcher in (model, vae.patcher, clearsr.control, clearsr.image_encoder)}
        encoded, _ = rig.run("ClearSRLREncode", clearsr=clearsr, image=rig.images(1, 48, 32), scale=4.0)
        samples = sample(apply({"model": model, "clearsr": clearsr}, encoded, **SMALL), encoded, cfg=2.0)
        return kinds, rig.run("VAEDecode", samples={"samples": samples}, vae=vae)

    name = rig.write("lazy.safetensors", rig.tiny_checkpoint(rig.tiny_config()))
    kinds, expected = picture()
    assert kinds == {"ModelPatcher"}
    with monkeypatch.context() as patch:
        patch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoPages)
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        patch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
        patch.setattr(management, "is_device_cpu", lambda _device: False)
        kinds, result = picture()
        management.unload_all_models()
        gc.collect()
    assert kinds == {"ModelPatcherDynamic"}
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(picture()[1], expected)
