"""Networks that people train, at sizes that take a second, with inputs that fit them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import video

__all__ = ["REAL_MODELS", "RealModel"]


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions, with skips; instance norms."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()

        def block(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                nn.InstanceNorm2d(c_out, affine=True),
                nn.LeakyReLU(0.1, inplace=True),
            )

        c = channels
        self.first, self.down1, self.down2 = block(3, c), block(c, 2 * c), block(2 * c, 4 * c)
        self.up1 = nn.ConvTranspose2d(4 * c, 2 * c, 2, stride=2)
        self.join1 = block(4 * c, 2 * c)
        self.up2 = nn.ConvTranspose2d(2 * c, c, 4, stride=2, padding=1)
        self.join2 = block(2 * c, c)
        self.head = nn.Conv2d(c, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3, H, W]`` to ``[N, 2, H, W]``."""
        x0 = self.first(x)
        x1 = self.down1(functional.max_pool2d(x0, 2))
        x2 = self.down2(functional.avg_pool2d(x1, 2))
        x1 = self.join1(torch.cat([x1, self.up1(x2)], 1))
        x0 = self.join2(torch.cat([x0, self.up2(x1)], 1))
        y: Tensor = self.head(x0)
        return y


class Audio(nn.Module):
    """Dilated, gated and grouped one-dimensional convolutions with weight-normalised ends."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        c = channels
        self.start = nn.utils.parametrizations.weight_norm(nn.Conv1d(1, c, 7, padding=3))
        self.gates = nn.ModuleList(
            nn.Conv1d(c, 2 * c, 3, padding="same", dilation=2**i) for i in range(4)
        )
        self.mix = nn.ModuleList(nn.Conv1d(c, c, 1, groups=3) for _ in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(3, c) for _ in range(4))
        self.recurrent = nn.GRU(c, c, batch_first=True)
        self.head = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 1, T]`` to ``[N, 5]``."""
        x = self.start(x)
        for gate, mix, norm in zip(self.gates, self.mix, self.norms, strict=True):
            x = x + mix(norm(functional.glu(gate(x), dim=1)))
        y: Tensor = self.head(self.recurrent(x.mT)[0].mean(1))
        return y


class GPTBlock(nn.Module):
    """Causal attention by hand-written projections, and a multi-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, S, width]`` to itself."""
        n, s, width = x.shape
        parts = self.qkv(self.ln_1(x)).view(n, s, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n, s, width))
        y = functional.gelu(self.fc(self.ln_2(x)))
        return x + torch.as_tensor(self.out(y))


class GPT(nn.Module):
    """Decoder with learnt positions and the head tied to the embedding."""

    def __init__(self, tokens: int = 50, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(tokens, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(GPTBlock(width, 4) for _ in range(blocks))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[N, S]`` to logits ``[N, tokens, S]``."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.ln_f(x))
        return y.mT


def images(size: int, count: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(count, 3, size, size)


@dataclass(frozen=True)
class RealModel:
    """A network, its input, and what is to become of its parameters.

    Attributes:
        build: Makes the network.
        x: Makes a batch of inputs.
        captured: Number of parameters with curvature.
        others: Number of the other parameters by kind of module and reason.
        slow: Whether it is left to the slow tests.
    """

    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    captured: int
    others: dict[tuple[str, str], int]
    slow: bool = False


def _refused(kind: str, count: int) -> dict[tuple[str, str], int]:
    return {(kind, f"{kind} is not a supported layer"): count}


def torchvision_model(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=10, **options)


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64
    )


REAL_MODELS: dict[str, RealModel] = {
    "ResNet18": RealModel(
        torchvision_model("resnet18"), images(32), 22, _refused("BatchNorm2d", 40)
    ),
    "ResNet50": RealModel(
        torchvision_model("resnet50"), images(32), 55, _refused("BatchNorm2d", 106)
    ),
    "VGG11": RealModel(torchvision_model("vgg11", dropout=0.0), images(32), 22, {}, slow=True),
    "MobileNetV3": RealModel(
        torchvision_model("mobilenet_v3_small"), images(64), 74, _refused("BatchNorm2d", 68)
    ),
    "ConvNeXt-tiny": RealModel(
        torchvision_model("convnext_tiny"),
        images(32),
        118,
        {**_refused("CNBlock", 18), **_refused("LayerNorm", 36), **_refused("LayerNorm2d", 10)},
    ),
    "DenseNet121": RealModel(
        torchvision_model("densenet121"), images(32), 122, _refused("BatchNorm2d", 242)
    ),
    "ViT-tiny": RealModel(
        tiny_vit,
        images(32),
        28,
        {
            **_refused("LayerNorm", 10),
            **_refused("VisionTransformer", 1),
            ("Encoder", "no product takes it, but add"): 1,
        },
    ),
    "3-d ResNet": RealModel(
        lambda: video.r3d_18(num_classes=5),
        lambda: torch.randn(2, 3, 4, 16, 16),
        22,
        _refused("BatchNorm3d", 40),
    ),
    "U-Net": RealModel(UNet, images(16), 11, _refused("InstanceNorm2d", 10)),
    "audio": RealModel(
        Audio,
        lambda: torch.randn(2, 1, 64),
        18,
        {
            **_refused("GroupNorm", 8),
            **_refused("GRU", 4),
            (
                "ParametrizationList",
                "the weight that its layer uses is computed of it (a parametrization)",
            ): 2,
            ("ParametrizedConv1d", "its weight is not a parameter"): 1,
        },
    ),
    "GPT": RealModel(
        GPT,
        lambda: torch.randint(50, (3, 12)),
        16,
        {
            **_refused("LayerNorm", 10),
            **_refused("Embedding", 1),
            (
                "Embedding",
                "it is shared by Embedding wte and Linear head (capture_tied is False)",
            ): 1,
        },
    ),
}
