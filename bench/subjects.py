"""The models that are measured: nano as shipped, the paper's size and a toy with random weights, all as files.

The random ones are self-contained ClearSR files, so that ClearSR Loader makes MODEL, VAE and CLEARSR of them as it does
of any file. Speed and memory do not depend on what weights say, as long as they stay finite.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
import torch
from torch import Tensor

from ..clearsr_core import checkpoint as checkpoints
from ..clearsr_core.config import NANO, SD21_NETWORKS, TINY, BaseConfig, ClearSRConfig
from ..clearsr_core.shapes import checkpoint_shapes
from ..nodes.compat import inference_dtype
from ..nodes.loader import load_control

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..nodes.sockets import ClearSRBundle

NANO_FILE = "clearsr-nano.safetensors"
TOKENS = 77  # of a prompt of SD 2.1
_BLOCK = 1 << 22  # random numbers that are drawn; larger weights repeat them

_CONFIGS = {
    "full": ClearSRConfig(base=SD21_NETWORKS, prompt_mode="null"),
    "toy": ClearSRConfig(
        control=TINY,
        base=BaseConfig(TINY.widths, TINY.head_channels, TINY.context_dim, (32, 32, 32, 32), 1),
        prompt_mode="null",
        lora_rank=4,
    ),
}
SIZES = ("nano", *_CONFIGS)


def file_of(size: str, folder: Path) -> str:
    """Return the name under which ClearSR Loader finds a model; a random one is written into `folder` first."""
    if size == "nano":
        return NANO_FILE
    name = f"bench-{size}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write(folder / name, random_checkpoint(_CONFIGS[size]))
    return name


def config_of(size: str) -> ClearSRConfig:
    """Return the configuration of a model, nano's without reading its file."""
    if size == "nano":
        # Only widths matter here; the autoencoder's are not counted.
        base = BaseConfig(NANO.widths, NANO.head_channels, NANO.context_dim, (32, 32, 64, 128), 1, NANO.norm_groups)
        return ClearSRConfig(control=NANO, base=base, prompt_mode="null")
    return _CONFIGS[size]


def imported_config(config: ClearSRConfig) -> ClearSRConfig:
    """Return the configuration of an imported control network for the same base, as training.import_control has it."""
    control = dataclasses.replace(
        config.control, control_input="lr+xt", control_text="conditioning", window_attention=False, use_spm=False
    )
    return dataclasses.replace(
        config, control=control, lora_rank=0, prompt_mode="null", image_encoder=False, clip_width=0
    )


def imported(model: ModelPatcher, clearsr: ClearSRBundle) -> ClearSRBundle:
    """Return a random imported control network for a loaded model, of which all else is shared."""
    config = imported_config(clearsr.config)
    # Hosts know SD 2.1's networks: without them a file of that size is half as large.
    stored = dataclasses.replace(config, base=None) if config.base == SD21_NETWORKS else config
    path = Path(folder_paths.get_temp_directory()) / "bench-imported.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write(path, random_checkpoint(stored))
    control = load_control(str(path), inference_dtype(model.model))
    return dataclasses.replace(clearsr, name=path.name, config=config, control=control, image_encoder=None)


def random_checkpoint(config: ClearSRConfig) -> checkpoints.Checkpoint:
    """Draw weights in float16 that keep activations near unit scale."""
    numbers = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).half()
    parts = {
        part: {name: _weight(name, shape, numbers) for name, shape in shapes.items()}
        for part, shapes in checkpoint_shapes(config).items()
    }
    return checkpoints.Checkpoint(config, {}, parts)


def _weight(name: str, shape: tuple[int, ...], numbers: Tensor) -> Tensor:
    shape = tuple(TOKENS if side < 0 else side for side in shape)
    if len(shape) < 2:
        # Scales of norms and alphas of LoRAs are 1, biases 0.
        return torch.zeros(shape).half() if name.endswith("bias") else torch.ones(shape).half()
    count, fan_in = math.prod(shape), math.prod(shape[1:])
    repeated = numbers.repeat(-(-count // len(numbers)))[:count]
    return (repeated * fan_in**-0.5).reshape(shape)
