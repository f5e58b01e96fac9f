"""The base model of stage 3 from every form that it comes in, and the words for the forms that it must not have."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from clearsr_core.config import SD21_NETWORKS, BaseConfig, ControlConfig
from clearsr_core.key_maps import unet_to_host, vae_to_host
from training import empty_prompt
from training.base_files import RANDOM, layout, random_networks
from training.base_model import BaseModel
from training.single_file import TEXT, UNET, VAE, refuse_v_prediction

TINY = BaseConfig((32, 32, 32, 32), 16, 16, (32, 32, 32, 32), 1)
CONTROL = ControlConfig(widths=TINY.unet_widths, head_channels=16, context_dim=16)
VOCABULARY, TOKENS, LAYERS = 40, 9, 3


def openclip(seed: int = 0, width: int = 16) -> dict[str, Tensor]:
    """Random weights of a text encoder in OpenCLIP's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token_embedding.weight": (VOCABULARY, width), "positional_embedding": (TOKENS, width)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, width)}
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}"
        shapes |= {f"{block}.{name}.{kind}": (width,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, sides in {
            "attn.out_proj": (width, width),
            "mlp.c_fc": (2 * width, width),
            "mlp.c_proj": (width, 2 * width),
        }.items():
            shapes |= {f"{block}.{name}.weight": sides, f"{block}.{name}.bias": sides[:1]}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.random(TINY, seed=3)


@pytest.fixture(scope="module")
def original(base: BaseModel) -> dict[str, Tensor]:
    """The base in the original layout, with what such files hold besides."""
    tensors = {UNET + name: value for name, value in unet_to_host(base.unet.state_dict(), CONTROL).items()}
    tensors |= {VAE + name: value for name, value in vae_to_host(base.vae.state_dict(), TINY).items()}
    tensors |= {TEXT + name: value for name, value in openclip().items()}
    extra = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(()), "cond_stage_model.logit": torch.zeros(1)}
    return {name: value.detach().clone().contiguous() for name, value in {**tensors, **extra}.items()}


def same(first: BaseModel, second: BaseModel) -> None:
    for ours, theirs in ((first.unet, second.unet), (first.vae, second.vae)):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_a_folder_comes_back_exactly_and_runs(base: BaseModel, tmp_path: Path) -> None:
    base.save(tmp_path)
    loaded = BaseModel.load(tmp_path)
    same(loaded, base)
    assert torch.equal(loaded.null_text, base.null_text)
    x_t, context = torch.randn(1, 4, 16, 16), base.null_text[None]
    with torch.no_grad():
        eps = loaded.unet(x_t, 5, context).sample
        torch.testing.assert_close(eps, base.unet(x_t, 5, context).sample, rtol=1e-4, atol=1e-5)


def test_a_stop_while_a_folder_is_saved_again_leaves_the_one_before(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.save(tmp_path)
    files = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def stopped(folder: str) -> None:
        (Path(folder) / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    other = BaseModel.random(TINY, 1)
    monkeypatch.setattr(other.unet, "save_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        other.save(tmp_path)

    assert files == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.undo()
    other.save(tmp_path)
    same(BaseModel.load(tmp_path), other)
    assert files.keys() == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_in_the_original_layout(base: BaseModel, original: dict, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "v2-1.safetensors"
    save_file({name: value.to(dtype) for name, value in original.items()}, path)
    loaded = BaseModel.from_single_file(path, TINY)
    assert loaded.unet.dtype == loaded.vae.dtype == loaded.null_text.dtype == torch.float32
    assert loaded.null_text.shape == (TOKENS, 16)
    rounded = BaseModel.random(TINY, seed=3)
    for module in (rounded.unet, rounded.vae):
        module.to(dtype).float()
    same(loaded, rounded)


def test_the_empty_prompt_is_that_of_the_last_layer_but_one(tmp_path: Path) -> None:
    """By attention written out here, on the tokens start, end, 0, 0, ..."""
    weights = openclip(1)
    found = empty_prompt.from_openclip(weights)
    tokens = torch.tensor([VOCABULARY - 2, VOCABULARY - 1] + [0] * (TOKENS - 2))
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, (16,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for layer in range(LAYERS - 1):
        block = f"transformer.resblocks.{layer}"
        joint = norm(x, f"{block}.ln_1") @ weights[f"{block}.attn.in_proj_weight"].T
        q, k, v = (joint + weights[f"{block}.attn.in_proj_bias"]).chunk(3, dim=1)
        future = torch.ones(TOKENS, TOKENS).triu(1).bool()
        attention = (q @ k.T / 4.0).masked_fill(future, float("-inf")).softmax(dim=1)  # one head of 16 channels
        x = x + linear(attention @ v, f"{block}.attn.out_proj")
        hidden = torch.nn.functional.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    torch.testing.assert_close(found, norm(x, "ln_final"), rtol=1e-4, atol=1e-5)


def test_the_text_encoder_of_a_folder_makes_the_empty_prompt(base: BaseModel, tmp_path: Path) -> None:
    base.save(tmp_path)
    (tmp_path / "null_text.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither null_text.safetensors nor text_encoder"):
        BaseModel.load(tmp_path)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=TOKENS,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    tokens = torch.tensor([[VOCABULARY - 2, VOCABULARY - 1] + [0] * (TOKENS - 2)])
    with torch.no_grad():
        expected = model(tokens).last_hidden_state[0]
    torch.testing.assert_close(BaseModel.load(tmp_path).null_text, expected)


def test_random_weights_follow_the_seed_and_leave_torchs_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, again = (BaseModel.load(RANDOM, (32, 32, 32, 32), 1) for _ in range(2))
    other = BaseModel.load(RANDOM, (32, 32, 32, 32), 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    same(first, again)
    assert torch.equal(first.null_text, again.null_text)
    assert not torch.equal(first.unet.conv_in.weight, other.unet.conv_in.weight)
    assert first.unet.config.cross_attention_dim == 1024


def test_sizes_of_random_models() -> None:
    assert random_networks((320, 640, 1280, 1280)) == SD21_NETWORKS
    assert random_networks((64, 64, 128, 128)).head_channels == 64
    for widths in ((32, 32, 32), (33, 33, 33, 33), (64, 96, 128, 128), (0, 32, 32, 32)):
        with pytest.raises(ValueError, match="--base_widths="):
            random_networks(widths)


def edited(original: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Make the file of another model by its telling weights."""
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    if kind == "sd15":
        return {**original, key: torch.zeros(32, 768)}
    if kind == "sdxl":
        return {**original, f"{UNET}label_emb.0.0.weight": torch.zeros(1)}
    if kind == "lora":
        return {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}
    if kind == "vae":
        return {name: value for name, value in original.items() if name.startswith(VAE)}
    if kind == "unet":
        return {name: value for name, value in original.items() if name.startswith(UNET)}
    if kind == "inpainting":
        return {**original, f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    if kind == "no text":
        return {name: value for name, value in original.items() if not name.startswith(TEXT)}
    if kind == "half a text":
        return {name: value for name, value in original.items() if "mlp.c_fc" not in name}
    if kind == "missing":
        return {name: value for name, value in original.items() if name != f"{UNET}out.2.bias"}
    if kind == "shape":
        return {**original, f"{UNET}out.2.bias": torch.zeros(5)}
    if kind == "bytes":
        return {**original, f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.uint8)}
    return {"something": torch.zeros(1)}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sd15", "Stable Diffusion 1.x"),
        ("sdxl", "SDXL"),
        ("lora", "a LoRA"),
        ("vae", "VAE"),
        ("unet", "a UNet alone"),
        ("inpainting", "9 input channels"),
        ("no text", "no text encoder"),
        ("half a text", "text encoder that cannot be used"),
        ("missing", r"lacks 1 of the .*out\.2\.bias"),
        ("shape", r"out\.2\.bias with the shape \(5,\), expected \(4,\)"),
        ("bytes", "as U8"),
        ("other", "no Stable Diffusion checkpoint"),
    ],
)
def test_other_files_are_called_by_their_name(original: dict, tmp_path: Path, kind: str, said: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file(edited(original, kind), path)
    with pytest.raises(ValueError, match=said) as raised:
        BaseModel.from_single_file(path, TINY)
    assert "Please" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_damaged_files_and_pickles(original: dict, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(original, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        BaseModel.load(path)
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(ValueError, match=r"pickle.*Stable Diffusion 2\.1-base"):
        BaseModel.load(path)
    with pytest.raises(ValueError, match="There is no file"):
        BaseModel.load(tmp_path / "nothing")


def test_v_prediction(base: BaseModel, original: dict, tmp_path: Path) -> None:
    """By the scheduler of a folder, the metadata of a file, and at full size by the bias that hosts go by."""
    base.save(tmp_path)
    (tmp_path / "scheduler").mkdir()
    settings = tmp_path / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="v_prediction"):
        BaseModel.load(tmp_path)
    settings.write_text(json.dumps({"prediction_type": "epsilon"}))
    BaseModel.load(tmp_path)
    save_file(original, tmp_path / "v.safetensors", metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(ValueError, match="v-prediction"):
        BaseModel.from_single_file(tmp_path / "v.safetensors", TINY)
    wide = torch.linspace(-1.0, 1.0, 320)
    with pytest.raises(ValueError, match=r"2\.1-768"):
        refuse_v_prediction(tmp_path, wide, SD21_NETWORKS.unet_widths)
    refuse_v_prediction(tmp_path, 0.01 * wide, SD21_NETWORKS.unet_widths)
    refuse_v_prediction(tmp_path, wide, TINY.unet_widths)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cross_attention_dim": 768}, "Stable Diffusion 1.x"),
        ({"addition_embed_type": "text_time"}, "SDXL"),
        ({"in_channels": 9}, "9 input channels"),
        ({"use_linear_projection": False}, "no Stable Diffusion 2 model"),
    ],
)
def test_other_folders_are_called_by_their_name(base: BaseModel, tmp_path: Path, change: dict, said: str) -> None:
    base.save(tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        BaseModel.load(tmp_path)


def test_unet_and_autoencoder_have_the_same_latents(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="autoencoder's latents have 4 channels, the UNet reads 16"):
        layout({**base.unet.config, "in_channels": 16}, base.vae.config)


def test_folders_that_are_not_whole(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no unet/config\.json"):
        BaseModel.load(tmp_path)
    base.save(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    kept = {name: value for name, value in base.unet.state_dict().items() if name != "conv_out.bias"}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights in unet \(conv_out\.bias"):
        BaseModel.load(tmp_path)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"no \.safetensors in unet; pickles"):
        BaseModel.load(tmp_path)


def test_half_precision_folders_are_found_by_their_marked_names(base: BaseModel, tmp_path: Path) -> None:
    base.save(tmp_path)
    for part in ("unet", "vae"):
        weights = tmp_path / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    same(BaseModel.load(tmp_path), base)
