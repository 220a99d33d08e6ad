"""MedCLIP's image tower, and two decoders that make it draw (lesson 02).

The tower is a Swin transformer (Liu et al., ICCV 2021, arXiv:2103.14030) with a linear
projection into the space it shares with reports (Wang et al., EMNLP 2022,
arXiv:2210.10163). `VectorDecoder` is the published segmentation head: it sees one
vector of 512 numbers and unfolds it to a grid of 16 x 16. `DenseDecoder` reads the
four stages of the tower instead, as a feature pyramid (Lin et al., CVPR 2017,
arXiv:1612.03144), and draws at 56 x 56 with fewer parameters.

The modules of the tower carry MedCLIP's names (``model``, ``projection_head``) and the
heads those of the published files, so that real weights load by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.errors import MedtutError

SIZE = 224  # pixels; see SwinTower.stages
CONFIGS: dict[str, dict[str, Any]] = {
    # microsoft/swin-tiny-patch4-window7-224, the backbone MedCLIP names.
    "tiny": {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.1},
    # Swin-Tiny's shape at a third of the width: what two CPU cores can train.
    "small": {"embed_dim": 32, "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.0},
}


class SwinTower(nn.Module):
    """Swin transformer and projection, with random weights.

    Parameters
    ----------
    config : {"tiny", "small"}
        "tiny" is MedCLIP's own: 27,519,354 parameters and 393,216 in the projection.
        "small" is the course's: 3,086,044 and 131,072.

    Attributes
    ----------
    widths : tuple of int
        Channels of the four stages.

    Notes
    -----
    Nothing is downloaded. See `medtut.models.medclip_io` for weights.
    """

    def __init__(self, config: str = "tiny") -> None:
        from transformers import SwinConfig, SwinModel

        super().__init__()
        if config not in CONFIGS:
            raise MedtutError(
                f"SwinTower: unknown configuration {config!r}; there are "
                f"{', '.join(CONFIGS)}."
            )
        # Windows hold 49 tokens: too few for the fused attention to pay off on a CPU.
        settings = SwinConfig(
            depths=(2, 2, 6, 2), attn_implementation="eager", **CONFIGS[config]
        )
        self.config = config
        self.widths = tuple(settings.embed_dim * 2**i for i in range(4))
        self.model = SwinModel(settings)
        self.projection_head = nn.Linear(self.widths[3], 512, bias=False)

    @property
    def channels(self) -> int:
        """Channels of the pictures the patch embedding takes."""
        return self.model.embeddings.patch_embeddings.projection.in_channels

    def stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the four stages, each before it is downsampled.

        Parameters
        ----------
        x : Tensor, (batch, channels, 224, 224)
            One channel is repeated, as MedCLIP does.

        Returns
        -------
        list of Tensor
            (batch, width, side, side) with sides 56, 28, 14, 7.

        Raises
        ------
        MedtutError
            For another number of channels or another size.
        """
        if x.shape[1:2] == (1,) and self.channels > 1:
            x = x.expand(-1, self.channels, -1, -1)
        # transformers narrows a window for good when it once meets a smaller map, so
        # another size would damage the model for every later call.
        if x.shape[1:] != (self.channels, SIZE, SIZE):
            raise MedtutError(
                f"SwinTower: pictures are {tuple(x.shape)}; it takes (batch, "
                f"{self.channels}, {SIZE}, {SIZE}). Resize them, or see "
                "inflate_channels for more modalities."
            )
        tokens, grid = self.model.embeddings(x)
        maps = []
        # Stage by stage, since SwinModel gives the maps before downsampling under
        # changing names, or (transformers 4) not at all.
        for stage in self.model.encoder.layers:
            for block in stage.blocks:
                tokens = block(tokens, grid)[0]
            maps.append(tokens.transpose(1, 2).unflatten(2, grid))
            if stage.downsample is not None:
                tokens = stage.downsample(tokens, grid)
                grid = (grid[0] // 2, grid[1] // 2)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Embedding (batch, 512), not scaled to length 1, of what `stages` takes."""
        return self.project(self.stages(x)[-1])

    def project(self, last: Tensor) -> Tensor:
        """Embedding (batch, 512) of the map of the last stage, (batch, width, 7, 7)."""
        tokens = last.flatten(2).transpose(1, 2)
        return self.projection_head(self.model.layernorm(tokens).mean(1))


def inflate_channels(tower: SwinTower, channels: int) -> SwinTower:
    """Let a tower take several modalities at once, in place.

    The patch embedding's kernel, summed over its input channels, is given to every
    modality at 1/``channels``: `channels` equal modalities give what one grey channel
    gave before (Carreira & Zisserman, CVPR 2017, did so along time).

    Parameters
    ----------
    tower : SwinTower
    channels : int
        Modalities, at least 1.
    """
    patch = tower.model.embeddings.patch_embeddings
    old = patch.projection
    if type(old) is not nn.Conv2d:
        raise MedtutError(
            "inflate_channels: the patch embedding is adapted already; inflate the "
            "tower first, then inject adapters."
        )
    if channels < 1:
        raise MedtutError(f"inflate_channels: {channels} channels; give at least 1.")
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride)
    new.to(old.weight)  # its device and precision
    with torch.no_grad():
        grey = old.weight.sum(1, keepdim=True)
        new.weight.copy_(grey.expand(-1, channels, -1, -1) / channels)
        new.bias.copy_(old.bias)
    new.requires_grad_(old.weight.requires_grad)
    patch.projection = new
    patch.num_channels = tower.model.config.num_channels = channels
    return tower


class VectorDecoder(nn.Module):
    """The published head: (batch, 512) -> logits (batch, classes, 16, 16).

    Four times doubled, from 1 x 1. 1,567,332 parameters for four classes. No
    coordinate of the picture reaches it: a place can only be told by the vector.
    """

    takes = "vector"

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        widths = (512, 256, 128, 64, 32)
        for i in range(4):
            # The convolution stands at index 1, as in the published seg_head.pth.
            up = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.Conv2d(widths[i], widths[i + 1], 3, padding=1),
                nn.ReLU(),
            )
            setattr(self, f"up{i + 1}", up)
        self.final = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, vector: Tensor) -> Tensor:
        y = vector[:, :, None, None]
        return self.final(self.up4(self.up3(self.up2(self.up1(y)))))


def _norm_conv_relu(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.GroupNorm(8, width),
        nn.ReLU(),
    )


class DenseDecoder(nn.Module):
    """Feature pyramid on the four stages -> logits (batch, classes, 56, 56).

    Parameters
    ----------
    widths : sequence of int
        Channels of the stages, finest first: ``tower.widths``.
    width : int
        Channels inside, a multiple of 8.
    classes : int

    Notes
    -----
    206,532 parameters on "tiny", 143,172 on "small": an eighth of `VectorDecoder`
    or less, for twelve times as many output pixels.
    """

    takes = "stages"

    def __init__(
        self,
        widths: tuple[int, ...] = (96, 192, 384, 768),
        width: int = 64,
        classes: int = 4,
    ) -> None:
        super().__init__()
        # The residual stream of a stage has no fixed scale: normalised on the way in.
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, w), nn.Conv2d(w, width, 1)) for w in widths
        )
        self.fuse = nn.ModuleList(_norm_conv_relu(width) for _ in widths[:-1])
        self.final = nn.Conv2d(width, classes, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        *finer, coarsest = [
            lateral(x) for lateral, x in zip(self.lateral, stages, strict=True)
        ]
        y = coarsest
        for x, fuse in zip(finer[::-1], self.fuse, strict=True):
            y = fuse(x + F.interpolate(y, scale_factor=2.0, mode="bilinear"))
        return self.final(y)


class MedCLIPSegmenter(nn.Module):
    """A tower and a head; logits of the size of the picture.

    Parameters
    ----------
    encoder : SwinTower
    seg_head : VectorDecoder or DenseDecoder

    Notes
    -----
    (batch, channels, 224, 224) -> (batch, classes, 224, 224). Adapt it with
    ``medtut.lora.inject(model, LoRAConfig(dropout=0.1), keep="^seg_head")``.
    """

    def __init__(self, encoder: SwinTower, seg_head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.seg_head = encoder, seg_head

    def forward(self, x: Tensor) -> Tensor:
        dense = self.seg_head.takes == "stages"
        logits = self.seg_head(self.encoder.stages(x) if dense else self.encoder(x))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear")
