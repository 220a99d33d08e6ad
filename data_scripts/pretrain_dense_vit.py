"""Pretrain the small vision transformer of lesson 01 on T1 slices and save it.

    python data_scripts/pretrain_dense_vit.py [--steps 800] [--out FILE]

About eight minutes on two CPU cores. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset, TensorDataset

from medtut.course.lessons.l01 import loss_fn, slice_scores
from medtut.data.brain_slices import SliceSpec, brain_slices
from medtut.models.vit import WEIGHTS, DenseViT
from medtut.train import TrainConfig, fit

SEED = 0


class Mirrored(Dataset):
    """Slices and their mirror images: a brain has no preferred side here."""

    def __init__(self, spec: SliceSpec) -> None:
        arrays = brain_slices(spec)
        self.image = torch.from_numpy(arrays["image"])
        self.label = torch.from_numpy(arrays["label"])

    def __len__(self) -> int:
        return 2 * len(self.image)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index, mirror = divmod(index, 2)
        image, label = self.image[index], self.label[index]
        return (image.flip(-1), label.flip(-1)) if mirror else (image, label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("build/pretrain_dense_vit"))
    args = parser.parse_args()

    held_out = brain_slices(SliceSpec("t1", "validation", 24))
    validation = TensorDataset(
        torch.from_numpy(held_out["image"]), torch.from_numpy(held_out["label"])
    )
    torch.manual_seed(SEED)
    model = DenseViT()
    config = TrainConfig(
        steps=args.steps,
        batch_size=16,
        lr=1e-3,
        weight_decay=0.05,
        warmup=80,
        clip_norm=1.0,
        eval_every=100,
        checkpoint_every=100,
        seed=SEED,
    )
    fit(
        model,
        loss_fn,
        Mirrored(SliceSpec("t1", "train", 800)),
        config,
        validate=lambda m: {"score": float(slice_scores(m, validation).mean())},
        out=args.work,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    note = {"made_by": "data_scripts/pretrain_dense_vit.py", "seed": str(SEED)}
    save_file(tensors, partial, metadata=note)
    os.replace(partial, args.out)
    score = slice_scores(model, validation).mean()
    print(f"{args.out}: mean Dice on held-out T1 slices {score:.3f}")


if __name__ == "__main__":
    main()
