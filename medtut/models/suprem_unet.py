"""The U-Net of SuPreM: a 3-D U-Net whose normalisation never uses running statistics.

Zhou et al., *Models Genesis* (MICCAI 2019) made the layout, Li et al., *SuPreM* (ICLR
2024) the weights. Written from what the published module does (upstream SuPreM
``backbone/unet.py``), with its names, so that its state dict fits; the head is called
``classifier`` here, as in Swin UNETR, and gives logits.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.models.swin_unetr import check_roi

WIDTHS = (64, 128, 256, 512)  # in the published names, whatever the feature size


class BatchStatNorm3d(nn.BatchNorm3d):
    """Batch norm by the statistics of the batch at hand, also in ``eval``.

    The published ``ContBatchNorm3d`` always passes ``training=True``, so its running
    means are written, in ``eval`` as well, and never read. Here they are left as they
    were loaded. What follows from it: the output for a region depends on the other
    regions in the batch, and a region has to leave more than one value per channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight, self.bias
        return F.batch_norm(x, None, None, *scale, True, self.momentum, self.eps)


class ConvUnit(nn.Module):
    """Convolution of 3^3, norm, ReLU."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inside, outside, 3, padding=1)
        self.bn1 = BatchStatNorm3d(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu()


def down(inside: int, width: int) -> nn.Module:
    """inside -> width / 2 -> width channels."""
    units = ConvUnit(inside, width // 2), ConvUnit(width // 2, width)
    return nn.Sequential(OrderedDict(ops=nn.Sequential(*units)))


class Up(nn.Module):
    """Twice as large with all channels, beside the skip; then width channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        deep = 2 * width
        self.up_conv = nn.ConvTranspose3d(deep, deep, 2, stride=2)
        self.ops = nn.Sequential(ConvUnit(deep + width, width), ConvUnit(width, width))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.ops(torch.cat((self.up_conv(x), skip), 1))


class SupremUNet(nn.Module):
    """Four levels, three ways up, one head.

    Parameters
    ----------
    out_channels : int
    feature_size : int
        Channels of the features; 64 as published, even.

    Attributes
    ----------
    config : dict
        feature_size, out_channels.
    facts : dict
        What `medtut.models.swin_weights.load_published` knows of it.

    Notes
    -----
    19,073,665 parameters as published with 1 output. With w = 64, a unit a -> b has
    27 a b + 3 b (kernel, its bias, scale and shift): 1 -> w/2 -> w -> w -> 2w -> 2w ->
    4w -> 4w -> 8w on the way down, and for each of 4w, 2w, w on the way up 8 (2b)^2 +
    2b (transposed kernel and bias) and the units 3b -> b -> b; the head w + 1.
    """

    def __init__(self, out_channels: int = 1, feature_size: int = 64) -> None:
        super().__init__()
        self.config = {"feature_size": feature_size, "out_channels": out_channels}
        self.facts: dict = {}
        w = feature_size
        for level, name in enumerate(WIDTHS):
            inside = w << level - 1 if level else 1
            self.add_module(f"down_tr{name}", down(inside, w << level))
        for level, name in reversed([*enumerate(WIDTHS[:-1])]):
            self.add_module(f"up_tr{name}", Up(w << level))
        self.classifier = nn.Conv3d(w, out_channels, 1)

    def features(self, x: Tensor) -> Tensor:
        """The map that the head reads.

        Parameters
        ----------
        x : Tensor, (N, 1, X, Y, Z), float
            HU -175 to 250 as 0 to 1; sides of a multiple of 8 voxels.

        Returns
        -------
        Tensor, (N, feature_size, X, Y, Z)

        Raises
        ------
        MedtutError
            See `medtut.models.swin_unetr.check_roi`.
        """
        check_roi(x.shape, "SupremUNet", 8)
        maps = [self.down_tr64(x)]
        for name in WIDTHS[1:]:
            maps.append(getattr(self, f"down_tr{name}")(F.max_pool3d(maps[-1], 2)))
        y = maps.pop()
        for name in WIDTHS[-2::-1]:
            y = getattr(self, f"up_tr{name}")(y, maps.pop())
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, out_channels, X, Y, Z); the published head adds a sigmoid."""
        return self.classifier(self.features(x))


def build_suprem_unet(
    out_channels: int = 1, feature_size: int = 64, *, seed: int = 0
) -> SupremUNet:
    """A U-Net with random weights of a given seed; see `SupremUNet`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SupremUNet(out_channels, feature_size)
