"""The example workflows: which nodes, how they are connected, what the notes beside them say."""

from __future__ import annotations

from dataclasses import dataclass, field

NANO = "clearsr-nano.safetensors"
# Measured on the first crops of RealSR (docs/NANO.md); the paper's 50 steps the whole way are the node's own defaults.
NANO_SAMPLING: dict[str, object] = {"steps": 7, "denoise": 0.35, "strength_rule": "over the phase"}
WIDTH = 320


@dataclass(frozen=True)
class Link:
    """An input that comes from output number `output` of node `node`."""

    node: str
    output: int = 0


@dataclass(frozen=True)
class Node:
    """One box: its class, its inputs by name (a Link or a widget's value), a title if the class's own will not do."""

    kind: str
    inputs: dict[str, object] = field(default_factory=dict)
    title: str | None = None


@dataclass(frozen=True)
class Note:
    """Text beside the nodes, in Markdown, under a title."""

    title: str
    text: str
    height: int = 200


@dataclass(frozen=True)
class Column:
    """Nodes and notes below each other, framed together under a title."""

    title: str
    names: tuple[str, ...]
    width: int = WIDTH


@dataclass(frozen=True)
class Graph:
    """A workflow: nodes and notes by name, and columns from left to right."""

    nodes: dict[str, Node]
    notes: dict[str, Note]
    columns: tuple[Column, ...]

    def ids(self) -> dict[str, int]:
        """Number nodes first, then notes, from 1: both forms of a workflow use the same ids."""
        return {name: number for number, name in enumerate((*self.nodes, *self.notes), start=1)}


def _sliders(start: str) -> Note:
    return Note(
        "Two sliders",
        f"""**alpha** pulls the first steps towards the low-resolution picture: more faithful, calmer.

**beta** pushes the last steps away from it: crisper, more detail.

{start} Moving only beta repeats only the last steps.
""",
        height=230,
    )


def _upscale(
    *, checkpoint: str, base: dict[str, Node], clip: Link | None, prefix: str, sampling: dict[str, object]
) -> dict[str, Node]:
    """The four ClearSR nodes and the colour fix.

    `base` and `clip` are what a file without a base model needs, `sampling` the widgets that differ from the node's.
    """
    loader: dict[str, object] = {"checkpoint": checkpoint}
    if base:
        loader |= {"model": Link("base", 0), "vae": Link("base", 2)}
    control: dict[str, object] = {
        "model": Link("loader", 0),
        "clearsr": Link("loader", 2),
        "lr_latent": Link("encode", 0),
    }
    if clip is not None:
        control["clip_vision_output"] = clip
    return {
        "image": Node("LoadImage", {"image": "example.png"}, "Low-resolution picture"),
        **base,
        "loader": Node("ClearSRLoader", loader),
        "encode": Node("ClearSRLREncode", {"clearsr": Link("loader", 2), "image": Link("image", 0)}),
        "control": Node("ClearSRControlApply", control),
        "sampler": Node("ClearSRLSAKSampler", {"model": Link("control"), "lr_latent": Link("encode", 0), **sampling}),
        "decode": Node("VAEDecode", {"samples": Link("sampler"), "vae": Link("loader", 1)}),
        "colour": Node("ClearSRColorFix", {"image": Link("decode"), "reference": Link("encode", 1)}),
        "save": Node("SaveImage", {"images": Link("colour"), "filename_prefix": prefix}, "Result"),
        "compare": Node("PreviewImage", {"images": Link("encode", 1)}, "Bicubic, for comparison"),
    }


CLEARSR_X4 = Graph(
    nodes=_upscale(checkpoint=NANO, base={}, clip=None, prefix="ClearSR", sampling=NANO_SAMPLING),
    notes={
        "about": Note(
            "ClearSR x4",
            """Choose a small, blurred or compressed picture (100 to 300 pixels) and press Run.

The model is *nano*: small, complete in one file, trained by this pack's own `training` folder. It shows the
method on any machine; it is no match for a full-size model.

`example.png` stands for your picture: pick one in the node below.
""",
            height=260,
        ),
        "sliders": _sliders(
            "They stand at the paper's 0.01, where this small model hardly shows them: set one to 0.1 and compare."
        ),
    },
    columns=(
        Column("1  Picture", ("about", "image")),
        Column("2  Model and low-resolution latent", ("loader", "encode"), width=360),
        Column("3  Control and sampling", ("control", "sampler"), width=360),
        Column("4  Decoding", ("decode", "colour", "sliders")),
        Column("Before", ("compare",), width=520),
        Column("After", ("save",), width=520),
    ),
)

CLEARSR_X4_SD21 = Graph(
    nodes=_upscale(
        checkpoint="clearsr-sd21.safetensors",
        base={
            "base": Node("CheckpointLoaderSimple", {"ckpt_name": "v2-1_512-ema-pruned.safetensors"}, "SD 2.1-base"),
            "clip": Node(
                "CLIPVisionLoader", {"clip_name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"}, "CLIP ViT-H"
            ),
            "features": Node(
                "CLIPVisionEncode", {"clip_vision": Link("clip"), "image": Link("encode", 1), "crop": "none"}
            ),
        },
        clip=Link("features"),
        prefix="ClearSR_SD21",
        sampling={},
    ),
    notes={
        "about": Note(
            "ClearSR x4 on SD 2.1-base",
            """Three files that this pack does not bring:

- **Stable Diffusion 2.1-base** (the 512-pixel, eps model; not 2.1-768), in `models/checkpoints`
- **CLIP ViT-H/14** vision encoder, in `models/clip_vision`
- a **ClearSR checkpoint** for SD 2.1-base, in `models/clearsr`. No official weights are public: train one with this
  pack's `training` folder.

Without them, use the workflow *clearsr_x4*.
""",
            height=360,
        ),
        "sliders": _sliders("They stand at the paper's 0.01; for more fidelity the paper has alpha at 0.03."),
    },
    columns=(
        Column("1  Picture", ("about", "image")),
        Column("2  Base model", ("base", "clip"), width=360),
        Column("3  Model and low-resolution latent", ("loader", "encode", "features"), width=360),
        Column("4  Control and sampling", ("control", "sampler"), width=360),
        Column("5  Decoding", ("decode", "colour", "sliders")),
        Column("Before", ("compare",), width=520),
        Column("After", ("save",), width=520),
    ),
)

DIFFBIR_POSITIVE = "a sharp, highly detailed photograph, natural light, fine texture"
DIFFBIR_NEGATIVE = "blurry, noisy, JPEG artifacts, oversmoothed, oil painting, drawing, watermark"
_DIFFBIR_FILES = """Three files that this pack does not bring:

- **SD 2.1-base** (512 px, eps-prediction), in `models/checkpoints`
- **diffbir-v2.safetensors**, in `models/clearsr`. Make it from DiffBIR's public `v2.pth` (1.45 GB, Apache-2.0) with \
`training/import_control.py`; the pack's docs/FULL_SIZE.md has the command.
- an **upscale model**, in `models/upscale_models`

There is no thumbnail: nobody has run this workflow with the real weights here. The functions are proven equal to \
DiffBIR's; the image is yours to check.
"""


def _restore_with_diffbir(steps: int, about: str) -> Graph:
    """DiffBIR's imported control network on SD 2.1-base, with the settings that it was made for."""
    nodes = _upscale(
        checkpoint="diffbir-v2.safetensors",
        base={"base": Node("CheckpointLoaderSimple", {"ckpt_name": "v2-1_512-ema-pruned.safetensors"}, "SD 2.1-base")},
        clip=None,
        prefix="DiffBIR",
        sampling={
            "steps": steps,
            "cfg": 4.0,
            "sampler_name": "ddpm",
            "scheduler": "ddpm_linspace",
            "alpha": 0.0,
            "beta": 0.0,
            "start_from_lr": False,
            "positive": Link("positive"),
            "negative": Link("negative"),
        },
    )
    nodes["encode"] = Node("ClearSRLREncode", {"clearsr": Link("loader", 2), "image": Link("restored"), "scale": 1.0})
    nodes["compare"] = Node("PreviewImage", {"images": Link("encode", 1)}, "After stage 1")
    extra = {
        "stage1": Node("UpscaleModelLoader", {"model_name": "BSRNet.pth"}, "Stage 1: any 4x upscale model"),
        "restored": Node(
            "ImageUpscaleWithModel", {"upscale_model": Link("stage1"), "image": Link("image")}, "Stage 1: restore"
        ),
        "positive": Node("CLIPTextEncode", {"clip": Link("base", 1), "text": DIFFBIR_POSITIVE}, "Positive"),
        "negative": Node("CLIPTextEncode", {"clip": Link("base", 1), "text": DIFFBIR_NEGATIVE}, "Negative"),
    }
    return Graph(
        nodes=nodes | extra,
        notes={
            "about": Note("Restore with DiffBIR on SD 2.1-base", about, height=620),
            "stage1_note": Note(
                "Stage 1",
                """Removes noise and blur before the diffusion model draws detail. BSRNet is what DiffBIR v2 uses; any \
4x upscale model of ComfyUI works (Real-ESRGAN, SwinIR).

**A model that does not enlarge** (SCUNet): set `scale` of *LR Latent Encode* to 4.

**No upscale model:** select both boxes, press Ctrl+B, and set `scale` to 4. Noisy images come out worse.
""",
                height=300,
            ),
            "settings": Note(
                "Settings",
                """DiffBIR was made for these: `ddpm_linspace`, 50 steps, cfg 4, `start_from_lr` off, positive and \
negative text. *LSA KSampler* warns if a run differs so much that the result is worse.

**alpha** above 0 keeps the result closer to the stage 1 image, **beta** above 0 sharpens. Start with 0.01.

**dpm_strength** of *DPM/SPM Control Apply*: below 1 the result is freer.
""",
                height=320,
            ),
        },
        columns=(
            Column("1  Image", ("about", "image")),
            Column("2  Stage 1", ("stage1", "restored", "stage1_note"), width=360),
            Column("3  Model and text", ("base", "loader", "positive", "negative"), width=380),
            Column("4  Control and sampling", ("encode", "control", "sampler"), width=360),
            Column("5  Decoding", ("decode", "colour", "settings")),
            Column("Before", ("compare",), width=520),
            Column("After", ("save",), width=520),
        ),
    )


RESTORE_SD21_DIFFBIR = _restore_with_diffbir(
    50, "DiffBIR's control network, not a ClearSR model: 50 steps, the authors' settings.\n\n" + _DIFFBIR_FILES
)
RESTORE_SD21_DIFFBIR_FAST = _restore_with_diffbir(
    20, "DiffBIR's control network, not a ClearSR model: 20 steps, 2.5 times as fast.\n\n" + _DIFFBIR_FILES
)

LSA_ANY_MODEL = Graph(
    nodes={
        "image": Node("LoadImage", {"image": "example.png"}, "Picture"),
        "base": Node("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}, "Any SD or SDXL model"),
        "positive": Node("CLIPTextEncode", {"clip": Link("base", 1), "text": "sharp photograph"}, "Positive"),
        "negative": Node("CLIPTextEncode", {"clip": Link("base", 1), "text": "blurry, noisy"}, "Negative"),
        "enlarge": Node(
            "ImageScaleBy", {"image": Link("image", 0), "upscale_method": "bicubic", "scale_by": 2.0}, "Enlarge 2x"
        ),
        "encode": Node("VAEEncode", {"pixels": Link("enlarge"), "vae": Link("base", 2)}),
        "lsa": Node(
            "ClearSRLSAPatch", {"model": Link("base", 0), "lr_latent": Link("encode"), "alpha": 0.02, "beta": 0.02}
        ),
        "sampler": Node(
            "KSampler",
            {
                "model": Link("lsa"),
                "seed": 0,
                "steps": 25,
                "cfg": 5.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "positive": Link("positive"),
                "negative": Link("negative"),
                "latent_image": Link("encode"),
                "denoise": 0.5,
            },
        ),
        "decode": Node("VAEDecode", {"samples": Link("sampler"), "vae": Link("base", 2)}),
        "save": Node("SaveImage", {"images": Link("decode"), "filename_prefix": "LSA"}, "Result"),
    },
    notes={
        "about": Note(
            "LSA with any model",
            """An ordinary image-to-image upscale. *LSA Patch* (latent space adjustment) stands between model and
sampler and needs no ClearSR checkpoint:

**alpha** holds the first steps near the picture, **beta** pushes the last ones away from it for detail.

Choose your own checkpoint; any sampler and scheduler will do.
""",
            height=250,
        ),
    },
    columns=(
        Column("1  Picture", ("about", "image")),
        Column("2  Model and prompt", ("base", "positive", "negative"), width=360),
        Column("3  Latent of the picture", ("enlarge", "encode", "lsa")),
        Column("4  Sampling", ("sampler", "decode")),
        Column("5  Result", ("save",), width=520),
    ),
)

GRAPHS = {
    "clearsr_x4": CLEARSR_X4,
    "clearsr_x4_sd21": CLEARSR_X4_SD21,
    "lsa_any_model": LSA_ANY_MODEL,
    "restore_sd21_diffbir": RESTORE_SD21_DIFFBIR,
    "restore_sd21_diffbir_fast": RESTORE_SD21_DIFFBIR_FAST,
}
