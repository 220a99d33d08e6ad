"""The parameter ledger."""

import re

import pytest
import torch
from safetensors.torch import save
from torch import nn

from medtut.lora import LoRAConfig, LoRAError, find_dead, inject, ledger
from medtut.lora.ledger import human, safetensors_size

from .models import TimmViT


@pytest.fixture
def model():
    model = TimmViT()
    model.decoder = nn.Linear(8, 2)
    model.unused = nn.Linear(2, 2)
    model.extra = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    inject(model, LoRAConfig(r=2), keep=("head", "decoder", "unused", "extra"))
    return model


def test_every_parameter_is_in_one_row(model):
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    dead = find_dead(model, loss)
    loss.backward()  # the graph is still there, and no gradient was written before
    assert dead == [
        "extra",
        "decoder.weight",
        "decoder.bias",
        "unused.weight",
        "unused.bias",
    ]
    dead = [n for n in dead if n.startswith("unused")]
    book = ledger(model, head="^head", decoder=("^decoder",), dead=dead)
    counts = {k: v["parameters"] for k, v in book.to_dict().items()}
    base = sum(p.numel() for p in TimmViT().parameters())
    assert counts == {
        "adapter": 2 * 2 * (2 * 8 + 2 * 8),
        "head": 27,
        "decoder": 18,
        "other trainable": 5,
        "dead": 6,
        "frozen": base - 27,
        "trainable": 128 + 27 + 18 + 5 + 6,
        "total": base + 128 + 18 + 5 + 6,
    }
    assert book.names["dead"] == ("unused.weight", "unused.bias")
    assert book.rows["other trainable"].memory == 40  # five float64
    assert book.trainable == counts["trainable"]


def test_bytes_on_disk_are_those_of_the_file(model):
    book = ledger(model)
    tensors = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert book.rows["adapter"].disk == len(save(tensors))
    mixed = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.float16)}
    mixed["ü"] = torch.zeros(1, dtype=torch.bfloat16)
    assert safetensors_size(mixed) == len(save(mixed))


def test_shared_parameters_count_once():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    book = ledger(nn.Sequential(shared, shared, tied))
    assert book.total.parameters == 16 + 4 + 4


def test_meta_device_and_bad_expression():
    with torch.device("meta"):
        big = nn.Linear(10_000, 10_000, dtype=torch.bfloat16)
    assert ledger(big).total.memory == 2 * 10_000 * 10_001
    with pytest.raises(LoRAError, match="head"):
        ledger(big, head="(")


def test_text_is_aligned_and_html_has_scopes(model):
    book = ledger(model, head="head")
    lines = book.to_text().splitlines()
    assert lines[0].split()[0] == "part"
    assert len({len(line) for line in lines}) == 1
    assert re.search(r"^adapter +8 +128 ", book.to_text(), re.M)
    assert str(book) == book.to_text()
    html = book._repr_html_()
    assert html.count('scope="col"') == 6
    assert '<th scope="row" style="text-align:left">adapter</th>' in html
    assert "decoder" not in html  # empty rows are left out


def test_loss_that_reaches_nothing(model):
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert find_dead(model, torch.zeros(())) == trainable


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (565_248, "565 kB")],
)
def test_human(size, text):
    assert human(size) == text
