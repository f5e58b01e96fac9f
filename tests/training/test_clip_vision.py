"""CLIP's vision model as the source of p: every layout gives the same tokens, and the file carries what nodes need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clearsr_core import checkpoint
from clearsr_core.clip_features import clip_pixels, projected_tokens
from clearsr_core.config import TINY, BaseConfig, ClearSRConfig
from training import clearsr_file
from training.base_model import BaseModel
from training.clearsr_model import ClearSRModel
from training.clip_vision import ClipImagePrompt

NETWORKS = BaseConfig(TINY.widths, 16, 16, (32, 32, 32, 32), 1)


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModelWithProjection:
    """ViT-H/14's layout: two layers, two heads of 80 channels, 2 x 2 patches, 16 wide."""
    config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
        hidden_act="gelu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def as_openclip(clip: CLIPVisionModelWithProjection) -> dict[str, torch.Tensor]:
    """Rename by hand, the other way round."""
    ours = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    named = {
        "class_embedding": ours["embeddings.class_embedding"],
        "conv1.weight": ours["embeddings.patch_embedding.weight"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "proj": ours["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        named[f"ln_pre.{kind}"] = ours[f"pre_layrnorm.{kind}"]
        named[f"ln_post.{kind}"] = ours[f"post_layernorm.{kind}"]
        for layer in range(2):
            block, mine = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            joint = [ours[f"{mine}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            named[f"{block}.attn.in_proj_{kind}"] = torch.cat(joint)
            named[f"{block}.attn.out_proj.{kind}"] = ours[f"{mine}.self_attn.out_proj.{kind}"]
            for theirs, name in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                named[f"{block}.{theirs}.{kind}"] = ours[f"{mine}.{name}.{kind}"]
            for theirs, name in (("c_fc", "fc1"), ("c_proj", "fc2")):
                named[f"{block}.mlp.{theirs}.{kind}"] = ours[f"{mine}.mlp.{name}.{kind}"]
    return {f"visual.{name}": value.clone().contiguous() for name, value in named.items()}


def stored(clip: CLIPVisionModelWithProjection, folder: Path, layout: str) -> Path:
    """Write the model in one of the layouts and return what --clip_vision names."""
    if layout == "folder":
        clip.save_pretrained(folder)
        return folder
    if layout == "pipeline":
        clip.save_pretrained(folder / "image_encoder")
        return folder
    path = folder / "clip_vision_h.safetensors"
    save_file(clip.state_dict() if layout == "file" else as_openclip(clip), path)
    return path


@pytest.mark.parametrize("layout", ["folder", "pipeline", "file", "openclip"])
def test_every_layout_gives_the_same_tokens(clip, tmp_path: Path, layout: str) -> None:
    images = torch.rand(2, 3, 40, 25, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = clip(pixel_values=clip_pixels(images, 28))
    source = stored(clip, tmp_path, layout)
    pooled = ClipImagePrompt.load(source, patch=False, context_dim=16)
    torch.testing.assert_close(pooled(images), expected.image_embeds[:, None], rtol=1e-4, atol=1e-5)
    patch = ClipImagePrompt.load(source, patch=True, context_dim=16)
    tokens = patch(images)
    assert tokens.shape == (2, 5, 16)
    torch.testing.assert_close(tokens[:, :1], pooled(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens, projected_tokens(expected.last_hidden_state, patch.projection()))
    assert not any(parameter.requires_grad for parameter in patch.parameters())


def test_what_is_no_clip_vision_model_is_refused(clip, tmp_path: Path) -> None:
    path = stored(clip, tmp_path, "file")
    with pytest.raises(ValueError, match=r"16 wide, but the base model reads 1024.*ViT-H/14"):
        ClipImagePrompt.load(path, patch=False, context_dim=1024)
    weights = clip.state_dict()
    save_file({name: value for name, value in weights.items() if "fc2" not in name}, path)
    with pytest.raises(ValueError, match="that can be used"):
        ClipImagePrompt.load(path, patch=False, context_dim=16)
    save_file({"text_model.x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no CLIP vision model"):
        ClipImagePrompt.load(path, patch=False, context_dim=16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        ClipImagePrompt.load(tmp_path / "empty", patch=False, context_dim=16)


@pytest.mark.parametrize("mode", ["pooled", "patch"])
def test_the_file_tells_the_nodes_what_to_do(clip, tmp_path: Path, monkeypatch, mode: str) -> None:
    """No image encoder, the prompt mode, for patch tokens the projection, and the fingerprint of a base outside."""
    monkeypatch.setattr(clearsr_file, "SD21_NETWORKS", NETWORKS)
    monkeypatch.setattr("clearsr_core.config.SD21_NETWORKS", NETWORKS)
    prompt = ClipImagePrompt(clip, patch=mode == "patch")
    model = ClearSRModel(BaseModel.random(NETWORKS, 0), TINY, 2, mode, 0, prompt)
    assert not any(name.startswith(("clip", "image_encoder")) for name in model.trainable())
    path = tmp_path / "clearsr.safetensors"
    clearsr_file.export(model, path, rank=2, prompt_mode=mode, anchor="lr_encoder", training={})
    file = checkpoint.read(path)
    config: ClearSRConfig = file.config
    assert (config.prompt_mode, config.image_encoder, config.clip_width) == (mode, False, 160 * (mode == "patch"))
    assert config.base is None
    assert config.base_fingerprint.startswith("1:")
    assert ("image_projection" in file.tensors) == (mode == "patch")

    again = ClearSRModel.from_checkpoint(path, BaseModel.random(NETWORKS, 0), prompt)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.image_prompt(images), model.image_prompt(images))
    with torch.no_grad():
        eps = again.eps(torch.zeros(1, 4, 16, 16), torch.tensor([5]), torch.zeros(1, 4, 16, 16), prompt(images))
    assert torch.isfinite(eps).all()


def test_a_file_of_clip_features_without_clip_is_told_once(
    clip, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clearsr_file, "SD21_NETWORKS", NETWORKS)
    monkeypatch.setattr("clearsr_core.config.SD21_NETWORKS", NETWORKS)
    prompt, base = ClipImagePrompt(clip, patch=False), BaseModel.random(NETWORKS, 0)
    model = ClearSRModel(base, TINY, 2, "pooled", 0, prompt)
    for mode in ("pooled", "null"):
        path = tmp_path / f"{mode}.safetensors"
        clearsr_file.export(model, path, rank=2, prompt_mode=mode, anchor="lr_encoder", training={})
    ClearSRModel.from_checkpoint(tmp_path / "pooled.safetensors", BaseModel.random(NETWORKS, 0), prompt)
    ClearSRModel.from_checkpoint(tmp_path / "null.safetensors", BaseModel.random(NETWORKS, 0))
    assert not caplog.messages
    ClearSRModel.from_checkpoint(tmp_path / "pooled.safetensors", BaseModel.random(NETWORKS, 0))
    assert len(caplog.messages) == 1
    assert "pooled.safetensors was trained with CLIP features" in caplog.text
    assert "empty prompt" in caplog.text
