"""Lesson 05 on another scanner: LoRA, the head alone, or all of the image side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.course.lessons.ct import WITHHELD, Part, prompt_vectors, weights_file
from medtut.data.ct_rate import FINDINGS

if TYPE_CHECKING:
    from torch import Tensor

    from medtut.models.ctclip import CTCLIP


class Scans:
    """Volumes and what their reports affirm."""

    def __init__(self, part: Part, which: slice = slice(None)) -> None:
        self.volumes, self.truth = part.volumes[which], part.truth[which]

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        volume = np.array(self.volumes[n], np.float32)[None]
        return {"volume": volume, "truth": self.truth[n].astype("f4")}


def prepare_for(clip: CTCLIP, how: str, rank: int) -> int:
    """Say what is trained, in place; return how many parameters.

    "lora": adapters on every linear map of the image side and the convolution of its
    embedding, but not on positions: `PositionBias` is two wide, and `PEG` reads the
    weight by itself. "head": the pooling and its projection. "full": the image side.
    "as_is": nothing.
    """
    from medtut.lora import LoRAConfig, inject

    if how == "lora":
        where = r"^(to_image|image_tower\.(?!bias|.*\.peg))"
        inject(clip, LoRAConfig(r=rank, alpha=2 * rank, pattern=where))
    else:
        parts = {"head": ("to_image",), "full": ("to_image", "image_tower")}
        begins = parts.get(how, ())
        for name, p in clip.named_parameters():
            p.requires_grad_(name.startswith(begins))
    return sum(p.numel() for p in clip.parameters() if p.requires_grad)


class SentenceLoss:
    """SigLIP's loss on pairs of scan and sentence.

    Every sentence of `medtut.models.text_tower.TEMPLATES` about a finding belongs to a
    scan of which its report says so. `WITHHELD` findings stay unnamed.
    """

    def __init__(self, clip: CTCLIP, source: str) -> None:
        import torch

        self.named = [i for i, f in enumerate(FINDINGS) if f not in WITHHELD]
        sides = (torch.from_numpy(p[self.named]) for p in prompt_vectors(clip, source))
        self.yes, self.no = sides

    def __call__(self, clip: Any, items: dict[str, Tensor]) -> Tensor:
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits as bce

        image = clip.encode_image(items["volume"])
        items = {k: v.to(image) for k, v in items.items()}
        way = int(torch.randint(self.yes.shape[1], ()))
        text = torch.cat((self.yes[:, way], self.no[:, way])).to(image)
        truth = items["truth"][:, self.named]
        with torch.autocast(image.device.type, enabled=False):
            logits = clip.log_scale.exp() * image.float() @ text.float().T
            return bce(logits + clip.logit_bias, torch.cat((truth, 1 - truth), 1))


def adapt(
    how: str, seed: int, rate: float, settings: Any, part: Part,
    validate: bool = False, progress: bool = False,
) -> tuple[CTCLIP, Any]:  # fmt: skip
    """Train the checkpoint on the reports of the target; see `prepare_for`.

    Parameters
    ----------
    validate : bool
        Half as many steps on three quarters of the patients; ``best["score"]`` of the
        result is less the loss on the others.

    Returns
    -------
    model, FitResult or None where nothing is trained
    """
    import torch

    from medtut.course.lessons.common import precision, train_config
    from medtut.models.ctclip import load_ctclip
    from medtut.train import fit

    clip = load_ctclip(weights_file(settings))
    torch.manual_seed(seed)
    if not prepare_for(clip, how, settings.rank):
        return clip, None
    cut = len(part.truth) * 3 // 4 if validate else len(part.truth)
    loss, held = SentenceLoss(clip, settings.text), Scans(part, slice(cut, None))

    def score(model: Any) -> dict[str, float]:
        items = torch.utils.data.default_collate([held[i] for i in range(len(held))])
        torch.manual_seed(0)
        return {"score": -float(np.mean([float(loss(model, items)) for _ in "four"]))}

    steps = max(1, settings.target_steps // 2) if validate else settings.target_steps
    config = train_config(settings, rate, seed, steps, 0, precision=precision(settings))
    data = Scans(part, slice(cut))
    more = {"validate": score} if validate else {}
    return clip, fit(clip, loss, data, config, progress=progress, **more)
