"""Networks of other libraries by their names, without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("Seq2SeqLM", "MaskedLM", "CausalLM", "ImageClassification", "AudioClassification")
"""Tasks of transformers, the first one that a network has is taken."""

FRAMES = 400
"""Samples of sound for each token."""


@dataclass(frozen=True)
class Sizes:
    """How large inputs are.

    Attributes:
        batch: Samples.
        pixels: A side of a picture.
        tokens: Of a sentence.
        device: Where they are.
    """

    batch: int
    pixels: int
    tokens: int
    device: str


@dataclass(frozen=True)
class NamedModel:
    """A network that a library has under a name.

    Attributes:
        build: Makes it.
        inputs: What it is called with.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, Sizes], dict[str, Tensor]]

    def run(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """Call a network with these inputs."""
        return model(inputs[""]) if "" in inputs else model(**inputs)


def find_model(name: str) -> NamedModel | None:
    """A network of torchvision, timm or transformers; None if none of those installed has it.

    Args:
        name: For transformers a type of configuration (``"gpt2"``), or what
            ``AutoConfig.from_pretrained`` takes: a repository of the hub, or a folder.
    """
    return _of_torchvision(name) or _of_timm(name) or _of_transformers(name)


def _pictures(model: nn.Module, sizes: Sizes) -> dict[str, Tensor]:
    side = sizes.pixels
    return {"": torch.randn(sizes.batch, 3, side, side, device=sizes.device)}


def _of_torchvision(name: str) -> NamedModel | None:
    try:
        import torchvision
    except ImportError:
        return None
    if name not in torchvision.models.list_models():
        return None
    return NamedModel(lambda: torchvision.models.get_model(name), _pictures)


def _of_timm(name: str) -> NamedModel | None:
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    return NamedModel(lambda: timm.create_model(name), _pictures)


def _of_transformers(name: str) -> NamedModel | None:
    try:
        import transformers
    except ImportError:
        return None
    if name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    elif "/" not in name:
        return None
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name)
        except (OSError, ValueError):
            return None
    autos = [getattr(transformers, f"AutoModelFor{head}") for head in HEADS]
    auto = next((a for a in autos if type(config) in a._model_mapping), transformers.AutoModel)

    def build() -> nn.Module:
        model: Any = auto.from_config(config)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the one that runs without numbers
        assert isinstance(model, nn.Module)
        return model

    return NamedModel(build, _of_processor)


def _of_processor(model: Any, sizes: Sizes) -> dict[str, Tensor]:
    """Inputs as a tokenizer or an image processor would give them."""
    name, config, batch, device = model.main_input_name, model.config, sizes.batch, sizes.device
    if name == "pixel_values":
        side = getattr(config, "image_size", sizes.pixels)
        sides = (side, side) if isinstance(side, int) else tuple(side)
        channels = getattr(config, "num_channels", 3)
        return {name: torch.randn(batch, channels, *sides, device=device)}
    if name != "input_ids":
        return {name: torch.randn(batch, sizes.tokens * FRAMES, device=device)}
    found = {name: torch.zeros(batch, sizes.tokens, dtype=torch.long, device=device)}
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = found[name]
    return found
