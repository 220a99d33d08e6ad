"""Frozen features: cached equals uncached, and nothing stale is ever read."""

import numpy as np
import pytest
import torch
from torch import nn

from medtut.models.frozen_features import cached_features, last_features


class Small(nn.Module):
    """A frozen network with a 1×1×1 head and something that eval mode changes."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.GELU(), nn.Dropout(0.5)
        )
        self.classifier = nn.Conv3d(6, 2, 1)
        self.runs = 0

    def features(self, x):
        self.runs += 1
        return self.body(x)

    def forward(self, x):
        return self.classifier(self.features(x))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    return tmp_path


def volumes(count=2, shape=(1, 14, 12, 10)):
    rng = np.random.default_rng(0)
    return [rng.random(shape, dtype=np.float32) for _ in range(count)]


def test_cached_equals_uncached(cache):
    model, given = Small(), volumes()
    exact = cached_features(model, given, dtype="float32")
    half = cached_features(model, given)
    for volume, full, small in zip(given, exact, half, strict=True):
        want = last_features(model, torch.from_numpy(volume)).numpy()
        np.testing.assert_array_equal(full, want)
        assert small.dtype == np.float16
        np.testing.assert_allclose(small, want, rtol=2**-11, atol=3e-8)
        assert not np.array_equal(small, want), "half precision shows"
        logits = model.eval()(torch.from_numpy(volume)[None])[0]
        got = model.classifier(torch.from_numpy(np.array(full))[None])[0]
        assert torch.equal(got, logits), "head on cached features is the network"
        got = model.classifier(torch.from_numpy(np.array(small, np.float32))[None])[0]
        assert (got - logits).abs().max() < 2e-3


def test_computed_once_and_mapped(cache):
    model, given = Small(), volumes(3)
    cached_features(model, given)
    assert model.runs == 3
    found = cached_features(model, given)
    assert model.runs == 3, "nothing ran again"
    assert all(isinstance(f, np.memmap) and not f.flags.writeable for f in found)
    files = [p for p in cache.rglob("*") if p.is_file()]
    assert len(files) == 3
    assert all("made/frozen_features" in p.as_posix() for p in files)


def test_nothing_stale(cache):
    """Other weights, buffers, volumes, windows, precision or a key: made anew."""
    model, (volume,) = Small(), volumes(1)
    cached_features(model, [volume])
    for change in ("weight", "buffer", "volume", "roi", "overlap", "dtype", "key"):
        runs, how = model.runs, {}
        if change == "weight":
            model.body[0].bias.data[0] += 1e-6
        elif change == "buffer":
            model.body[1].running_mean[0] += 1e-6
        elif change == "volume":
            volume = volume.copy()
            volume[0, 3, 3, 3] += 1e-6
        else:
            how = {
                "roi": {"roi": (14, 12, 10)},
                "overlap": {"roi": (14, 12, 10), "overlap": 0.5},
                "dtype": {"dtype": "float32"},
                "key": {"key": {"code": 2}},
            }[change]
        cached_features(model, [volume], **how)
        assert model.runs > runs, change


def test_the_model_is_left_as_it_was(cache):
    model = Small().train()
    first = cached_features(model, volumes(1))[0]
    assert model.training
    assert model.body[0].weight.grad is None
    model.eval()
    np.testing.assert_array_equal(first, cached_features(model, volumes(1))[0])


def test_windows_blend_to_the_logits_of_the_whole_network():
    """The head is linear and the weights sum to 1, so the order does not matter."""
    from medtut.evaluate.organs import predict_volume

    model, (volume,) = Small(), volumes(1, (1, 20, 12, 9))
    roi = (8, 8, 8)
    features = last_features(model, torch.from_numpy(volume), roi)
    assert features.shape == (6, 20, 12, 9)
    want = predict_volume(model, volume, roi, activation=None)
    got = model.classifier(features[None])[0].detach().numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_beyond_half_precision(cache):
    model = Small()
    model.body[0].weight.data *= 1e7
    found = cached_features(model, volumes(1))[0]
    assert np.isfinite(found).all()
    assert found.max() == np.finfo("float16").max


def test_another_head_reads_the_same_features(cache):
    model = Small()
    cached_features(model, volumes(1))
    model.classifier = nn.Conv3d(6, 5, 1)
    runs = model.runs
    cached_features(model, volumes(1))
    assert model.runs == runs


def test_a_failure_leaves_nothing(cache):
    model = Small()
    model.body[0].weight.data = torch.zeros(6, 2, 3, 3, 3)
    with pytest.raises(RuntimeError):
        cached_features(model, volumes(1))
    assert not list(cache.rglob("*.npy"))
