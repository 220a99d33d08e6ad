"""The designs of lesson 04: who learns from which pictures, and how it is judged."""

import copy
import csv
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import balanced_accuracy_score

from medtut.course.lessons import l04, vgg, vgg_trials
from medtut.course.lessons.vgg_pictures import HEALTHY, Balanced, load_task, views
from medtut.course.profiles import PROFILES, SettingsError, resolve
from medtut.data import assets, mri_augment
from medtut.data.brain_mri import CLASSES, FOLDERS
from medtut.errors import MedtutError
from medtut.lora import load_adapter
from medtut.models.prefix import PrefixCache
from medtut.train import TrainError

LESSON = "04_vgg16_lora"
TINY = {"weights": "random", "side": 32, "width": 0.05, "hidden": 16, "members": 2,
        "precision": "fp32", "epochs": 0.5, "batch_size": 8}  # fmt: skip
COUNTS = {"Training": (10, 8, 5, 8), "Testing": (3, 3, 4, 2)}


def head(label, seed, size):
    """A textured ellipse with one bright quarter, which tells the class."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    texture = ndimage.gaussian_filter(rng.normal(size=(size, size)), size / 20)
    image = 90 + 40 * texture / texture.std()
    image += 110 * ((y > 0) == bool(label & 1)) * ((x > 0) == bool(label & 2))
    return np.uint8((image * (np.hypot(x, y) < 0.95)).clip(0, 255))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of two parts; gliomas are larger. With a cache of their own."""
    folder = tmp_path_factory.mktemp("vgg")
    for part, counts in COUNTS.items():
        for label, (name, count) in enumerate(zip(FOLDERS, counts, strict=True)):
            home = folder / "set" / part / name
            home.mkdir(parents=True)
            for i in range(count):
                seed = 1000 * (part == "Testing") + 100 * label + i
                image = Image.fromarray(head(label, seed, 80 if label == 0 else 64))
                image.save(home / f"p{i}.png")
    return folder


@pytest.fixture(autouse=True)
def surroundings(root, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(root / "cache"))
    monkeypatch.delenv("MEDTUT_PROFILE", raising=False)


@pytest.fixture
def settings(root):
    def made(**changes):
        given = {"data": str(root / "set"), **TINY, **changes}
        return resolve(LESSON, "smoke", given)

    return made


@pytest.fixture
def task(settings):
    return load_task(settings())


@pytest.fixture
def own(root, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(root / "set", tmp_path / "own")


# --- settings --------------------------------------------------------------------


def test_presets_fit_the_schema_and_full_is_the_source():
    assert set(l04.PRESETS) == set(PROFILES)
    full = {name: resolve(LESSON, name) for name in PROFILES}["full"]
    assert (full.weights, full.side, full.width) == ("torchvision", 224, 1)
    assert (full.hidden, full.first_block) == (4096, 1)


@pytest.mark.parametrize(
    "given",
    [
        {"side": 48}, {"side": 0}, {"side": 544}, {"width": 0.0}, {"width": 1.5},
        {"hidden": 7}, {"first_block": 0}, {"first_block": 6}, {"epochs": 0.0},
        {"batch_size": 0}, {"precision": "fp16"}, {"copies": -1}, {"lesions": -1},
        {"plain_share": 1.1}, {"drawn_share": 1.0}, {"members": 0}, {"memory_mb": 0.0},
        {"train_patients": 8}, {"test_patients": 7}, {"members": "two"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(given):
    ((name, _),) = given.items()
    with pytest.raises(SettingsError, match=name):
        resolve(LESSON, "smoke", given)


# --- who learns from which -------------------------------------------------------


def test_parts_are_apart_and_every_class_is_on_both_sides(task):
    sides = [task.train, task.validation, task.test]
    assert sorted(np.concatenate(sides)) == list(range(len(task.labels)))
    assert tuple(task.counts("test")) == COUNTS["Testing"]
    both = task.counts("train") + task.counts("validation")
    assert tuple(both) == COUNTS["Training"]
    assert min(task.counts("validation")) > 0
    assert not set(task.groups[task.train]) & set(task.groups[task.validation])
    assert task.images.shape == (len(task.labels), 32, 32)
    assert task.images.dtype == np.uint8


def test_copies_stay_together_without_a_table(own, settings):
    home = own / "Training" / "glioma_tumor"
    for i in range(10):
        shutil.copy(home / f"p{i}.png", home / f"z{i}.png")
    task = load_task(settings(data=str(own)))
    side = dict.fromkeys(task.train.tolist(), "train")
    of = {p.path.name: side.get(i, "validation")
          for i, p in enumerate(task.pictures[:20])}  # fmt: skip
    assert [of[f"p{i}.png"] for i in range(10)] == [of[f"z{i}.png"] for i in range(10)]
    assert set(of.values()) == {"train", "validation"}


def write_table(folder, patient, leave=(), mark="", columns=("file", "patient")):
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    with open(folder / "patients.csv", "w", newline="", encoding="utf-8") as file:
        file.write(mark)
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows((n, patient(n)) for n in names if n not in leave)


def test_patients_of_a_table_stay_on_one_side(own, settings):
    # Two pictures that look nothing alike to one patient: p0 and p1, p2 and p3 ...
    patient = lambda n: n[:-5] + str(int(n[-5]) // 2)  # noqa: E731
    write_table(own, patient, mark="\ufeff")
    task = load_task(settings(data=str(own)))
    names = [patient(p.path.relative_to(own).as_posix()) for p in task.pictures]
    sides = [{names[i] for i in side} for side in (task.train, task.validation)]
    assert not sides[0] & sides[1]
    assert min(task.counts("validation")) > 0
    assert len(set(task.groups)) == len(set(names))


def test_a_picture_that_the_table_lacks_is_named(own, settings):
    gone = "Testing/no_tumor/p1.png"
    write_table(own, lambda n: n, leave=[gone])
    with pytest.raises(MedtutError, match=f"patients.csv.* 1 pictures.*{gone}"):
        load_task(settings(data=str(own)))
    write_table(own, lambda n: "" if n == gone else n)
    with pytest.raises(MedtutError, match=gone):
        load_task(settings(data=str(own)))


def test_a_table_that_is_none_is_named(own, settings):
    write_table(own, lambda n: n, columns=("path", "who"))
    with pytest.raises(MedtutError, match=r"patients\.csv.*columns file and patient"):
        load_task(settings(data=str(own)))
    (own / "patients.csv").write_bytes(b"file,patient\nm\xfcller,1\n")
    with pytest.raises(MedtutError, match=r"patients\.csv.*UTF-8"):
        load_task(settings(data=str(own)))


@pytest.mark.parametrize("copies", [0, 3])
def test_a_class_of_one_picture_is_refused(own, settings, copies):
    home = own / "Training" / "no_tumor"
    for i in (1, 2, 3, 4):
        (home / f"p{i}.png").unlink()
    for i in range(copies):
        shutil.copy(home / "p0.png", home / f"copy{i}.png")
    with pytest.raises(MedtutError, match="only 1 picture"):
        load_task(settings(data=str(own)))


# --- what is shown ---------------------------------------------------------------


def test_views_are_pictures_then_looks_then_lesions(task, settings, monkeypatch):
    chosen = settings(copies=2, lesions=3)
    found = views(task, task.train, chosen, plain=False)
    n, labels = len(task.train), task.labels[task.train]
    healthy = np.flatnonzero(labels == HEALTHY)
    m = len(healthy)
    assert found.pictures == n
    assert len(found) == 3 * n + 6 * m
    assert np.array_equal(found.images[:n], task.images[task.train])
    assert np.array_equal(found.labels[: 3 * n], np.tile(labels, 3))
    assert np.array_equal(found.drawn, np.arange(len(found)) >= 3 * n)
    assert found.labels[3 * n :].tolist() == ([0] * m + [1] * m) * 3
    looks = found.images.reshape(-1, 32 * 32).astype(int)
    for i in range(n):
        seen = looks[[i, n + i, 2 * n + i]]
        assert min(np.abs(seen[a] - seen[b]).mean() for a, b in ((0, 1), (0, 2))) > 1
    # Every second set of lesions lies in another look.
    for j, i in enumerate(healthy):
        image = found.images[i].astype(np.float32) / 255
        seed = 1000 * int(task.train[i])
        want = mri_augment.draw_lesion(image, "meningioma", seed)
        at = 3 * n + m + j
        assert np.array_equal(found.images[at], np.uint8(np.rint(255 * want)))
        want = mri_augment.draw_lesion(image, "meningioma", seed + 20)
        assert np.array_equal(found.images[at + 4 * m], np.uint8(np.rint(255 * want)))
        want = mri_augment.draw_lesion(image, "meningioma", seed + 10)
        want = mri_augment.mimic_scanner(want, seed + 10)
        assert np.array_equal(found.images[at + 2 * m], np.uint8(np.rint(255 * want)))
    monkeypatch.delattr(mri_augment, "mimic_scanner")  # made once, then read
    again = views(task, task.train, chosen, plain=False)
    assert np.array_equal(again.images, found.images)
    with pytest.raises(AttributeError):
        views(task, task.train, settings(copies=1, lesions=3), plain=False)


def test_plain_views_are_the_pictures(task, settings):
    found = views(task, task.validation, settings(), plain=True)
    assert np.array_equal(found.images, task.images[task.validation])
    assert np.array_equal(found.labels, task.labels[task.validation])
    assert found.pictures == len(found) == len(task.validation)
    assert not found.drawn.any()


def test_classes_come_up_evenly_with_the_shares_asked_for(task, settings):
    chosen = settings(copies=2, lesions=1, plain_share=0.3, drawn_share=0.2)
    seen = views(task, task.train, chosen, plain=False)
    order = Balanced(seen, 12000, 0, chosen).order
    drawn = seen.drawn[order]
    assert drawn.mean() == pytest.approx(0.2, abs=0.02)
    rest = np.bincount(seen.labels[order][~drawn], minlength=4) / (~drawn).sum()
    np.testing.assert_allclose(rest, 0.25, atol=0.02)
    # 0.3 for sure, and by chance a third of the others.
    plain = (order[~drawn] < seen.pictures).mean()
    assert plain == pytest.approx(0.3 + 0.7 / 3, abs=0.02)
    assert set(seen.labels[order][drawn]) == {0, 1}
    without = chosen.model_copy(update={"drawn_share": 0.0, "plain_share": 1.0})
    assert Balanced(seen, 500, 0, without).order.max() < seen.pictures


def test_as_they_occur_where_classes_are_not_evened(task, settings):
    seen = views(task, task.train, settings(), plain=True)
    order = Balanced(seen, 12000, 0, settings(), even=False).order
    share = task.counts("train") / len(task.train)
    np.testing.assert_allclose(
        np.bincount(seen.labels[order]) / 12000, share, atol=0.02
    )


def test_the_order_follows_its_seed(task, settings):
    seen = views(task, task.train, settings(), plain=True)
    one, same, other = (Balanced(seen, 50, s, settings()) for s in (0, 0, 1))
    assert np.array_equal(one.order, same.order)
    assert not np.array_equal(one.order, other.order)
    assert len(one) == 50
    item = one[7]
    assert np.array_equal(item["image"], seen.images[one.order[7]])
    assert item["label"] == seen.labels[one.order[7]]


# --- judged ----------------------------------------------------------------------


@pytest.mark.parametrize("classes", [4, 3])
def test_cases_average_to_balanced_accuracy(classes):
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(classes), [9, 2, 30, 5][:classes])
    said = np.where(rng.random(len(truth)) < 0.6, truth, rng.integers(0, 4, len(truth)))
    found = vgg.by_case(said, truth)
    assert found.mean() == pytest.approx(
        np.mean([(said[truth == k] == k).mean() for k in range(classes)])
    )
    if set(said) <= set(truth):  # scikit-learn warns otherwise
        assert found.mean() == pytest.approx(balanced_accuracy_score(truth, said))
    assert ((found > 0) == (said == truth)).all()


@pytest.mark.parametrize(
    ("given", "known", "wanted"),
    [
        ("auto", {"avx512_bf16": True}, "bf16"),
        ("auto", {"amx_bf16": True}, "bf16"),
        ("auto", {"avx2": True}, "fp32"),
        ("fp32", {"amx_bf16": True}, "fp32"),
        ("bf16", {}, "bf16"),
    ],
)
def test_precision_follows_the_machine(settings, monkeypatch, given, known, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert vgg.precision(settings(precision=given)) == wanted


# --- training --------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["head", "lora_both", "full", "dora", "weights",
                                 "logit", "pooled_conv_plain"])  # fmt: skip
def test_an_arm_trains_what_it_says(task, settings, arm):
    cache, result = vgg.train_arm(arm, 0, 1e-3, settings(), task, evaluations=1)
    assert result.steps == round(0.5 * len(task.train) / 8)
    p = vgg.probabilities(cache, task.images[task.test], settings())
    assert p.shape == (len(task.test), 4)
    np.testing.assert_allclose(p.sum(1), 1)
    start = dict(vgg.build(arm, settings()).named_parameters())
    for name, tensor in cache.encoder.named_parameters():
        if not tensor.requires_grad:
            assert torch.equal(tensor, start[name]), name
    head = cache.encoder.classifier[-1].weight
    assert not torch.equal(head, start["classifier.2.weight" if
        vgg.DESIGNS[arm].pooled else "classifier.6.weight"])  # fmt: skip


def test_weights_in_torchvisions_colours_get_such_inputs(task, settings, tmp_path):
    from safetensors.torch import save_file

    given = settings()
    state = vgg.build("pooled", given).state_dict()
    path = tmp_path / "own.safetensors"
    trunk = {k: v.contiguous() for k, v in state.items() if k.startswith("features")}
    save_file(trunk, path)
    chosen = settings(weights=str(path), epochs=0.25)
    model = vgg.build("pooled", chosen)
    assert model.convention == "torchvision"
    assert vgg.inputs(task.images[:2], model).abs().max() < 10
    assert vgg.inputs(task.images[:2]).abs().max() > 10
    cache, _ = vgg.train_arm("pooled", 0, 1e-3, chosen, task)
    assert np.isfinite(vgg.probabilities(cache, task.images[task.test], chosen)).all()


def test_a_run_stores_what_the_lesson_reads(task, settings, monkeypatch):
    monkeypatch.setattr(l04, "tuned", lambda *_: {"0.001": 0.2, "0.01": 0.4})
    found = l04.run_arm("pooled", 3, settings())
    truth = task.labels[task.test]
    p = np.array(found["probabilities"])
    assert p.shape == (len(truth), 4)
    assert found["lr"] == 0.01
    assert found["score"] == pytest.approx(vgg.by_case(p.argmax(1), truth).mean())
    assert found["trainable"] == 4 * (2 * round(512 * 0.05) + 1)
    cache, _ = vgg.train_arm("pooled", 3, 0.01, settings(), task)
    again = vgg.probabilities(cache, task.images[task.test], settings())
    np.testing.assert_allclose(again, p, atol=1e-5)


def test_rates_are_tuned_once_for_all_seeds(task, settings, monkeypatch):
    ran = []

    def train_arm(name, seed, rate, given, task, epochs, evaluations):
        ran.append((seed, rate, epochs))
        return None, SimpleNamespace(best={"score": -rate})

    monkeypatch.setattr(l04, "train_arm", train_arm)
    for seed in (0, 1):
        found = l04.tuned("head", settings(seed=seed, members=1 + seed))
    assert ran == [(l04.TUNING_SEED, rate, 0.25) for rate in l04.LEARNING_RATES]
    assert found == {str(rate): -rate for rate in l04.LEARNING_RATES}
    l04.tuned("head", settings(hidden=17))
    l04.tuned("full", settings())
    assert len(ran) == 2 * len(l04.LEARNING_RATES) + len(l04.FULL_RATES)
    # All weights together want smaller steps than adapters.
    assert [rate for _, rate, _ in ran[-len(l04.FULL_RATES) :]] == list(l04.FULL_RATES)
    assert max(l04.FULL_RATES) < min(l04.LEARNING_RATES)


# --- the published run and its grid ----------------------------------------------


def test_stored_rows_are_pixel_by_pixel(task):
    rows = vgg_trials.stored_rows(task.images[:2], 32)
    assert rows.shape == (2, 32, 32, 3)
    want = task.images[:2].astype(np.float32) / 255
    for colour in range(3):
        np.testing.assert_allclose(rows[..., colour], want, atol=1e-6)
    assert rows.is_contiguous()


def test_published_start_learns_nothing_and_he_does(task, monkeypatch):
    small = {"width": 1 / 16, "side": 32, "hidden": 32}
    monkeypatch.setattr(vgg_trials, "SCRATCH", small)
    short = vgg_trials.PUBLISHED | {"batch_size": 8, "epochs": 15}
    counts = task.counts("train")
    share = counts / counts.sum()
    entropy = -(share * np.log(share)).sum()
    as_published = vgg_trials.published_run(task, **short)
    assert as_published["counts"] == counts.tolist()
    assert len(as_published["losses"]) == round(15 * counts.sum() / 8)
    assert np.ptp(as_published["test"], axis=0).max() < 1e-3, "the same for every one"
    assert abs(np.mean(as_published["losses"][-20:]) - entropy) < 0.15
    he = vgg_trials.published_run(task, init="he", straight=True, **short)
    assert np.mean(he["losses"][-10:]) < 0.75 * entropy
    assert len(set(he["test"].argmax(1))) > 1


@pytest.fixture
def points(task, monkeypatch):
    """Three points: the first is best on test, the second on validation."""
    grid = {"lr": (1.0, 2.0, 3.0), "batch_size": (16,), "optimizer": ("adam",),
            "epochs": (3,)}  # fmt: skip
    monkeypatch.setattr(vgg_trials, "GRID", grid)

    def right(part, share):
        truth = task.labels[getattr(task, part)]
        said = truth.copy()
        wrong = round((1 - share) * len(truth))
        said[:wrong] = (said[:wrong] + 1) % 4
        return np.eye(4)[said]

    def run(task, seed, *, lr, batch_size, optimizer, epochs):
        if lr == 3:
            raise TrainError("loss is nan")
        good = {1.0: (0.4, 1.0), 2.0: (0.9, 0.5)}[lr]
        return {"validation": right("validation", good[0]),
                "test": right("test", good[1])}  # fmt: skip

    monkeypatch.setattr(vgg_trials, "published_run", run)
    return right


def test_grid_is_chosen_on_validation(task, settings, points):
    found = vgg_trials.grid_search(task, settings(), 0, "published")
    first, second = found["table"]
    assert [first["lr"], second["lr"]] == [1, 2], "a loss that is not finite: no row"
    assert first["test"] == 1 > second["test"]
    assert first["validation"] < second["validation"]
    assert found["cases"].mean() == pytest.approx(second["test"])
    assert sum(second["answers"]) == len(task.test)
    assert "cases" not in first
    run = l04.run_arm("grid_published", 0, settings())
    assert (run["score"], run["lr"]) == (pytest.approx(second["test"]), None)
    assert run["table"] == found["table"]


def test_a_grid_without_any_finite_loss_says_so(task, settings, points, monkeypatch):
    monkeypatch.setitem(vgg_trials.GRID, "lr", (3.0,))
    with pytest.raises(MedtutError, match="no point of published"):
        vgg_trials.grid_search(task, settings(), 0, "published")


def test_grid_of_our_arm_has_a_row_a_point(task, settings, monkeypatch):
    grid = {"lr": (1e-3, 1e-2), "batch_size": (4,), "optimizer": ("adam", "sgd"),
            "epochs": (1,)}  # fmt: skip
    monkeypatch.setattr(vgg_trials, "GRID", grid)
    table = vgg_trials.grid_search(task, settings(), 0, "pooled")["table"]
    asked = [(row["lr"], row["optimizer"]) for row in table]
    assert asked == [(1e-3, "adam"), (1e-3, "sgd"), (1e-2, "adam"), (1e-2, "sgd")]
    _, result = vgg.train_arm("pooled", 0, 1e-2, settings(batch_size=4, epochs=1),
                                  task, evaluations=1, optimizer="sgd")  # fmt: skip
    assert table[-1]["validation"] == result.best["score"]


@pytest.mark.parametrize("grouped", [True, False])
def test_folds_keep_groups_together_if_asked(task, settings, monkeypatch, grouped):
    folds = []
    monkeypatch.setattr(
        vgg_trials, "train_arm", lambda *a, **_: folds.append(a[4]) or (None, None)
    )
    answers = lambda cache, images, settings: np.eye(4)[[0] * len(images)]  # noqa: E731
    monkeypatch.setattr(vgg_trials, "probabilities", answers)
    task.groups = np.arange(len(task.labels)) // 2  # neighbours in the list
    learn = np.sort(np.concatenate([task.train, task.validation]))
    scores = vgg_trials.kfold(task, settings(), 1e-3, grouped)
    assert len(scores) == len(folds) == 5
    held = np.concatenate([fold.validation for fold in folds])
    assert np.array_equal(np.sort(held), learn)
    split = 0
    for fold in folds:
        assert not set(fold.train) & set(fold.validation)
        assert len(fold.train) + len(fold.validation) == len(learn)
        split += len(set(task.groups[fold.train]) & set(task.groups[fold.validation]))
    assert (split == 0) == grouped


def test_baselines_see_pixels_or_the_file_alone(task):
    found = vgg_trials.baselines(task)["test"]
    truth = task.labels[task.test]
    assert vgg.by_case(found["pca"], truth).mean() > 0.8
    # Gliomas alone have files of another size.
    assert np.array_equal(found["size"] == 0, truth == 0)


# --- the final answer ------------------------------------------------------------


@pytest.fixture(scope="module")
def linear(root):
    """LoRA on the linears: the answer of two members, and its task and settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDTUT_CACHE", str(root / "cache"))
        chosen = resolve(LESSON, "smoke", {"data": str(root / "set"), **TINY})
        task = load_task(chosen)
        return l04.final_answer("lora_linear", chosen, task, 5), task, chosen


def test_members_and_mirrors_are_averaged(linear):
    answer, task, chosen = linear
    assert answer.members == 2
    rate = l04.REAL_RATES["lora_linear"]
    images = task.images[task.test]
    parts = []
    for seed in (5, 6):
        cache, _ = vgg.train_arm("lora_linear", seed, rate, chosen, task, evaluations=1)
        for given in (images, images[:, :, ::-1].copy()):
            parts.append(vgg.probabilities(cache, given, chosen))
    np.testing.assert_array_equal(answer.first, parts[0])
    np.testing.assert_allclose(answer.probabilities, np.mean(parts, 0))
    assert np.abs(parts[0] - parts[2]).max() > 1e-6, "another seed, another member"
    assert answer.validation.shape == (len(task.validation), 4)
    np.testing.assert_allclose(answer.validation.sum(1), 1)


def test_the_file_brings_the_model_back_exactly(linear, tmp_path):
    answer, task, chosen = linear
    size = answer.save(tmp_path)
    assert 0 < size <= 1.3e6
    torch.manual_seed(99)
    model = vgg.build("lora_linear", chosen)
    load_adapter(model, tmp_path)
    cache = PrefixCache(model, half=True)
    found = vgg.probabilities(cache, task.images[task.test], chosen)
    np.testing.assert_array_equal(found, answer.first)


def test_at_the_lessons_size_the_file_is_small_enough():
    """At full width: rank 8 on both linears, and the head."""
    quick = resolve(LESSON, "quick")
    wide = 8 * (25088 + quick.hidden + 2 * quick.hidden) + 5 * quick.hidden
    full = 8 * (25088 + 3 * 4096) + 4 * 4096 + 4
    assert full == 315_396
    assert 4 * wide < 4 * full < 1.3e6


def test_svd_at_full_rank_changes_nothing(linear):
    answer, task, chosen = linear
    model = copy.deepcopy(answer.model)
    with torch.no_grad():  # an update that changes answers
        for name, tensor in model.classifier[0].named_parameters():
            if "lora_B" in name:
                tensor.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    cache = PrefixCache(model)
    p = vgg.probabilities(cache, task.images[task.test], chosen)
    said = p.argmax(1)
    assert (said != answer.first.argmax(1)).any()
    # Truth that agrees with these answers: any other answer lowers the score.
    task = replace(task, pictures=list(task.pictures))
    labels = task.labels.copy()
    labels[task.test] = said
    task.labels = labels
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given = replace(answer, cache=cache)
    error, score = l04.with_svd(given, TINY["hidden"], task, chosen)
    assert error < 1e-5
    assert score == pytest.approx(1)
    cut, _ = l04.with_svd(given, 1, task, chosen)
    assert 0.1 < cut < 1
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_plain_sister_has_its_share_of_the_vote(task, settings, monkeypatch):
    ran = []

    def train_arm(name, seed, rate, settings, task, *, evaluations, **_):
        ran.append((name, seed))
        looked.append(evaluations)
        return SimpleNamespace(encoder=name), None

    def probabilities(cache, images, settings):
        return np.eye(4)[[int(cache.encoder.endswith("plain"))] * len(images)]

    looked = []

    monkeypatch.setattr(l04, "train_arm", train_arm)
    monkeypatch.setattr(l04, "probabilities", probabilities)
    found = l04.final_answer("pooled_conv", settings(members=3), task, 7)
    assert ran == [("pooled_conv", 7), ("pooled_conv", 8), ("pooled_conv_plain", 9)]
    np.testing.assert_allclose(found.probabilities[0], [0.5, 0.5, 0, 0])
    assert looked == [1, 1, 1], "of one's own pictures the last weights are taken"
    assert (found.model, found.members) == ("pooled_conv", 3)
    drawn = settings(members=1, data=None)
    alone = l04.final_answer("pooled_conv", drawn, task, 7)
    assert looked[3:] == [3], "as in the committed runs"
    np.testing.assert_allclose(alone.probabilities[0], [1, 0, 0, 0])


def test_own_pictures_get_other_presets_in_quick(root):
    asked = {"data": str(root / "set"), "weights": "random"}
    lesson = SimpleNamespace(settings=resolve(LESSON, "quick", asked))
    found = l04.with_weights(lesson)
    assert {k: getattr(found, k) for k in l04.OWN} == l04.OWN
    lesson.settings = resolve(LESSON, "quick", asked | {"folds": 3})
    assert l04.with_weights(lesson).folds == 3
    for given in (resolve(LESSON, "smoke", asked), resolve(LESSON, "quick", {
            "weights": "random"})):  # fmt: skip
        assert l04.with_weights(SimpleNamespace(settings=given)) == given


def test_a_step_from_the_cache_is_faster(task, settings):
    model = vgg.build("lora_linear", settings(width=0.25, side=64)).eval()
    images = np.repeat(np.repeat(task.images[:8], 2, 1), 2, 2)
    assert l04.epoch_speed(model, PrefixCache(model), vgg.inputs(images)) > 1
    assert all(p.grad is None for p in model.parameters())


def test_without_a_network_weights_are_random_and_it_is_said(monkeypatch, settings):
    said = []
    lesson = SimpleNamespace(
        settings=settings(weights="asset"), fell_back=lambda *a: said.append(a)
    )
    monkeypatch.setattr(assets, "fetch", lambda name: {"onnx": "x"})
    assert l04.with_weights(lesson) is lesson.settings
    assert not said

    def gone(name):
        raise assets.AssetUnavailable(name)

    monkeypatch.setattr(assets, "fetch", gone)
    assert l04.with_weights(lesson) == settings(weights="random")
    assert len(said) == 1
    assert "random weights" in said[0][1]
    lesson.settings = settings(weights="own.onnx")
    assert l04.with_weights(lesson) is lesson.settings
    assert len(said) == 1


def test_rates_come_from_the_sweep_or_for_own_pictures_are_set(settings, monkeypatch):
    monkeypatch.setattr(l04, "chosen_rate", lambda arm: {"pooled": 0.125}[arm])
    assert l04.rate_of("pooled", resolve(LESSON, "smoke")) == 0.125
    monkeypatch.setitem(l04.REAL_RATES, "pooled", 0.5)
    assert l04.rate_of("pooled", settings()) == 0.5


def test_every_arm_can_be_built(settings):
    assert set(l04.ARMS) == {*vgg.DESIGNS, "grid_published", "grid_pooled"}
    assert set(l04.GRIDS.values()) - {"published"} <= set(vgg.DESIGNS)
    for name, arm in vgg.DESIGNS.items():
        model = vgg.build(name, settings(width=0.07))  # rank 32 needs 32 channels
        assert model.classifier[-1].out_features == len(CLASSES)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in model.parameters())
        assert (trained == whole) == (arm.where == "full"), name
