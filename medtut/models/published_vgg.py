"""The classifier of a published notebook, as it runs, and what its paper describes.

Source: github.com/Once28/VGG16-LoRA-Brain-Tumor-Classifier at 7e6cbf8, ``model.ipynb``
(cells 6 and 9) and ``paper.pdf``. Written anew from what it does; the differences from
a VGG16 with LoRA are the point, and each is named below.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medtut.errors import MedtutError
from medtut.models.vgg import initialise, trunk


def scrambled(hwc: Tensor) -> Tensor:
    """View pictures stored row by row, pixel by pixel, as if channel by channel.

    Nothing moves in memory, so "channel" c is the c-th third of the rows; a stored row
    fills three of its rows, a third of it in each, with the red, green and blue of a
    pixel side by side.

    Parameters
    ----------
    hwc : Tensor, (N, H, W, 3)

    Returns
    -------
    Tensor, (N, 3, H, W)
        Sharing the memory. The right way is ``hwc.permute(0, 3, 1, 2)``.
    """
    n, height, width, _ = hwc.shape
    return hwc.view(n, 3, height, width)


class PublishedVGG16(nn.Module):
    """VGG16 from PyTorch's default start, all of it trained, with a LoRA not in use.

    Parameters
    ----------
    classes : int
    width : float
        Factor on the channels, 1 as published.
    side : int
        Pixels, a multiple of 32; 224 as published. There is no adaptive pooling, so
        the first linear has ``(side / 32)**2`` inputs per channel.
    hidden, r, seed : int

    Attributes
    ----------
    fc1, fc2, fc3 : nn.Linear
        There is no dropout between them.
    lora_fc1, lora_fc2 : nn.Linear
        What the helper returned: ``fc1`` and ``fc2`` again.

    Notes
    -----
    At the published size 134,575,940 parameters ask for a gradient, 299,008 of them
    (the factors of `lora_helper`) never get one, and none is frozen.

    Raises
    ------
    MedtutError
        For a side that is no multiple of 32.
    """

    def __init__(
        self,
        classes: int = 4,
        width: float = 1.0,
        side: int = 224,
        hidden: int = 4096,
        r: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if side < 32 or side % 32:
            raise MedtutError(f"PublishedVGG16: side {side} is no multiple of 32.")
        self.side, self.features = side, trunk(width)
        inside = self.features[-3].out_channels * (side // 32) ** 2
        self.fc1 = nn.Linear(inside, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)
        initialise(self, "torch", seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.lora_fc1 = self.lora_helper(self.fc1, r)
            self.lora_fc2 = self.lora_helper(self.fc2, r)

    def lora_helper(self, layer: nn.Linear, r: int) -> nn.Linear:
        """Register U (in, r) and V (r, out), 0.01 wide; return the layer untouched.

        Their names come from ``id(layer)``, which differs in every run, so a saved
        state does not load again.
        """
        sizes = {"U": (layer.in_features, r), "V": (r, layer.out_features)}
        for name, size in sizes.items():
            factor = nn.Parameter(0.01 * torch.randn(size))
            self.register_parameter(f"{name}_{id(layer)}", factor)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Stored rows (N, H * W * 3) or (N, H, W, 3), scrambled; or (N, 3, H, W).

        Everything is viewed as (N, 3, side, side), which is right for the last only.
        """
        x = self.features(x.reshape(-1, 3, self.side, self.side)).flatten(1)
        return self.fc3(self.lora_fc2(self.lora_fc1(x).relu()).relu())


@torch.no_grad()
def truncated_svd(linear: nn.Linear, r: int = 8) -> tuple[nn.Sequential, float]:
    """Two thin linears in place of one: what the paper's text calls LoRA.

    The weight W (out, in) is replaced by its best approximation U V of rank r (Eckart
    and Young 1936) and lost, where LoRA keeps it and adds an update.

    Parameters
    ----------
    linear : nn.Linear
    r : int
        From 1 to min(in, out).

    Returns
    -------
    (nn.Sequential, float)
        in -> r without bias, r -> out with the old one: r (in + out) + out parameters;
        and the relative error ``|W - U V| / |W|`` (Frobenius). At 25,088 and 4,096
        inputs, r = 8, with a last layer for four classes: 323,588.

    Raises
    ------
    MedtutError
        For a rank out of range.
    """
    W = linear.weight
    if not 1 <= r <= min(W.shape):
        raise MedtutError(f"truncated_svd: r={r}, allowed is 1 to {min(W.shape)}.")
    q = min(r + 24, min(W.shape))  # exact where that is all; else Halko et al. 2011
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = (t[..., :r] for t in torch.svd_lowrank(W.float(), q, niter=8))
    pair = nn.Sequential(
        nn.Linear(W.shape[1], r, bias=False, device=W.device, dtype=W.dtype),
        nn.Linear(r, len(W), linear.bias is not None, device=W.device, dtype=W.dtype),
    )
    pair[0].weight.copy_(S[:, None] * V.mT)
    pair[1].weight.copy_(U)
    if linear.bias is not None:
        pair[1].bias.copy_(linear.bias)
    error = (W - pair[1].weight @ pair[0].weight).norm() / W.norm()
    return pair, float(error)
