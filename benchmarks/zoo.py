"""Networks of other libraries, small enough to train two steps of each on a CPU.

Networks of timm and torchvision are as they are, at few pixels where they bear that; those of
transformers have their default configuration with every size made small.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (64, 96, 128, 224, 256, 299, 384)
"""Pixels that are tried, in this order."""
BATCH = 2
TOKENS = 16

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 96),
    **dict.fromkeys(("shared_expert_intermediate_size", "d_inner", "dim_ff", "hidden_dim"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "head_dim": 16,
    "d_kv": 16,
    "d_head": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "first_k_dense_replace": 1,
    "image_size": 32,
    "patch_size": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "state_size": 8,
    "word_embed_proj_dim": 64,
    "use_cache": False,
}
"""Small values of attributes of configurations."""

HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


@dataclass(frozen=True)
class Network:
    """A network of a library.

    Attributes:
        library: Its name.
        name: What the library calls it.
        build: Makes it.
        inputs: What it may be called with, the cheapest first.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[], dict[str, Any] | Tensor], ...]


def images(size: int) -> Tensor:
    """Pictures of noise."""
    return torch.randn(BATCH, 3, size, size)


def clips(size: int) -> Tensor:
    """Films of noise."""
    return torch.randn(BATCH, 3, 16, size, size)


def tokens(**more: Any) -> dict[str, Any]:
    """Sentences of noise."""
    return {"input_ids": torch.randint(3, 128, (BATCH, TOKENS)), **more}


def translation() -> dict[str, Any]:
    """Pairs of sentences."""
    return tokens(decoder_input_ids=torch.randint(3, 128, (BATCH, TOKENS)))


def pixel_values(size: int) -> dict[str, Any]:
    """Pictures under the name that transformers have for them."""
    return {"pixel_values": images(size)}


def networks() -> Iterator[Network]:
    """All of the libraries that are installed."""
    makers = (
        ("torchvision", _of_torchvision),
        ("timm", _of_timm),
        ("segmentation_models_pytorch", _of_segmentation),
        ("transformers", _of_transformers),
    )
    for library, make in makers:
        if importlib.util.find_spec(library):
            yield from make()


def _of_torchvision() -> Iterator[Network]:
    import torchvision

    films = {"mc3_18", "r2plus1d_18", "r3d_18", "s3d"}
    pictures = tuple(partial(images, size) for size in SIZES)
    for name in torchvision.models.list_models():
        if "rcnn" in name or name.startswith(("retinanet", "fcos", "ssd", "raft")):
            continue  # take targets, or two pictures: their parts are in others of the list
        moving = name in films or name.startswith(("mvit", "swin3d"))
        weights = {"weights": None}
        if name.startswith(("deeplab", "fcn", "lraspp")):
            weights["weights_backbone"] = None
        inputs = tuple(partial(clips, size) for size in (64, 112, 224)) if moving else pictures
        make = partial(torchvision.models.get_model, name, **weights)
        yield Network("torchvision", name, make, inputs)


def _of_timm() -> Iterator[Network]:
    import timm

    pictures = tuple(partial(images, size) for size in SIZES)
    for name in timm.list_models():
        small = partial(timm.create_model, name, img_size=64)
        usual = partial(timm.create_model, name)
        yield Network("timm", name, partial(_first, small, usual), pictures)


def _of_segmentation() -> Iterator[Network]:
    import segmentation_models_pytorch as smp

    encoders = ("resnet18", "efficientnet-b0", "mobilenet_v2", "mit_b0", "timm-efficientnet-b0")
    for kind in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3"):
        for encoder in encoders:
            make = partial(getattr(smp, kind), encoder, encoder_weights=None)
            pictures = tuple(partial(images, size) for size in (64, 128))
            yield Network("segmentation_models_pytorch", f"{kind}-{encoder}", make, pictures)


def _of_transformers() -> Iterator[Network]:
    from transformers import CONFIG_MAPPING

    inputs = (tokens, translation, *(partial(pixel_values, s) for s in (32, 64, 224)))
    for name in CONFIG_MAPPING:
        yield Network("transformers", name, partial(_small_transformer, name), inputs)


def _small_transformer(name: str) -> nn.Module:
    """A network of some kind with small sizes, and the first head that it may have."""
    import transformers

    config = transformers.AutoConfig.for_model(name)
    _shrink(config)
    for head in HEADS:
        auto = getattr(transformers, head)
        if type(config) in auto._model_mapping:
            model: nn.Module = auto.from_config(config)
            return model
    raise ValueError(f"no head for {name}")


def _shrink(config: Any) -> None:
    """Make all sizes of a configuration small, and of those that it is made of."""
    for key, value in SMALL.items():
        if isinstance(getattr(config, key, None), int) or key.endswith("_token_id"):
            setattr(config, key, value)
    for key in getattr(config, "sub_configs", {}):
        if hasattr(getattr(config, key, None), "to_dict"):
            _shrink(getattr(config, key))


def _first(*builds: Callable[[], nn.Module]) -> nn.Module:
    """What the first way to build gives that works."""
    for build in builds[:-1]:
        try:
            return build()
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
    return builds[-1]()
