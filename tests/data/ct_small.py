"""Small CTs and a small CT-RATE folder for the tests of the readers."""

import csv
import gzip
import json

import nibabel
import numpy as np

from medtut.data.ct_rate import FINDINGS, PARTS

SHAPE, SPACING = (24, 20, 12), (4.0, 5.0, 6.0)


def body(seed=0, shape=SHAPE):
    """HU in RAS order: air, a body of soft tissue, two lungs, a spine at the back."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000.0)
    x, _, z = shape
    hu[3:-3, 3:-3] = 40
    hu[5 : x // 2 - 1, 6:-5] = hu[x // 2 + 1 : -5, 6:-5] = -850
    hu[x // 2 - 1 : x // 2 + 1, 4:6] = 600
    hu[x // 2 + 3 : -6, 8:12, : z // 4] = 60  # the liver, on the right, near the feet
    return np.round(hu + rng.normal(0, 15, shape)).astype(np.int16)


def save(path, ras, axes="RAS", spacing=SPACING, shear=0.0, codes=1):
    """Write a RAS array as a NIfTI file whose axes go as `axes` says."""
    affine = np.diag([*spacing, 1.0])
    affine[0, 1] = shear
    image = nibabel.Nifti1Image(ras, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes)
    )
    image = image.as_reoriented(turn)
    image.header.set_sform(image.affine, codes)
    image.header.set_qform(image.affine if codes and not shear else None, codes)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = bytearray(image.to_bytes())
    if not codes:  # nibabel sets them again when it writes
        raw[252:256] = bytes(4)
    path.write_bytes(gzip.compress(bytes(raw), 1))
    return path


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


NAMES = ("train_2_a_1", "train_10_a_1", "train_10_a_2", "train_10_b_1")


def ct_rate(root, names=NAMES, split="train", stored=True):
    """Write a folder in the set's layout; files hold HU + 1024 when ``stored``."""
    base = split.removesuffix("_fixed")
    long = {"train": "train", "valid": "validation"}[base]
    data, reports, labels, meta = root / "dataset", [], [], []
    for i, name in enumerate(names):
        patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
        path = data / split / patient / scan / f"{name}.nii.gz"
        save(path, body(i) + np.int16(1024 * stored), "LPS", spacing=(1, 1, 1))
        row = {"VolumeName": path.name}
        said = dict.fromkeys(PARTS.values(), "Not given.")
        said["Findings_EN"] = (
            f'Nodule of {i} mm ("small"), in the right lung.\nNo more.'
        )
        reports.append(row | said)
        labels.append(row | {f: int(k == i) for k, f in enumerate(FINDINGS)})
        meta.append(
            row
            | {"RescaleSlope": 1, "RescaleIntercept": -1024}
            | {"XYSpacing": json.dumps([4.0, 5.0]), "ZSpacing": 6.0, "Sex": "F"}
        )
    table(data / "radiology_text_reports" / f"{long}_reports.csv", reports)
    table(data / "multi_abnormality_labels" / f"{base}_predicted_labels.csv", labels)
    table(data / "metadata" / f"{long}_metadata.csv", meta)
    return root
