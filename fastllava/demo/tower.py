"""The demo's vision tower: a small CLIP that learns to tell, patch by patch, what it looks at.

Shape letters: I images, P patches an image, C width.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.images import load_image
from fastllava.demo.backbones import BackboneSizes, draw_weights, fit, write_json, write_model
from fastllava.demo.dataset import DrawnSet
from fastllava.demo.scenes import BACKGROUNDS, COLOURS, GRID, PLACES, SHAPES, Scene
from fastllava.model.llava import normalise
from fastllava.model.ops import Ops
from fastllava.model.towers import ClipConfig, Tower

SELECT_LAYER = -2
BATCH = 32
CLASSES = (1 + len(SHAPES), 1 + len(COLOURS), len(PLACES), len(BACKGROUNDS))
"""What a patch is asked: the shape and the colour in its quarter (0: none), which quarter it is in, and the background."""


@dataclass(frozen=True)
class TowerScore:
    """How well the trained tower's features tell what is in a held-out patch, by a linear readout; shares in [0, 1]."""

    shape: float
    colour: float


def make_tower(folder: Path, drawn: DrawnSet, sizes: BackboneSizes, limits: DataConfig, ops: Ops, seed: int) -> TowerScore:
    """Train a tower on the training pictures and write its folder: config.json, model.safetensors, preprocessor_config.json.

    The loss is the cross-entropy of linear readouts of the very features that the projector will get (hidden state -2);
    the readouts are thrown away. The decoder's questions and captions play no part in it.
    """
    config = ClipConfig(
        hidden_size=sizes.tower_width,
        intermediate_size=3 * sizes.tower_width,
        num_hidden_layers=sizes.tower_blocks,
        num_attention_heads=max(1, sizes.tower_width // 32),
        image_size=sizes.image,
        patch_size=sizes.patch,
    )
    spec = ImageSpec(config.image_size, config.patches, ClipConfig.MEAN, ClipConfig.STD)
    generator = torch.Generator().manual_seed(seed)
    tower, readout = Tower(config, ops, SELECT_LAYER), nn.Linear(sizes.tower_width, sum(CLASSES))
    draw_weights(tower, 0.02, generator)
    draw_weights(readout, 0.02, generator)

    pixels = load_pixels(drawn.images, list(drawn.train), spec, limits)
    labels = patch_labels(list(drawn.train.values()), sizes.image // sizes.patch)
    # Parameters of the blocks that never run have no gradient and stay as drawn.
    parameters = [*tower.parameters(), *readout.parameters()]
    batches = [part for _ in range(sizes.tower_epochs) for part in torch.randperm(len(pixels), generator=generator).split(BATCH)]

    def losses() -> Iterator[Tensor]:
        for part in batches:
            logits = readout(tower(normalised(pixels[part]))).split(CLASSES, -1)
            parts = [F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in zip(logits, labels[part].unbind(-1), strict=True)]
            yield torch.stack(parts).sum()

    fit(parameters, losses(), len(batches), lr=2e-3)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preprocessor_config.json", _preprocessor(sizes.image))
    fields = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "torch_dtype": "float32"}
    write_model(folder, tower, asdict(config) | fields)
    return _score(tower, readout, drawn, spec, limits)


def load_pixels(images: Path, names: list[str], spec: ImageSpec, limits: DataConfig) -> Tensor:
    """uint8 [I, 3, size, size] of the files, by the policy of `limits`."""
    return torch.from_numpy(np.stack([load_image(images / name, limits.image_policy, spec, limits) for name in names]))


def patch_labels(scenes: list[Scene], side: int) -> Tensor:
    """int64 [I, P, 4]: the classes of CLASSES for each of side x side patches, which GRID must divide."""
    quarters = torch.zeros(len(scenes), len(PLACES), len(CLASSES), dtype=torch.int64)
    quarters[..., 2] = torch.arange(len(PLACES))
    for index, scene in enumerate(scenes):
        for place in scene.places:
            quarters[index, place, :2] = torch.tensor((1 + SHAPES.index(scene.shape), 1 + list(COLOURS).index(scene.colour)))
        quarters[index, :, 3] = list(BACKGROUNDS).index(scene.background)
    along = torch.arange(side) * GRID // side
    return quarters[:, (along[:, None] * GRID + along).flatten()]


def normalised(pixels: Tensor) -> Tensor:
    """fp32 [I, 3, H, W] of uint8 pixels, as the model does it."""
    return normalise(pixels, torch.tensor(ClipConfig.MEAN), torch.tensor(ClipConfig.STD))


@torch.no_grad()
def _score(tower: Tower, readout: nn.Linear, drawn: DrawnSet, spec: ImageSpec, limits: DataConfig) -> TowerScore:
    scenes = drawn.held_out_scenes
    labels = patch_labels(list(scenes.values()), int(spec.patches**0.5))
    logits = readout(tower(normalised(load_pixels(drawn.images, list(scenes), spec, limits)))).split(CLASSES, -1)
    filled = labels[..., 0] > 0
    shape, colour = ((x.argmax(-1) == y)[filled].float().mean().item() for x, y in zip(logits[:2], labels.unbind(-1)[:2], strict=True))
    return TowerScore(shape, colour)


def _preprocessor(size: int) -> dict[str, object]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(ClipConfig.MEAN),
        "image_std": list(ClipConfig.STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
