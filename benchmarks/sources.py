"""Hold a source out: what other looks and drawn lesions bring on the Kaggle pictures.

    python -m benchmarks.sources FOLDER

Every glioma of the set's ``Training`` comes from one collection and nearly every
picture without tumour from the web, so "web" may be learned as "healthy". Meningiomas
come from both. Those from the web are held out with a third of the pictures without
tumour: of the first, how many are still seen as tumours, and as what; of the second,
how many as healthy? Three ways to train the same design (LoRA on the last convolutions,
pooled head): pictures as they are, with other looks, and with drawn lesions too. Writes
``results/sources.json`` and ``.md``. The pictures stay where they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from medtut.course.lessons import l04, vgg, vgg_pictures
from medtut.course.profiles import resolve
from medtut.data import brain_mri
from medtut.files import write_json, write_text
from medtut.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "as they are": ("pooled_conv_plain", {}),
    "other looks": ("pooled_conv", {"drawn_share": 0.0}),
    "other looks and drawn lesions": ("pooled_conv", {}),
}


def held_out(task: vgg_pictures.Task) -> tuple[np.ndarray, np.ndarray]:
    """Positions of Training to learn from, and those of the web that are held out."""
    learn = np.sort(np.concatenate([task.train, task.validation]))
    web = brain_mri.sources([task.pictures[i] for i in learn]) == 1
    label = task.labels[learn]
    third = np.random.default_rng(0).random(len(learn)) < 1 / 3
    away = web & ((label == 1) | ((label == 2) & third))
    # Copies of what is held out are not to be learned either.
    copies = np.isin(task.groups[learn], task.groups[learn[away]])
    return learn[~away & ~copies], learn[away]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=8)
    given = parser.parse_args()
    settings = resolve("04_vgg16_lora", "quick", {"data": given.folder})
    settings = settings.model_copy(update={"epochs": given.epochs, "lesions": 1})
    task = vgg_pictures.load_task(settings)
    learn, away = held_out(task)
    truth = task.labels[away]
    rows = []
    for seed in range(given.seeds):
        for name, (arm, change) in WAYS.items():
            used = settings.model_copy(update=change)
            cache, _ = vgg.train_arm(
                arm, seed, l04.OTHER_RATE, used, task, positions=learn, progress=True,
                evaluations=1,
            )  # fmt: skip
            said = vgg.probabilities(cache, task.images[away], used).argmax(1)
            row = {
                "way": name,
                "seed": seed,
                "tumour_seen": float((said[truth == 1] != vgg_pictures.HEALTHY).mean()),
                "right_tumour": float((said[truth == 1] == 1).mean()),
                "healthy_seen": float(
                    (said[truth == 2] == vgg_pictures.HEALTHY).mean()
                ),
            }
            rows.append(row)
            print(row, flush=True)
            counts = {"web meningiomas": int((truth == 1).sum())}
            counts |= {"healthy": int((truth == 2).sum()), "learned": len(learn)}
            facts = {"machine": describe_machine(), "counts": counts, "runs": rows}
            write_json(RESULTS / "sources.json", facts)
    machine = facts["machine"]
    table = [
        f"# A source held out\n\n{machine['cpu']}, {machine['cores']} cores. {counts}, "
        f"{given.seeds} seeds, {given.epochs:g} epochs; mean (least to most).\n",
        "| trained on pictures | web meningioma seen as tumour | as meningioma | "
        "healthy seen as such |\n|---|---|---|---|",
    ]
    for name in WAYS:
        mine = [row for row in rows if row["way"] == name]
        cells = []
        for key in ("tumour_seen", "right_tumour", "healthy_seen"):
            v = [row[key] for row in mine]
            cells.append(f"{np.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})")
        table.append(f"| {name} | {' | '.join(cells)} |")
    write_text(RESULTS / "sources.md", "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
