"""Configurations survive JSON and refuse what cannot be built."""

from __future__ import annotations

import dataclasses
import json

import pytest

from clearsr_core.config import (
    NANO,
    SD21_BASE,
    SD21_NETWORKS,
    TINY,
    BaseConfig,
    ClearSRConfig,
    ControlConfig,
    RecommendedSampling,
)

NANO_NETWORKS = BaseConfig((64, 64, 128, 128), 32, 64, (32, 32, 64, 128), 1, 8)


@pytest.mark.parametrize(
    "config",
    [
        ClearSRConfig(),
        ClearSRConfig(
            control=dataclasses.replace(NANO, control_time="fixed", query_windows=(), relative_bias="none"),
            base=NANO_NETWORKS,
            latent_rgb=((0.1, 0.2, 0.3),) * 4,
            image_encoder=True,
            prompt_mode="null",
        ),
        ClearSRConfig(
            control=dataclasses.replace(
                SD21_BASE, control_input="lr+xt", control_text="conditioning", use_spm=False, window_attention=False
            ),
            lora_rank=0,
            prompt_mode="null",
            recommended=RecommendedSampling("linspace", 50, 4.0, "noise", text=True),
        ),
        ClearSRConfig(
            control=dataclasses.replace(NANO, latent_channels=16),
            base=dataclasses.replace(NANO_NETWORKS, latent_channels=16),
            latent_rgb=((0.1, 0.2, 0.3),) * 16,
        ),
    ],
)
def test_json_round_trip(config):
    assert ClearSRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_missing_key_has_its_default_so_old_files_stay_readable():
    assert ClearSRConfig.from_dict({}) == ClearSRConfig()
    assert ClearSRConfig().control.control_text == "null" and ClearSRConfig().recommended is None
    assert ControlConfig.from_dict({"widths": [32, 32, 32, 32], "head_channels": 16, "context_dim": 16}) == TINY
    table = NANO_NETWORKS.to_dict()
    assert table.pop("latent_channels") == 4
    assert BaseConfig.from_dict(table) == NANO_NETWORKS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spacing": "karras"}, "spacing is 'karras'"),
        ({"start": "cond"}, "start is 'cond'"),
        ({"steps": 0}, "recommended steps 0"),
        ({"cfg": 0.5}, r"recommended cfg 0\.5"),
        ({"cfg": float("nan")}, "recommended cfg nan"),
        ({"sampler": "ddpm"}, "unknown key 'sampler'"),
    ],
)
def test_impossible_recommendations_are_refused(values, message):
    good = {"spacing": "linspace", "steps": 50, "cfg": 4.0, "start": "noise", "text": True}
    with pytest.raises(ValueError, match=message):
        ClearSRConfig.from_dict({"recommended": {**good, **values}})


def test_a_file_without_a_base_needs_stable_diffusion_2_1():
    assert ClearSRConfig().networks == SD21_NETWORKS
    assert ClearSRConfig(NANO, base=NANO_NETWORKS).networks == NANO_NETWORKS
    with pytest.raises(ValueError, match=r"SD 2\.1-base has .*320"):
        ClearSRConfig(NANO)
    with pytest.raises(ValueError, match="the base has"):
        ClearSRConfig(TINY, base=NANO_NETWORKS)
    with pytest.raises(ValueError, match="latent_channels"):
        ClearSRConfig(dataclasses.replace(NANO, latent_channels=16), base=NANO_NETWORKS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (300, 640, 1280, 1280)}, "width 300"),
        ({"widths": ()}, "levels is 0"),
        ({"attention_levels": (True,)}, "1 attention_levels for 4 widths"),
        ({"head_channels": 48}, "head_channels 48 does not divide"),
        ({"query_windows": (8, 4)}, "2 query_windows for 4 widths"),
        ({"query_windows": (8, 4, 2, 0)}, "must be 1 or more"),
        ({"query_windows": ()}, "relative_bias='none'"),
        ({"relative_bias": "swin"}, "relative_bias is 'swin'"),
        ({"control_input": "xt"}, "control_input is 'xt'"),
        ({"control_time": "never"}, "control_time is 'never'"),
        ({"control_text": "positive"}, "control_text is 'positive'"),
        ({"control_text": "conditioning", "use_dpm": False}, "nothing reads text"),
        ({"fixed_timestep": 1000}, "fixed_timestep 1000"),
        ({"use_dpm": False, "use_spm": False}, "both off"),
    ],
)
def test_impossible_control_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SD21_BASE, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_mode": "text"}, "prompt_mode is 'text'"),
        ({"anchor": "none"}, "anchor is 'none'"),
        ({"prediction": "v"}, "prediction is 'v'"),
        ({"lora_rank": -1}, "lora_rank -1"),
        ({"latent_scale": 0.0}, "latent_scale"),
        ({"latent_scale": 0.13}, "that of SD 2.1-base is 0.18215"),
        ({"latent_rgb": ((1.0, 2.0, 3.0),)}, "4 rows"),
    ],
)
def test_impossible_checkpoints_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ClearSRConfig(**values)


@pytest.mark.parametrize(
    ("widths", "groups", "message"),
    [
        ((64, 96, 160, 160), 32, "multiples of the first"),
        ((32, 40, 64, 64), 16, "multiples of norm_groups 16"),
        ((32, 64, 128, 128), 0, "norm_groups is 0"),
    ],
)
def test_bases_that_no_host_can_build_are_refused(widths, groups, message):
    with pytest.raises(ValueError, match=message):
        BaseConfig(widths, 16, 64, (32, 32, 64, 128), 1, groups)


def test_unknown_keys_name_the_nearest_one_and_wrong_types_are_values_errors():
    with pytest.raises(ValueError, match="did you mean 'query_windows'"):
        ControlConfig.from_dict({"q_windows": [8, 4, 2, 1]})
    with pytest.raises(ValueError, match="unknown key 'sampler'"):
        ClearSRConfig.from_dict({"sampler": "ddpm"})
    with pytest.raises(ValueError, match="cannot be built"):
        ClearSRConfig.from_dict({"lora_rank": "16"})
    with pytest.raises(ValueError, match="cannot be built"):
        BaseConfig.from_dict({"unet_widths": [32]})
