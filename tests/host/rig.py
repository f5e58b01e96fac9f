"""A real ComfyUI in this process, the pack loaded into it as ComfyUI itself does, and tiny checkpoints to run.

Imported by conftest.py under the name `clearsr_rig`, only where COMFYUI_PATH names the host. Order matters: the host's
arguments before its modules, its `utils` before its `nodes` (0.3.75), `nodes` from the host and not from this pack.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TREE = Path(os.environ["COMFYUI_PATH"]).resolve()
BASE = Path(tempfile.mkdtemp(prefix="clearsr_host_"))
MODELS = BASE / "models" / "clearsr"

# The pack's own root must not be importable: its `nodes` would hide the host's.
sys.path[:] = [str(TREE), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
for folder in (MODELS, BASE / "custom_nodes", BASE / "temp", BASE / "input", BASE / "output"):
    folder.mkdir(parents=True, exist_ok=True)

# isort: off
from comfy.cli_args import args  # noqa: E402

args.cpu, args.base_directory, args.disable_api_nodes = True, str(BASE), True
args.database_url = "sqlite:///:memory:"
# On a processor ComfyUI's own attention takes whatever memory is free: 16 GiB for 2048 x 2048 pixels in the VAE.
args.use_pytorch_cross_attention = "large" in sys.argv

import utils.extra_config  # noqa: E402, F401
import nodes  # noqa: E402
import execution  # noqa: E402
import server  # noqa: E402

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
# isort: on

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

events: list[tuple[Any, Any]] = []
progress: list[tuple[int, int, bool]] = []  # (value, total, preview is there)


def _hook(value: int, total: int, preview: Any, *_more: Any, **_options: Any) -> None:
    progress.append((value, total, preview is not None))


def _snapshot() -> dict[str, dict[str, int]]:
    """Identity of every attribute of every ComfyUI module, and of every class in them."""
    found: dict[str, dict[str, int]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(module, ModuleType) or file is None or not Path(file).is_relative_to(TREE):
            continue
        found[name] = {key: id(value) for key, value in vars(module).items()}
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == name:
                found[f"{name}.{key}"] = {inner: id(member) for inner, member in vars(value).items()}
    return found


async def _load() -> tuple[dict, dict]:
    await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
    before = _snapshot()
    assert await nodes.load_custom_node(str(ROOT)), "ComfyUI could not load the pack; its log says why"
    return before, _snapshot()


loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
prompt_server = server.PromptServer(loop)
prompt_server.send_sync = lambda event, data, sid=None: events.append((event, data))
comfy.utils.set_progress_bar_global_hook(_hook)
host_before, host_after = loop.run_until_complete(_load())

PACK_NAME = str(ROOT).replace(".", "_x_")
pack = sys.modules[PACK_NAME]


def module(name: str) -> ModuleType:
    """Return a module of the pack, as the host loaded it: "nodes.control", "clearsr_core.lsa"."""
    import importlib

    return importlib.import_module(f"{PACK_NAME}.{name}")


def run(node_id: str, **inputs: Any) -> Any:
    """Execute one node as the host does and return its outputs: one alone, or a tuple."""
    kind = nodes.NODE_CLASS_MAPPINGS[node_id]
    with torch.inference_mode():
        if hasattr(kind, "define_schema"):
            clone = kind.PREPARE_CLASS_CLONE({})
            result = clone.EXECUTE_NORMALIZED(**inputs).args
        else:
            result = getattr(kind(), kind.FUNCTION)(**inputs)
    return result[0] if len(result) == 1 else tuple(result)


def prompt(graph: dict) -> tuple[bool, dict, list]:
    """Run an API-format graph through the host's own executor: success, outputs, status messages."""
    identity = uuid.uuid4().hex
    valid, error, outputs, node_errors = loop.run_until_complete(execution.validate_prompt(identity, graph, None))
    if not valid:
        raise ValueError(f"{error} {node_errors}")
    executor = execution.PromptExecutor(
        prompt_server,
        cache_type=execution.CacheType.CLASSIC,
        cache_args={"lru": 0, "ram": 0, "ram_inactive": 0},
    )
    events.clear()
    executor.execute(graph, identity, {"client_id": "tests"}, outputs)
    return executor.success, executor.history_result.get("outputs", {}), executor.status_messages


# ---- tiny models ----------------------------------------------------------------------------------------------------


def draw(shapes: dict[str, tuple[int, ...]], generator: torch.Generator, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near unit scale; norms at identity."""
    weights = {}
    for name, shape in shapes.items():
        shape = tuple(3 if side == -1 else side for side in shape)
        if name.endswith("alpha"):
            weights[name] = torch.tensor(2.0)  # another strength than that of alpha = rank
        elif len(shape) < 2:
            weights[name] = torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
            if any(part in name for part in ("in_layers.0.weight", "out_layers.0.weight", "out.0.weight")):
                weights[name] = torch.ones(shape)
        else:
            fan_in = max(1, int(torch.tensor(shape[1:]).prod()))
            weights[name] = gain * torch.randn(shape, generator=generator) / fan_in**0.5
    return weights


def tiny_config(**changes: Any) -> Any:
    """A self-contained configuration of width 32 with an image encoder; `control_*` keys go to the control networks."""
    import dataclasses

    config = module("clearsr_core.config")
    latent_channels = changes.get("control_latent_channels", 4)
    control = {key.removeprefix("control_"): value for key, value in changes.items() if key.startswith("control_")}
    control = {("control_" + key if key in ("input", "time", "text") else key): value for key, value in control.items()}
    rest = {key: value for key, value in changes.items() if not key.startswith("control_")}
    values = {
        # Other norm groups than the host builds. Wider than TINY where 8 x 8 latents become one pixel.
        "control": dataclasses.replace(config.TINY, **{"widths": (32, 32, 64, 64), "norm_groups": 8, **control}),
        "lora_rank": 4,
        "prompt_mode": "pooled",
        "base": config.BaseConfig((32, 32, 64, 64), 16, 16, (32, 32, 32, 32), 1, 8, latent_channels),
        "latent_rgb": ((0.3, 0.2, 0.1), (0.1, 0.2, 0.3), (0.2, 0.1, 0.0), (0.0, 0.1, 0.2)) * (latent_channels // 4),
        "image_encoder": True,
    }
    return config.ClearSRConfig(**{**values, **rest})


def tiny_checkpoint(config: Any, seed: int = 0, silent: bool = False) -> Any:
    """A random checkpoint; `silent`: the output convolutions of DPM and SPM and both LoRAs are zero, as untrained."""
    shapes = module("clearsr_core.shapes").checkpoint_shapes(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {part: draw(weights, generator) for part, weights in shapes.items()}
    for part in ("unet_lora", "vae_lora"):
        for name, value in tensors.get(part, {}).items():
            if ".lora_B." in name:
                tensors[part][name] = value * (0.0 if silent else 0.3)
    for part in ("dpm", "spm"):
        for name, value in tensors.get(part, {}).items():
            if name.startswith("controlnet_"):
                tensors[part][name] = value * (0.0 if silent else 0.3)
    return module("clearsr_core.checkpoint").Checkpoint(config, {}, tensors)


def write(name: str, checkpoint: Any) -> str:
    """Put a checkpoint into the host's models/clearsr and return its name there."""
    module("clearsr_core.checkpoint").write(MODELS / name, checkpoint)
    return name


def images(count: int = 1, height: int = 16, width: int = 16, seed: int = 5) -> torch.Tensor:
    """Smooth random pictures, (count, height, width, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return smooth.movedim(1, -1).contiguous()


def host_model(kind: type, unet_config: dict) -> Any:
    """A MODEL of another family without weights (meta device), for what only looks at its configuration."""
    host_config = kind({"in_channels": 4, "out_channels": 4, "image_size": 32, **unet_config})
    host_config.unet_config["disable_unet_model_creation"] = True
    model = host_config.get_model({}, "", device=torch.device("meta"))
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@contextlib.contextmanager
def count_calls(owner: Any, name: str) -> Iterator[list]:
    """Record the calls of a method while inside."""
    calls: list = []
    inner = getattr(owner, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return inner(*args, **options)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        setattr(owner, name, inner)
