"""Loading a factory, calling a model, the report and its exit code."""

import json

import pytest
import torch
from torch import nn

from medtut.audit import Finding, Report, Subject, SubjectError, audit, load_factory
from medtut.audit.cli import run_audit
from medtut.audit.subject import call

CLEAN = """
import torch
from helper import width

def build():
    return torch.nn.Sequential(torch.nn.Linear(width, 3))

def with_batch():
    return {"model": build(), "batch": torch.ones(2, width)}

def frozen():
    return build().requires_grad_(False)

def wrong_key():
    return {"model": build(), "batches": 1}

def no_model():
    return {"batch": 1}

def number():
    return 3

def raises():
    raise ValueError("no data here")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "helper.py").write_text("width = 5", encoding="utf-8")
    path = tmp_path / "mine.py"
    path.write_text(CLEAN, encoding="utf-8")
    return path


def test_factory_exit_codes_and_report(file, capsys):
    assert run_audit(f"{file}:build") == 0
    out = capsys.readouterr().out
    assert "no findings" in out
    assert "4×5" in out
    assert run_audit(f"{file}:with_batch") == 0
    assert run_audit(f"{file}:frozen") == 1
    assert "Nothing is trainable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("biuld", "There are: build, with_batch"),
        ("raises", r"raised ValueError \(line 24\): no data here"),
        ("number", "returned int"),
        ("wrong_key", "unknown keys: batches"),
        ("no_model", "no 'model'"),
    ],
)
def test_factory_faults_are_named(file, name, said):
    with pytest.raises(SubjectError, match=said):
        load_factory(f"{file}:{name}")


def test_target_and_file_faults(tmp_path):
    with pytest.raises(SubjectError, match=r"FILE\.py:factory"):
        load_factory("mine.py")
    with pytest.raises(SubjectError, match="no file"):
        load_factory(f"{tmp_path / 'none.py'}:build")
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\ny = undefined\n", encoding="utf-8")
    with pytest.raises(SubjectError, match=r"NameError \(line 2\)"):
        load_factory(f"{bad}:build")


class Two(nn.Module):
    def forward(self, image, scale, flip=None):
        assert flip is None
        return image * scale


class One(nn.Module):
    def forward(self, volume, mask=None):
        assert mask is None
        return {"out": volume, "ids": torch.zeros(2, dtype=torch.long)}


class Star(nn.Module):
    def forward(self, *parts):
        return sum(parts)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (One(), torch.ones(2)),
        (One(), (torch.ones(2), "label")),
        (One(), {"image": torch.ones(2), "label": 3}),
        (One(), {"volume": torch.ones(2), "label": 3}),
        (Two(), (torch.ones(2), 1.0, "label")),
        (Two(), {"image": torch.ones(2), "scale": 1.0, "label": 0}),
        (Star(), [torch.zeros(2), torch.ones(2)]),
    ],
)
def test_batches_of_all_forms(model, batch):
    (out,) = call(Subject(model, batch))
    assert torch.equal(out, torch.ones(2))


def test_forward_of_the_subject_wins():
    forward = lambda model, batch: (model(batch["odd"]), 1)  # noqa: E731
    subject = Subject(nn.Identity(), {"odd": torch.ones(3)}, forward=forward)
    assert call(subject)[0].shape == (3,)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "2×3×64×64"),
        (nn.Sequential(nn.Conv3d(1, 2, 3)), "2×1×32×32×32"),
        (nn.Sequential(nn.Embedding(9, 4)), "2×8"),
        (nn.Sequential(nn.Conv2d(1, 2, 224), nn.Flatten()), "2×1×224×224"),
    ],
)
def test_batch_is_made_up_from_the_first_layer(model, said):
    report = audit(model)
    assert report.exit_code == 0, report
    assert said in report.notes[0]


def test_without_any_possible_batch():
    with pytest.raises(SubjectError, match="'batch': batch"):
        audit(nn.Bilinear(3, 4, 5))
    with pytest.raises(SubjectError, match="failed on the batch"):
        audit({"model": nn.Linear(3, 3), "batch": torch.ones(2, 4)})


def test_report_in_its_forms():
    finding = Finding("d", "error", "a<b", "moved & gone", {"largest_change": 0.25})
    report = Report((finding,), ("by the way",), ("d",))
    assert report.exit_code == 1
    assert Report().exit_code == 0
    assert Report(notes=("only a note",)).exit_code == 0
    text = str(report)
    assert "[error] d: a<b" in text
    assert "largest change 0.25" in text
    assert "a&lt;b" in report._repr_html_()
    assert "moved &amp; gone" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["where"] == "a<b"
