"""LiteMedSAM: a small SAM whose real weights fit a laptop.

The prompt encoder and the mask decoder are segment-anything's own classes (Kirillov et
al., *Segment Anything*, arXiv:2304.02643). The image encoder is a TinyViT (Wu et al.,
arXiv:2207.10666) without stride in its first layer; it is written out here, with the
names of the checkpoint, so that it can be read and adapted. The weights were fine-tuned
on many public medical images by the authors of MedSAM (Ma et al., arXiv:2304.12306).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

KEY_DIM = 32  # of every head
ROWS = 16  # of a strip, see MBConv


class ConvBN(nn.Module):
    """A convolution without bias and its batch norm, which stays frozen.

    Running statistics are part of the pretrained function: they are used, never
    updated, so that ``train()`` and ``eval()`` compute the same.
    """

    def __init__(self, inside: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        groups = inside if kernel > 1 else 1  # every 3 x 3 is depthwise
        pad = kernel // 2
        self.c = nn.Conv2d(inside, out, kernel, stride, pad, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def train(self, mode: bool = True) -> ConvBN:
        """Set the mode; the batch norm stays in evaluation."""
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, H, W) -> (B, out, H / stride, W / stride)."""
        # Folded into one convolution: the same function, one pass over the pixels less.
        bn = self.bn
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        shift = bn.bias - bn.running_mean * scale
        weight = self.c.weight * scale.view(-1, 1, 1, 1)
        c = self.c
        return F.conv2d(x, weight, shift, c.stride, c.padding, 1, c.groups)


class PatchEmbed(nn.Module):
    """Two 1 x 1 convolutions, (B, 3, S, S) -> (B, 64, S, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvBN(3, 32), nn.GELU(), ConvBN(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        """No stride: the grid stays that of the image."""
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted bottleneck, (B, d, S, S) -> the same."""

    def __init__(self, dim: int, expand: int = 4) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, dim * expand)
        self.conv2 = ConvBN(dim * expand, dim * expand, 3)
        self.conv3 = ConvBN(dim * expand, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Residual, with an activation after the sum.

        Computed in strips of rows that fit a processor's cache, each with the row
        above and below that the 3 x 3 convolution looks at: the same numbers in less
        time on a CPU (``benchmarks/results/prefix.md``).
        """
        strips, height = [], x.shape[2]
        for top in range(0, height, ROWS):
            low, high = max(0, top - 1), min(height, top + ROWS + 1)
            part = x[:, :, low:high]
            y = F.gelu(part + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(part))))))
            strips.append(y[:, :, top - low : top - low + ROWS])
        return torch.cat(strips, 2)


class PatchMerging(nn.Module):
    """To `out` channels and, with stride 2, to half the grid."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, out)
        self.conv2 = ConvBN(out, out, 3, stride)
        self.conv3 = ConvBN(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, S, S) -> (B, out, S / stride, S / stride)."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Self-attention inside one window, with a learned bias per distance.

    The rows of ``qkv`` lie per head, ``[q_h, k_h, v_h]`` for each head in turn, not in
    three thirds as in segment-anything.
    """

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.num_heads = dim // KEY_DIM
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(self.num_heads, window**2))
        self.register_buffer("lookup", _distances(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(windows, window², dim) -> the same shape."""
        b, n, dim = x.shape
        parts = self.qkv(self.norm(x)).view(b, n, self.num_heads, 3, KEY_DIM)
        q, k, v = parts.permute(3, 0, 2, 1, 4)
        bias = self.attention_biases[:, self.lookup][None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(b, n, dim))


def _distances(window: int) -> Tensor:
    """(window², window²) number of the pair (\\|dx\\|, \\|dy\\|) of two positions."""
    axis = torch.arange(window)
    x, y = (a.flatten() for a in torch.meshgrid(axis, axis, indexing="ij"))
    gap = [(a[:, None] - a[None]).abs() for a in (x, y)]
    return gap[0] * window + gap[1]


class Mlp(nn.Module):
    """Norm, four times as wide, and back; the caller adds the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Window attention, a depthwise convolution, an MLP; (B, d, S, S) -> the same."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, window)
        self.local_conv = ConvBN(dim, dim, 3)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """The grid is padded with zeros below and right to whole windows."""
        b, dim, height, width = x.shape
        w = self.window
        tall, wide = -(-height // w), -(-width // w)
        tokens = F.pad(x, (0, wide * w - width, 0, tall * w - height))
        tokens = tokens.view(b, dim, tall, w, wide, w).permute(0, 2, 4, 3, 5, 1)
        y = self.attn(tokens.reshape(-1, w * w, dim))
        y = y.view(b, tall, wide, w, w, dim).permute(0, 5, 1, 3, 2, 4)
        y = y.reshape(b, dim, tall * w, wide * w)[:, :, :height, :width]
        x = self.local_conv(x + y).permute(0, 2, 3, 1)
        return (x + self.mlp(x)).permute(0, 3, 1, 2)


class Layer(nn.Module):
    """Blocks at one resolution, and the way down to the next."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, S, S) -> (B, d', S', S')."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """LiteMedSAM's image encoder, 5,726,740 parameters.

    Attributes
    ----------
    img_size : 256, the side of the input in pixels.
    """

    img_size = 256

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        plan = [(128, 2, 7), (160, 6, 14), (320, 2, 7)]
        layers = [Layer([MBConv(64), MBConv(64)], PatchMerging(64, 128, 2))]
        for (dim, depth, window), after in zip(plan, (160, 320, None), strict=True):
            blocks: list[nn.Module] = [TinyViTBlock(dim, window) for _ in range(depth)]
            stride = 2 if after == 160 else 1
            down = PatchMerging(dim, after, stride) if after else None
            layers.append(Layer(blocks, down))
        self.layers = nn.ModuleList(layers)
        self.neck = nn.Sequential(
            nn.Conv2d(320, 256, 1, bias=False),
            LayerNorm2d(256),
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            LayerNorm2d(256),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 256, 256) in [0, 1] -> (B, 256, 64, 64)."""
        # Channels last: the change between pixels and tokens then moves no data.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)


class LiteMedSAM(nn.Module):
    """Image encoder, prompt encoder and mask decoder under SAM's names.

    9,791,300 parameters: 5,726,740, 6,220 and 4,058,340.
    """

    mask_threshold = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = TinyViT()
        self.prompt_encoder = PromptEncoder(256, (64, 64), (256, 256), 16)
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8
            ),
            transformer_dim=256,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )


def load_litemedsam(path: Path | str | None = None) -> LiteMedSAM:
    """LiteMedSAM with its published weights, in evaluation mode.

    Parameters
    ----------
    path : path, optional
        ``lite_medsam.pth``; from the asset cache if left out.

    Raises
    ------
    AssetUnavailable
        Without a network, when the file was not fetched before.
    MedtutError
        If the file is damaged, is not a checkpoint, or is one of another model.
    """
    from medtut.data.assets import fetch
    from medtut.models.sam import load_state

    path = path or fetch("litemedsam")["weights"]
    model = LiteMedSAM()
    load_state(model, path, "LiteMedSAM")
    return model.eval()
