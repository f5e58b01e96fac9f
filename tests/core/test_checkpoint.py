"""One file format: what is written comes back, and every defect is told in a sentence that helps."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from clearsr_core.checkpoint import Checkpoint, CheckpointError, read, read_header, write
from clearsr_core.config import TINY, BaseConfig, ClearSRConfig
from clearsr_core.shapes import checkpoint_shapes

CONFIG = ClearSRConfig(TINY, lora_rank=2, base=BaseConfig(TINY.widths, 16, 16, (32, 32, 64, 32), 1), image_encoder=True)


def checkpoint(config=CONFIG, tokens=3):
    """A checkpoint of random numbers that fits its configuration."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        part: {
            name: torch.randn([tokens if side < 0 else side for side in shape], generator=generator)
            for name, shape in weights.items()
        }
        for part, weights in checkpoint_shapes(config).items()
    }
    return Checkpoint(config, {"steps": 7, "data": "none"}, tensors)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good file; tests change copies of it."""
    path = tmp_path_factory.mktemp("checkpoint") / "good.safetensors"
    write(path, checkpoint())
    return path


@functools.cache
def good_shapes():
    """Every key of a good file with its shape."""
    shapes = checkpoint_shapes(CONFIG)
    flat = {
        f"{part}.{name}" if name else part: shape for part, names in shapes.items() for name, shape in names.items()
    }
    return flat | {"null_text": (3, 16)}


def zeros(path, change=None, metadata=None, dtypes=None):
    """Write a file of half precision zeros past `write`'s checks: a header, and a hole where the tensors lie.

    `change` edits the table of shapes, `metadata` the texts (None removes one), `dtypes` names other dtypes.
    """
    shapes = dict(good_shapes())
    if change is not None:
        change(shapes)
    texts = {"clearsr.format": "1", "clearsr.config": json.dumps(CONFIG.to_dict()), "clearsr.training": "{}"}
    entries = {"__metadata__": {k: v for k, v in (texts | (metadata or {})).items() if v is not None}}
    end = 0
    for key, shape in shapes.items():
        dtype = (dtypes or {}).get(key, "F16")
        start, end = end, end + math.prod(shape) * {"F16": 2, "I8": 1}[dtype]
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def refusal(path, reader=read):
    """Return the message of the refusal; it names the file and stays short enough to be read."""
    with pytest.raises(CheckpointError) as caught:
        reader(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.replace(str(path), "")) < 400
    return message


def test_round_trip(good):
    """Configuration, notes and every tensor with its dtype; nothing else lies in the folder afterwards."""
    whole, back = checkpoint(), read(good)
    assert back.config == CONFIG and back.training == whole.training
    assert {p: set(w) for p, w in back.tensors.items()} == {p: set(w) for p, w in whole.tensors.items()}
    for part, weights in whole.tensors.items():
        assert all(torch.equal(tensor, back.tensors[part][name]) for name, tensor in weights.items())
    assert list(good.parent.iterdir()) == [good]
    header = read_header(str(good))
    assert header.config == CONFIG and header.training == whole.training


def test_keys_in_the_file_are_those_of_the_format(good):
    """The names that hosts and users see."""
    header = good.read_bytes()
    keys = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    for key in (
        "dpm.conv_in.weight",
        "dpm.down_blocks.0.attentions.0.transformer_blocks.0.window_attention.relative_bias.weight",
        "spm.controlnet_mid_block.bias",
        "unet_lora.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight",
        "vae_lora.encoder.down_blocks.2.resnets.0.conv_shortcut.lora_B.weight",
        "vae_lora.encoder.conv_in.alpha",
        "null_text",
        "image_encoder.projection.weight",
        "base.unet.input_blocks.0.0.weight",
        "base.vae.encoder.mid.attn_1.q.weight",
    ):
        assert key in keys
    assert keys["base.vae.encoder.mid.attn_1.q.weight"]["shape"] == [32, 32, 1, 1]


def test_half_precision_and_views_are_written_as_they_are(tmp_path):
    """A tensor cut out of a larger one, and bfloat16, come back equal."""
    whole = checkpoint()
    whole.tensors["null_text"][""] = torch.randn(9, 16)[2:5]
    whole.tensors["spm"] = {name: tensor.bfloat16() for name, tensor in whole.tensors["spm"].items()}
    write(tmp_path / "a.safetensors", whole)
    back = read(tmp_path / "a.safetensors")
    assert torch.equal(back.tensors["null_text"][""], whole.tensors["null_text"][""])
    assert back.tensors["spm"]["conv_in.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, lora_rank=0, image_encoder=False),
        dataclasses.replace(CONFIG, image_encoder=False, prompt_mode="patch", clip_width=24),
        dataclasses.replace(CONFIG, control=dataclasses.replace(TINY, use_spm=False, window_attention=False)),
        dataclasses.replace(CONFIG, control=dataclasses.replace(TINY, use_dpm=False, control_input="lr+xt")),
        dataclasses.replace(
            CONFIG,
            control=dataclasses.replace(TINY, latent_channels=16),
            base=dataclasses.replace(CONFIG.base, latent_channels=16),
        ),
    ],
)
def test_variants_have_only_their_own_parts(tmp_path, config):
    path = tmp_path / "variant.safetensors"
    write(path, checkpoint(config))
    assert read(path).config == config
    assert ("spm" in read(path).tensors) == config.control.use_spm
    assert ("image_projection" in read(path).tensors) == bool(config.clip_width)


def test_shared_files_can_be_read_by_others(good):
    assert good.stat().st_mode & 0o044 == 0o044


# Files that are no checkpoint at all.


def test_no_file(tmp_path):
    assert "There is no file" in refusal(tmp_path / "absent.safetensors")
    assert "There is no file" in refusal(tmp_path)


@pytest.mark.parametrize("reader", [read, read_header])
@pytest.mark.parametrize("size", [0, 5, 9, 200, 100_000, -1])
def test_cut_off(tmp_path, good, size, reader):
    """Wherever the download stopped, the message says so, with both sizes."""
    path = tmp_path / "cut.safetensors"
    path.write_bytes(good.read_bytes()[:size])
    message = refusal(path, reader)
    assert "is empty" in message or re.search(r"is cut off: .*\d+ bytes.*the file has \d+", message)
    assert "download or copy it again" in message


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"PK\x03\x04" + bytes(100), "a pickle of PyTorch"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00state" + bytes(100), "a pickle of PyTorch"),
        (b"\x80\x05\x95" + bytes(100), "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "a web page"),
        (b"\n\n <html></html>          ", "a web page"),
        (b'{"error": "not found"}', "a JSON file"),
        (b"GGUF" + bytes(100), "a GGUF file"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, looks):
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    assert looks in message and "Please get the ClearSR checkpoint" in message
    assert ("Pickles can run code" in message) == ("ickle" in looks)


@pytest.mark.parametrize("content", [b"x" * 500, bytes(range(256)), b"\xff" * 100])
def test_noise_is_not_safetensors(tmp_path, content):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(content)
    assert "is not a safetensors file" in refusal(path)


@pytest.mark.parametrize("header", [b"{not json", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b'{"__metadata__": 3}'])
def test_a_damaged_header(tmp_path, header):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged safetensors header" in refusal(path)


def test_offsets_that_contradict_the_shapes(tmp_path, good):
    """The header reads well but lies: the library's own refusal becomes ours."""
    raw = good.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + size])
    entries["null_text"]["data_offsets"] = [0, 4]
    header = json.dumps(entries).encode()
    path = tmp_path / "lies.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    assert "is damaged" in refusal(path)


# Safetensors files that are not ours, or not this version's.


def test_a_stable_diffusion_checkpoint(tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, path)
    message = refusal(path)
    assert "no ClearSR checkpoint" in message and "Load Checkpoint" in message


def test_any_other_safetensors_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    assert "no ClearSR checkpoint" in refusal(path)


@pytest.mark.parametrize(("found", "advice"), [("2", "update ClearSR"), ("0", "export it"), ("one", "export it")])
@pytest.mark.parametrize("reader", [read, read_header])
def test_another_format_version(tmp_path, found, advice, reader):
    message = refusal(zeros(tmp_path / "other.safetensors", metadata={"clearsr.format": found}), reader)
    assert found in message and "1" in message and advice in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "clearsr.config"),
        ("{", "configuration that cannot be used"),
        ("[]", "must be JSON objects"),
        ('{"p_mode": "null"}', "did you mean 'prompt_mode'"),
        ('{"prediction": "v"}', "prediction is 'v'"),
        ('{"control": {"widths": [31]}}', "width 31"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path, text, reason):
    assert reason in refusal(zeros(tmp_path / "config.safetensors", metadata={"clearsr.config": text}))


# Weights that do not fit the configuration.


@pytest.mark.parametrize(
    "key",
    [
        "null_text",
        "dpm.conv_in.weight",
        "spm.mid_block.resnets.0.conv1.bias",
        "unet_lora.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v.alpha",
        "vae_lora.encoder.conv_in.lora_A.weight",
        "image_encoder.projection.bias",
        "base.unet.out.2.weight",
        "base.vae.post_quant_conv.bias",
    ],
)
@pytest.mark.parametrize("reader", [read, read_header])
def test_missing_extra_and_misshapen_weights(tmp_path, key, reader):
    """In every part, by its name in the file, also where no tensor is read."""
    path = tmp_path / "weights.safetensors"
    message = refusal(zeros(path, lambda flat: flat.pop(key)), reader)
    assert "lacks 1 of the" in message and key in message and "Please" in message

    def rename(flat):
        flat[f"{key}.more"] = (1,)

    message = refusal(zeros(path, rename), reader)
    assert "holds 1 weights that its configuration does not know" in message and f"{key}.more" in message

    def reshape(flat):
        flat[key] = (*flat[key], 2)

    message = refusal(zeros(path, reshape), reader)
    assert f"holds {key} with the shape" in message and "asks for" in message


def test_a_whole_part_or_many_weights_missing_stay_one_sentence(tmp_path):
    def drop(flat):
        for key in [key for key in flat if key.startswith("base.")]:
            del flat[key]

    assert "base.unet" in refusal(zeros(tmp_path / "a.safetensors", drop))


def test_lora_of_another_rank(tmp_path):
    def widen(flat):
        key = "vae_lora.encoder.conv_in.lora_A.weight"
        flat[key] = (4, 3, 3, 3)

    message = refusal(zeros(tmp_path / "rank.safetensors", widen))
    assert "(4, 3, 3, 3)" in message and "(2, 3, 3, 3)" in message


@pytest.mark.parametrize("shape", [(3, 15), (0, 16), (48,), (1, 3, 16)])
def test_a_null_text_of_the_wrong_width(tmp_path, shape):
    path = zeros(tmp_path / "text.safetensors", lambda flat: flat.update(null_text=shape))
    assert "asks for (any, 16)" in refusal(path)


def test_any_number_of_null_text_tokens(tmp_path):
    write(tmp_path / "a.safetensors", checkpoint(tokens=77))
    assert read(tmp_path / "a.safetensors").tensors["null_text"][""].shape == (77, 16)


def test_integers_are_no_weights(tmp_path):
    assert "null_text as I8" in refusal(zeros(tmp_path / "int.safetensors", dtypes={"null_text": "I8"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("dpm.conv_in.weight", b"\x00\x7e"), ("base.vae.quant_conv.bias", b"\x00\xfc"), ("null_text", b"\x00\x7e")],
    ids=["nan", "minus infinity", "nan in the text"],
)
def test_nan_weights(tmp_path, key, value):
    """The last number of one tensor, in half precision."""
    path = zeros(tmp_path / "nan.safetensors")
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
        file.seek(8 + size + entries[key]["data_offsets"][1] - 2)
        file.write(value)
    message = refusal(path)
    assert "NaN or infinite numbers in 1 weights" in message and key in message


def test_writing_refuses_what_reading_would_refuse_and_keeps_the_old_file(tmp_path):
    """A failed export leaves the previous one in place, whole, and no scraps beside it."""
    path = tmp_path / "model.safetensors"
    write(path, checkpoint())
    before = path.read_bytes()
    for poison in ("missing", "nan", "note"):
        broken = checkpoint()
        if poison == "missing":
            del broken.tensors["dpm"]["conv_in.weight"]
        elif poison == "nan":
            broken.tensors["spm"]["conv_in.bias"][0] = float("nan")
        else:
            broken.training["object"] = object()
        with pytest.raises((CheckpointError, TypeError)):
            write(path, broken)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
