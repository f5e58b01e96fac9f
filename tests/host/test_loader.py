"""ClearSR Loader: what it builds, what it refuses and in which words."""

from __future__ import annotations

import dataclasses
import pickle

import clearsr_rig as rig
import comfy.model_base
import comfy.supported_models
import pytest
import torch

checkpoints = rig.module("clearsr_core.checkpoint")
config_module = rig.module("clearsr_core.config")
merge = rig.module("clearsr_core.merge")


def load(name, **inputs):
    return rig.run("ClearSRLoader", checkpoint=name, **inputs)


def weight(patcher, key):
    """A weight as the host runs it, with patches merged."""
    rig.comfy.model_management.load_models_gpu([patcher])
    return patcher.model_state_dict()[key].clone()


def test_lora_is_merged_as_the_core_defines_it(tiny) -> None:
    """UNet decoder and VAE encoder, through the host's own LoRA maths."""
    file = checkpoints.read(rig.MODELS / tiny["name"])
    key_maps = rig.module("clearsr_core.key_maps")
    maps = {
        "unet_lora": (key_maps.unet_lora_map(file.config.control), "base.unet", tiny["model"], "diffusion_model."),
        "vae_lora": (key_maps.vae_lora_map(file.config.networks), "base.vae", tiny["clearsr"].lr_encoder.patcher, ""),
    }
    for part, (names, base, patcher, prefix) in maps.items():
        lora = file.tensors[part]
        assert len(names) * 3 == len(lora)
        assert len(patcher.patches) == len(names)
        for layer in (min(names), max(names), sorted(names)[len(names) // 2]):
            expected = merge.merged(
                file.tensors[base][names[layer]],
                lora[f"{layer}.lora_A.weight"],
                lora[f"{layer}.lora_B.weight"],
                float(lora[f"{layer}.alpha"]),
                1.0,
            )
            actual = weight(patcher, prefix + names[layer])
            torch.testing.assert_close(actual, expected.reshape(actual.shape), rtol=1e-4, atol=1e-5)


def test_strengths(tiny) -> None:
    """0 adds nothing at all; another strength is passed to the host."""
    model, vae, clearsr = load(tiny["name"], lora_strength=0.0, encoder_lora_strength=0.5)
    assert model.patches == {} and vae.patcher.patches == {}
    assert {entry[0] for entries in clearsr.lr_encoder.patcher.patches.values() for entry in entries} == {0.5}


def test_bundle_shows_the_host_its_models(tiny) -> None:
    bundle = tiny["clearsr"]
    assert bundle.patcher is bundle.control
    assert len(bundle.get_models()) == 4 and bundle.get_ram_usage() > 1_000_000
    assert bundle.lr_encoder.first_stage_model is bundle.vae.first_stage_model
    again = bundle.control.cached_patcher_init[0](*bundle.control.cached_patcher_init[1], disable_dynamic=True)
    for name, value in bundle.control.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_own_base_and_connected_sockets_do_not_mix(tiny) -> None:
    with pytest.raises(ValueError, match=r"brings its own MODEL and VAE, but MODEL and VAE are connected"):
        load(tiny["name"], model=tiny["model"], vae=tiny["vae"])
    with pytest.raises(ValueError, match=r"but VAE is connected"):
        load(tiny["name"], vae=tiny["vae"])


def test_a_file_with_16_latent_channels_runs() -> None:
    """Encode, control, sample, decode: MODEL and VAE have the number of the file."""
    name = rig.write("sixteen.safetensors", rig.tiny_checkpoint(rig.tiny_config(control_latent_channels=16)))
    model, vae, clearsr = load(name)
    assert model.model.latent_format.latent_channels == vae.latent_channels == 16
    latent, _ = rig.run("ClearSRLREncode", clearsr=clearsr, image=rig.images(), scale=4.0)
    assert latent["samples"].shape == (1, 16, 8, 8)
    controlled = rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=latent)
    result = rig.run("ClearSRLSAKSampler", model=controlled, lr_latent=latent, steps=2)["samples"]
    assert result.shape == (1, 16, 8, 8) and torch.isfinite(result).all()
    assert vae.decode(result).shape == (1, 64, 64, 3)


@pytest.fixture
def baseless(monkeypatch, tiny):
    """A file that needs the user's MODEL and VAE; the tiny base stands for SD 2.1-base, which no test can hold."""
    config = rig.tiny_config()
    monkeypatch.setattr(config_module, "SD21_NETWORKS", config.base)
    small = dataclasses.replace(config, base=None, latent_rgb=None, image_encoder=False)
    return rig.write("baseless.safetensors", rig.tiny_checkpoint(small, seed=1))


def test_connected_model_and_vae_are_used_and_loading_again_replaces(tiny, baseless) -> None:
    model, vae, _ = load(baseless, model=tiny["model"], vae=tiny["vae"])
    assert vae is tiny["vae"] and model.model is tiny["model"].model
    assert all(len(entries) == 1 for entries in model.patches.values())
    twice, _, _ = load(baseless, model=model, vae=vae)
    assert all(len(entries) == 1 for entries in twice.patches.values())
    key = next(iter(model.patches))
    assert torch.equal(weight(twice, key), weight(model, key))
    assert not torch.equal(weight(tiny["model"], key), weight(model, key))
    off, _, _ = load(baseless, model=model, vae=vae, lora_strength=0.0)
    assert off.patches == {}


def test_another_base_of_the_same_size_is_told(monkeypatch, tiny, lr, caplog) -> None:
    """By the weights from before any LoRA, merged ones included; a rounded copy is the same base; never an error."""
    config = rig.tiny_config()
    monkeypatch.setattr(config_module, "SD21_NETWORKS", config.base)
    checks, prints = rig.module("nodes.model_checks"), rig.module("clearsr_core.fingerprint")
    small = dataclasses.replace(config, base=None, latent_rgb=None, image_encoder=False)
    stored = checkpoints.read(rig.MODELS / tiny["name"]).tensors["base.unet"]
    names = rig.module("clearsr_core.key_maps").unet_from_host(stored, config.control)
    rounded = prints.unet_fingerprint({name: value.bfloat16() for name, value in names.items()})
    other = prints.unet_fingerprint({name: 0.9 * value for name, value in names.items()})

    def told(fingerprint, model):
        caplog.clear()
        changed = dataclasses.replace(small, base_fingerprint=fingerprint)
        name = rig.write("printed.safetensors", rig.tiny_checkpoint(changed, seed=1))
        adapted, _, clearsr = load(name, model=model, vae=tiny["vae"])
        return adapted, clearsr, "not the base model that 'printed.safetensors' was trained on" in caplog.text

    adapted, _, said = told(rounded, tiny["model"])
    assert not said
    weight(adapted, next(iter(adapted.patches)))  # the host merges the LoRA
    assert not told(rounded, adapted)[2]
    assert not told("", tiny["model"])[2]
    adapted, clearsr, said = told(other, tiny["model"])
    assert said
    # Control Apply says it only of a MODEL that no loader has compared.
    bare = tiny["model"].clone()
    bare.remove_attachments("clearsr")
    for model, expected in ((adapted, False), (bare, True)):
        caplog.clear()
        rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=lr["latent"])
        assert ("is not the base model" in caplog.text) == expected
    found = checks.base_fingerprint(tiny["model"], small)
    assert checks.other_base("Node", found, "", "file") is None
    assert checks.other_base("Node", "", other, "file") is None
    assert checks.other_base("Node", found, other, "file") is not None


def test_other_loras_stay(tiny, baseless) -> None:
    other = tiny["model"].clone()
    other.add_patches({"diffusion_model.out.2.weight": (torch.zeros(4, 32, 3, 3),)}, 0.7)
    model, _, _ = load(baseless, model=other, vae=tiny["vae"])
    assert len(model.patches["diffusion_model.out.2.weight"]) == 1


def test_missing_sockets_say_what_to_connect(tiny, baseless) -> None:
    with pytest.raises(ValueError, match=r"MODEL and VAE are not connected.*2\.1-base.*Load Checkpoint"):
        load(baseless)
    with pytest.raises(ValueError, match=r"VAE is not connected"):
        load(baseless, model=tiny["model"])


@pytest.mark.parametrize(
    ("kind", "unet", "found"),
    [
        ("SD15", {"model_channels": 320, "context_dim": 768, "channel_mult": [1, 2, 4, 4]}, "Stable Diffusion 1.x"),
        (
            "SDXL",
            {"model_channels": 320, "context_dim": 2048, "channel_mult": [1, 2, 4], "adm_in_channels": 2816},
            "SDXL",
        ),
        ("SD20", {"model_channels": 320, "context_dim": 1024, "channel_mult": [1, 2, 4, 4]}, "SD 2.1-base, too wide"),
    ],
)
def test_models_of_other_families_are_refused(tiny, baseless, kind, unet, found) -> None:
    other = rig.host_model(getattr(comfy.supported_models, kind), unet)
    with pytest.raises(ValueError, match=r"connected MODEL is .*2\.1-base") as raised:
        load(baseless, model=other, vae=tiny["vae"])
    if kind != "SD20":
        assert found in str(raised.value)


def test_v_prediction_is_refused_and_sd21_base_accepted() -> None:
    """By the real configuration of SD 2.1: the same widths, only the prediction differs."""
    checks = rig.module("nodes.model_checks")

    class VPrediction(comfy.supported_models.SD20):
        def model_type(self, *_args, **_options):
            return comfy.model_base.ModelType.V_PREDICTION

    unet = {"model_channels": 320, "context_dim": 1024, "channel_mult": [1, 2, 4, 4]}
    config = config_module.ClearSRConfig()
    with pytest.raises(ValueError, match=r"2\.1-768 \(v-prediction\)"):
        checks.check_model("Node", rig.host_model(VPrediction, unet), config, "file")
    checks.check_model("Node", rig.host_model(comfy.supported_models.SD20, unet), config, "file")
    with pytest.raises(ValueError, match="9 input channels"):
        wide = rig.host_model(comfy.supported_models.SD20, {**unet, "in_channels": 9})
        checks.check_model("Node", wide, config, "file")


def test_foreign_vae_is_refused(tiny, baseless) -> None:
    class Flux:
        latent_channels, downscale_ratio = 16, 8

    with pytest.raises(ValueError, match=r"16 channels at 1/8"):
        load(baseless, model=tiny["model"], vae=Flux())


def test_damaged_files_are_refused_by_name(tiny) -> None:
    """Each with one sentence that names the file; the host goes on."""
    whole = (rig.MODELS / tiny["name"]).read_bytes()
    broken = {
        "truncated.safetensors": whole[: len(whole) // 2],
        "empty.safetensors": b"",
        "pickle.safetensors": pickle.dumps({"weights": [1, 2, 3]}),
        "page.safetensors": b"<!DOCTYPE html><html>404</html>",
    }
    for name, content in broken.items():
        (rig.MODELS / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"ClearSR Loader: .*{name}") as told:
            load(name)
        assert told.type is ValueError  # ComfyUI shows the name of the kind, and that of our own is a path
    file = rig.tiny_checkpoint(rig.tiny_config())
    first = next(iter(file.tensors["dpm"]))
    file.tensors["dpm"][first] = file.tensors["dpm"][first] * float("nan")
    with pytest.raises(checkpoints.CheckpointError, match="NaN"):
        rig.write("nan.safetensors", file)
    assert load(tiny["name"])


def test_absent_file_says_where_to_put_it() -> None:
    kind = rig.nodes.NODE_CLASS_MAPPINGS["ClearSRLoader"]
    said = kind.validate_inputs("nothing.safetensors")
    assert "nothing.safetensors" in said and str(rig.MODELS) in said
    assert kind.fingerprint_inputs("nothing.safetensors") is None
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load("nothing.safetensors")


def test_fingerprint_follows_the_file(tiny) -> None:
    kind = rig.nodes.NODE_CLASS_MAPPINGS["ClearSRLoader"]
    status = (rig.MODELS / tiny["name"]).stat()
    assert kind.fingerprint_inputs(tiny["name"], lora_strength=1.0) == (status.st_mtime_ns, status.st_size)


def test_memory_estimate_of_a_narrow_model_is_a_share_of_the_full_one(tiny) -> None:
    full = comfy.supported_models.SD20.memory_usage_factor
    assert tiny["model"].model.memory_usage_factor == pytest.approx(full * 32 / 320)


def test_nothing_is_registered_for_narrow_models(tiny) -> None:
    names = [kind.__name__ for kind in comfy.supported_models.models]
    assert "NarrowSD2" not in names
    assert tiny["model"].model.model_type == comfy.model_base.ModelType.EPS


def test_a_linked_checkpoint_is_left_to_the_run(tiny) -> None:
    """The host asks with None before it knows what a link brings."""
    loader = rig.nodes.NODE_CLASS_MAPPINGS["ClearSRLoader"]
    assert loader.validate_inputs() is True
    assert loader.validate_inputs(checkpoint=None) is True
    assert loader.fingerprint_inputs(checkpoint=None, lora_strength=1.0) is None
    assert "was not found" in loader.validate_inputs(checkpoint="absent.safetensors")


def test_models_of_two_self_contained_files_are_not_mixed(tiny, lr) -> None:
    """Their networks have the same shapes, and the result would be noise without a word."""
    other = rig.tiny_checkpoint(rig.tiny_config(), seed=1)
    model, _, clearsr = rig.run("ClearSRLoader", checkpoint=rig.write("other_base.safetensors", other))
    for mixed in ({"model": tiny["model"], "clearsr": clearsr}, {"model": model, "clearsr": tiny["clearsr"]}):
        with pytest.raises(ValueError, match=r"is another one than .* carries"):
            rig.run("ClearSRControlApply", lr_latent=lr["latent"], **mixed)
    again = rig.run("ClearSRLoader", checkpoint=tiny["name"], lora_strength=0.5)[0]
    rig.run("ClearSRControlApply", model=again, clearsr=tiny["clearsr"], lr_latent=lr["latent"])


def test_a_file_with_fewer_layers_loads_and_samples(lr) -> None:
    """The format allows other UNets than SD 2.1's: the level weights follow the number of their skips."""
    config = rig.tiny_config(control_layers_per_block=1)
    name = rig.write("shallow.safetensors", rig.tiny_checkpoint(config))
    model, _, clearsr = rig.run("ClearSRLoader", checkpoint=name)
    assert clearsr.base == ""
    latent, _ = rig.run("ClearSRLREncode", clearsr=clearsr, image=rig.images(), scale=4.0)
    for weights in ("", "1, 1, 1, 1, 1", "1 1 1 1 1 1 1 1 1"):
        controlled = rig.run(
            "ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=latent, level_weights=weights
        )
        result = rig.run("ClearSRLSAKSampler", model=controlled, lr_latent=latent, steps=2)["samples"]
        assert result.isfinite().all()
    with pytest.raises(ValueError, match=r"write 5 numbers .* or 9 numbers"):
        rig.run("ClearSRControlApply", model=model, clearsr=clearsr, lr_latent=latent, level_weights="1, 2")
