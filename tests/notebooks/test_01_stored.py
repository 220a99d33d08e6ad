"""Lesson 01 as stored: its printed numbers are those of its metrics file."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_lora_math.ipynb"
NUMBER = r"([-+]?[\d.]+(?:e[-+]?\d+)?)"

# What the text in front of a printed number is, and the metric it shows.
PRINTED = [
    (rf"source {NUMBER}   target", "source_score"),
    (rf"target unadapted {NUMBER}", "zero_shot_score"),
    (rf"k-means {NUMBER}", "kmeans_score"),
    (rf"one seed: full {NUMBER}", "full_score"),
    (rf"LoRA \+ head {NUMBER}", "lora_r8_score"),
    (rf"LoRA r=8 minus full fine-tuning: {NUMBER}", "lora_minus_full"),
    (rf"LoRA r=8 minus head only:\s+{NUMBER}", "lora_minus_head"),
    (rf"'drift_bf16': '{NUMBER}'", "drift_bf16"),
    (rf"merged minus unmerged {NUMBER}", "merged_max_difference"),
]


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def metrics():
    path = ROOT / "notebooks" / "metrics" / "01_lora_math.json"
    return json.loads(path.read_text(encoding="utf-8"))["metrics"]


@pytest.fixture(scope="module")
def printed(notebook):
    return "\n".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )


@pytest.mark.parametrize(("pattern", "name"), PRINTED)
def test_printed_number_is_the_recorded_one(printed, metrics, pattern, name):
    (text,) = re.findall(pattern, printed)
    mantissa, _, exponent = text.partition("e")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - digits)
    assert float(text) == pytest.approx(metrics[name], abs=0.5001 * unit)


def test_what_the_text_states_holds_in_the_metrics(metrics):
    # Sentences of the lesson that rest on a sign or an order of measured numbers.
    assert metrics["start_difference"] == 0
    assert metrics["exact"] is True
    assert metrics["audit_findings"] >= 1
    assert metrics["audit_false_alarms"] == 0
    assert metrics["zero_shot_score"] < metrics["head_only_score"]
    assert metrics["lora_minus_head_low"] > 0
    assert metrics["lora_minus_full_low"] < 0 < metrics["lora_minus_full_high"]
    assert abs(metrics["sweep_lora_r1"] - metrics["sweep_lora_r8"]) < 0.01
    assert metrics["sweep_lora_r64"] < metrics["head_only_score"]
    assert metrics["truncated_score"]["8"] < metrics["full_score"] - 0.03
    assert metrics["lora_r8_score"] >= metrics["full_score"] - 0.01
    assert metrics["drift_fp32"] < metrics["drift_fp16"] < metrics["drift_bf16"]
    assert metrics["norm_slope_alpha_over_r"] < 0 < metrics["norm_slope_unscaled"]


def counting_notebook(notebook, planted: bool):
    """The counting cells of the lesson alone; `planted` falsifies the stored count."""
    first = next(i for i, c in enumerate(notebook.cells) if "SwinConfig" in c.source)
    cells = copy.deepcopy(notebook.cells[first : first + 2])
    head = nbformat.v4.new_code_cell(
        "import torch\nfrom torch import nn\n"
        "from medtut.lora import LoRAConfig, inject, ledger\n"
        "class lesson:\n    record = staticmethod(lambda **_: None)"
    )
    for output in cells[1].outputs:
        if planted:
            output.text = output.text.replace("141,312", "141,313")
    small = nbformat.v4.new_notebook(
        cells=[head, *cells], metadata=dict(notebook.metadata)
    )
    for number, cell in enumerate(small.cells, start=1):
        cell.execution_count = number
        cell.id = f"cell{number}"
    return small


def test_a_planted_wrong_count_turns_nbval_red(notebook, tmp_path):
    for planted in (False, True):
        path = tmp_path / f"planted_{planted}.ipynb"
        nbformat.write(counting_notebook(notebook, planted), path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q"]
        + ["-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "1 failed, 5 passed" in done.stdout, done.stdout[-2000:]
    assert "141,313" in done.stdout
