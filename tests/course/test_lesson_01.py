"""The pieces that lesson 01's notebook and sweep share."""

import numpy as np
import pytest
import torch

from medtut.course.lessons import l01
from medtut.course.profiles import resolve
from medtut.course.sweep import load_sweep
from medtut.errors import MedtutError
from medtut.models.vit import DenseViT


def small_model():
    torch.manual_seed(0)
    return DenseViT(image=24, patch=12, width=8, depth=1, heads=2)


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("head", {"head.weight", "head.bias"}),
        (
            "lora",
            {
                *("head.weight", "head.bias"),
                *(
                    f"blocks.0.attn.{p}.lora_{m}"
                    for p in ("query", "value")
                    for m in "AB"
                ),
            },
        ),
    ],
)
def test_what_each_method_trains(method, trained):
    model = small_model()
    l01.prepare(model, method, rank=2)
    found = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.removesuffix(".weight") for n in found} == {
        n.removesuffix(".weight") for n in trained
    }


def test_full_trains_everything_and_an_unknown_method_is_refused():
    model = small_model()
    l01.prepare(model, "full")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(MedtutError, match="unknown method"):
        l01.prepare(model, "prompt")


def dataset(image, label):
    return torch.utils.data.TensorDataset(image, label)


def test_kmeans_solves_clean_tissues_in_the_order_it_is_told():
    label = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 3]]])
    image = torch.tensor([0.0, 3.0, 2.0, 1.0])[label][:, None]  # fluid brightest
    right = l01.kmeans_scores(dataset(image, label), ("white", "grey", "csf"))
    wrong = l01.kmeans_scores(dataset(image, label), ("csf", "grey", "white"))
    assert right == pytest.approx([1.0])
    assert wrong == pytest.approx([1 / 3])


def test_training_subjects_move_with_the_seed_and_test_subjects_stay(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    settings = resolve("01", "smoke", {"train_slices": 2, "test_slices": 2})
    one, two = l01.load_task(settings, 0), l01.load_task(settings, 1)
    assert not torch.equal(one.train.tensors[0], two.train.tensors[0])
    assert torch.equal(one.test.tensors[0], two.test.tensors[0])


def test_committed_sweep_holds_five_seeds_of_every_arm_on_the_same_cases():
    table = l01.sweep_table(load_sweep("01_lora_math"))
    shapes = {arm: scores.shape for arm, scores in table.items()}
    assert set(shapes) == set(l01.ARMS)
    assert len(set(shapes.values())) == 1
    assert next(iter(shapes.values()))[0] >= 5
    assert all(np.isfinite(scores).all() for scores in table.values())


def test_chosen_rate_comes_from_the_grid_and_maximises_validation():
    runs = load_sweep("01_lora_math")
    for run in runs:
        by_rate = {float(k): v for k, v in run["metrics"]["validation_by_lr"].items()}
        assert run["metrics"]["lr"] == max(by_rate, key=by_rate.get)
        assert l01.chosen_rate("full") in l01.LEARNING_RATES


def test_rate_of_an_arm_without_sweep_says_what_to_run():
    with pytest.raises(MedtutError, match="medtut sweep 01 --arms none"):
        l01.chosen_rate("none")
