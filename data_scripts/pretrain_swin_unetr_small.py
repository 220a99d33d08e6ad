"""Pretrain the small Swin UNETR of lesson 06 on hospitals with partial labels.

    python data_scripts/pretrain_swin_unetr_small.py --out build/first.safetensors
    python data_scripts/pretrain_swin_unetr_small.py --start build/first.safetensors \
        --lr 4e-3 --seed 1 --out build/second.safetensors
    python data_scripts/pretrain_swin_unetr_small.py --start build/second.safetensors \
        --lr 2e-3 --seed 2 --steps 800 --balance 0

The hospitals are the sources of `medtut.data.abdomen_cohort`: each outlines some of the
29 structures of the template, and no structure that the lesson calls novel. The loss is
a sigmoid Dice and a balanced cross-entropy over the structures that a volume's hospital
outlines (`medtut.models.partial_loss`); of the others nothing is known, and they give
no gradient. Hospitals are seen equally often. With Dice alone, or with a plain
cross-entropy beside it, all but the liver stayed empty for 200 steps. In the end the
balanced one finds too much of what is small: the last pass is with Dice alone.

A patch of 64 x 64 x 32 voxels of 6 mm is as wide as a body: position in the body is
half of what tells organs apart. Windows of attention are 4³ tokens instead of the
published 7³, which makes a step on a CPU three times as fast. The patients have a seed
of their own: none of them is a patient of the lesson. Held out are further patients of
these hospitals, with every structure outlined. An interrupted run goes on where it was.
`--smoke` does a few steps to see that everything fits together.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from medtut.data.abdomen_anatomy import DRAWN, recipe
from medtut.data.abdomen_cohort import (
    AbdomenSpec,
    abdomen_folder,
    annotated_by,
    source_hospitals,
)
from medtut.data.cache import cached_arrays
from medtut.data.organ_records import find_cases
from medtut.data.organs import BASE, STRUCTURES
from medtut.data.partial import BalancedSampler
from medtut.data.totalseg import load_case
from medtut.errors import MedtutError
from medtut.models.partial_loss import PartialDice
from medtut.models.swin_unetr import (
    build_swin_unetr,
    load_swin_unetr,
    save_swin_unetr,
)
from medtut.train import TrainConfig, fit

SEED, COHORT_SEED = 0, 1000  # no pretraining patient is a patient of the lesson
PATCH = (64, 64, 32)
LIMIT = 9_000_000  # bytes of the file
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "medtut" / "models" / "weights" / "swin_unetr_small.safetensors"
TAUGHT = tuple(s for s in STRUCTURES if s in DRAWN)  # by some hospital


class Case:
    """A volume on the network's grid: image (1, X, Y, Z), structure numbers, mask."""

    def __init__(self, image: Any, index: Any, annotated: Any, group: str) -> None:
        self.image = torch.from_numpy(np.asarray(image, np.float32))
        self.index = torch.from_numpy(np.asarray(index))
        self.annotated = torch.from_numpy(np.asarray(annotated, bool))
        self.group = group


def cases(spec: AbdomenSpec, spacing: float) -> list[Case]:
    """Volumes of a cohort; structures do not overlap, so one number a voxel is enough.

    Numbers are 1 + the place in `STRUCTURES`; 0 where nothing is outlined.
    """

    def read() -> dict[str, np.ndarray]:
        found = {}
        for record in find_cases(abdomen_folder(spec, progress=True)):
            case = load_case(record, STRUCTURES, spacing, partial=True)
            number = np.arange(1, 1 + len(STRUCTURES), dtype=np.uint8)
            index = (case.labels * number[:, None, None, None]).max(0)
            found[f"image {record.id}"] = case.image.astype(np.float16)
            found[f"index {record.id}"] = index
            found[f"known {record.id}"] = case.annotated
        return found

    key = {"spec": repr(spec), "recipe": recipe()["version"], "spacing": spacing}
    got = cached_arrays("swin_cases", key | {"version": 1}, read)
    names = [k[6:] for k in got if k.startswith("image ")]
    kinds = ("image", "index", "known")
    return [Case(*(got[f"{k} {n}"] for k in kinds), spec.hospital) for n in names]


def targets(index: Tensor) -> Tensor:
    """(29, X, Y, Z) float32 of structure numbers."""
    number = torch.arange(1, 1 + len(STRUCTURES), dtype=index.dtype)
    return (index[None] == number[:, None, None, None]).float()


class Patches(Dataset):
    """Random patches, as another scanner and another body might show them.

    Parameters
    ----------
    cases : volumes
    length : patches, of every hospital as many.
    seed : of their order.
    """

    def __init__(self, cases: list[Case], length: int, seed: int = SEED) -> None:
        groups = [c.group for c in cases]
        self.cases = cases
        self.order = list(BalancedSampler(groups, length, seed))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        case = self.cases[self.order[n]]
        size = torch.tensor(case.image.shape[1:])
        # Where the patch's middle is: anywhere, but most of the patch inside.
        slack = (size - torch.tensor(PATCH)).clamp_min(0) / 2 + 2
        middle = size / 2 + (2 * torch.rand(3) - 1) * slack
        # Turned by up to 8 degrees about the long axis, and scaled by up to 15 %.
        a = (2 * float(torch.rand(1)) - 1) * 0.14
        zoom = 1 + (2 * torch.rand(3) - 1) * 0.15
        turn = torch.tensor([[1, -a, 0], [a, 1, 0], [0, 0, 1]]) * zoom[None]
        lines = [torch.arange(n) - (n - 1) / 2 for n in PATCH]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
        at = (grid @ turn.T + middle) / (size - 1) * 2 - 1
        at = at.flip(-1)[None]  # grid_sample counts the last axis first
        image = F.grid_sample(case.image[None], at, align_corners=True)[0]
        index = F.grid_sample(
            case.index[None, None].float(), at, mode="nearest", align_corners=True
        )[0, 0]
        return {
            "image": other_scanner(image),
            "index": index.byte(),
            "annotated": case.annotated,
        }


def other_scanner(image: Tensor) -> Tensor:
    """Sharpness, contrast, calibration and noise vary (Zhang et al. 2020,
    arXiv:1906.03347); densities here are 425 HU to 1.
    """
    inside = image > 0
    u = torch.rand(6).tolist()
    if u[0] < 0.3:
        image = F.avg_pool3d(image[None], 3, 1, 1)[0] * u[1] + image * (1 - u[1])
    image = (image - 0.5) * (0.8 + 0.4 * u[2]) + 0.5 + 0.12 * (u[3] - 0.5)
    image = image.clamp(0, 1) ** (0.8 + 0.45 * u[4])
    image = image + torch.randn_like(image) * 0.06 * u[5]
    return (image * inside).clamp(0, 1)


class Loss:
    """Dice and balanced cross-entropy over what a hospital outlines."""

    def __init__(self, balance: float = 1) -> None:
        self.partial = PartialDice(balance=balance)

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["image"]).float()
        target = torch.stack([targets(i) for i in batch["index"]]).to(logits.device)
        return self.partial(logits, target, batch["annotated"])


@torch.no_grad()
def dice_by_organ(model: nn.Module, held: list[Case]) -> dict[str, float]:
    """Dice of every structure that is taught, at 0.5, by sliding window.

    The mean over volumes that hold the structure.
    """
    from monai.inferers import sliding_window_inference

    scores: dict[str, list[float]] = {name: [] for name in TAUGHT}
    for case in held:
        logits = sliding_window_inference(case.image[None], PATCH, 1, model, 0.25)
        found, target = logits[0] > 0, targets(case.index) > 0
        for i, name in enumerate(STRUCTURES):
            if name in TAUGHT and target[i].any():
                both = (found[i] & target[i]).sum()
                total = found[i].sum() + target[i].sum()
                scores[name].append(float(2 * both / total))
    return {name: float(np.mean(s)) for name, s in scores.items() if s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=64, help="of every hospital")
    parser.add_argument("--held-out", type=int, default=4, help="of every hospital")
    parser.add_argument("--spacing", type=float, default=6.0, help="mm")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=SEED, help="of order and views")
    parser.add_argument("--balance", type=float, default=1, help="of cross-entropy")
    parser.add_argument("--start", type=Path, help="go on from the weights of a file")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("build/pretrain_swin_unetr"))
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--smoke", action="store_true", help="a few steps, no weights")
    args = parser.parse_args()
    if args.smoke:
        args.patients, args.held_out, args.steps = 2, 1, 2
        args.work, args.out = args.work / "smoke", args.work / "smoke.safetensors"
    args.work = args.work / args.start.stem if args.start else args.work
    if args.threads:
        torch.set_num_threads(args.threads)

    began, train, held = time.time(), [], []
    for name in source_hospitals():
        spec = AbdomenSpec(name, args.patients, 0, COHORT_SEED)
        train += cases(spec, args.spacing)
        rest = AbdomenSpec(
            name, args.held_out, args.patients, COHORT_SEED, annotated=DRAWN
        )
        held += cases(rest, args.spacing)
        print(f"{name}: {', '.join(annotated_by(name))}", flush=True)
    drawn = time.time() - began

    model = build_swin_unetr(12, len(STRUCTURES), seed=SEED, window_size=4)
    nn.init.constant_(model.classifier.bias, -3.0)  # an organ is a rare thing
    before: dict[str, Any] = {}
    if args.start:
        model = load_swin_unetr(args.start).train()
        before = {"before": model.facts}
    config = TrainConfig(
        steps=args.steps,
        batch_size=args.batch,
        lr=args.lr,
        weight_decay=0.01,
        warmup=min(50, args.steps // 2),
        precision="fp32",
        clip_norm=1.0,
        eval_every=max(args.steps // 8, 1),
        checkpoint_every=50,
        seed=args.seed,
    )

    def validate(m: nn.Module) -> dict[str, float]:
        each = dice_by_organ(m, held)
        print({k: round(v, 3) for k, v in each.items()}, flush=True)
        return each | {"score": float(np.mean([each.get(k, 0.0) for k in BASE]))}

    patches = Patches(train, args.steps * args.batch, args.seed)
    result = fit(
        model, Loss(args.balance), patches, config, validate=validate, out=args.work
    )
    best = result.best or {}
    facts = {
        "made_by": "data_scripts/pretrain_swin_unetr_small.py",
        "hospitals": {name: annotated_by(name) for name in source_hospitals()},
        "patients": args.patients,
        "held_out": args.held_out,
        "patch": PATCH,
        "steps": args.steps,
        "batch": args.batch,
        "lr": args.lr,
        "seed": args.seed,
        "balance": args.balance,
        "cohort_seed": COHORT_SEED,
        "cohort_version": recipe()["version"],
        "best_step": best.get("step"),
        "dice": {k: round(v, 3) for k, v in best.items() if k != "step"},
        "minutes_drawing": round(drawn / 60, 1),
        "minutes": round(result.seconds / 60, 1),
        "torch": torch.__version__,
        **before,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_swin_unetr(model, args.out, STRUCTURES, args.spacing, **facts)
    facts["bytes"] = args.out.stat().st_size
    (args.work / "facts.json").write_text(json.dumps(facts, indent=1), "utf-8")
    print(json.dumps(facts, indent=1))
    if facts["bytes"] > LIMIT:
        args.out.unlink()
        told = f"{facts['bytes']} bytes; {LIMIT} are allowed."
        raise MedtutError(f"{args.out} had {told}")


if __name__ == "__main__":
    main()
