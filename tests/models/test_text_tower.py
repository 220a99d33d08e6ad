"""A tiny BERT made here, and the real MiniLM where it is in the cache."""

import json

import numpy as np
import pytest
import torch

from medtut.errors import MedtutError
from medtut.lora import LoRAConfig, adapter_parameters, inject
from medtut.models.text_tower import (
    TEMPLATES,
    TextTower,
    load_text_tower,
    prompt_features,
    prompts,
)

WORDS = [
    "there",
    "is",
    "no",
    "a",
    "nodule",
    "effusion",
    "in",
    "the",
    "lung",
    ".",
    "right",
    "left",
    "##s",
    "small",
]
TEXTS = ["There is no nodule.", "There is a small effusion in the right lung.", "Lungs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=16,
        hidden_dropout_prob=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path, request):
    if "real" not in request.node.name:
        monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))


def copy(folder, target):
    import shutil

    return shutil.copytree(folder, target)


def test_first_token_of_a_plain_bert(folder):
    tower = load_text_tower(folder)
    assert (tower.pooling, tower.normalise, tower.max_length) == ("cls", False, 16)
    assert tower.width == 32
    assert not tower.training
    out = tower(TEXTS)
    assert out.shape == (3, 32)
    # One by one, without padding, by the plain model.
    for text, row in zip(TEXTS, out, strict=True):
        given = tower.tokenizer(text, return_tensors="pt")
        assert "[UNK]" not in tower.tokenizer.decode(given["input_ids"][0])
        hidden = tower.bert(**given).last_hidden_state[0]
        assert torch.allclose(row, hidden[0], atol=1e-5)


def test_mean_over_the_tokens_and_nothing_of_the_padding(folder):
    tower = load_text_tower(folder, pooling="mean", normalise=True)
    out = tower(TEXTS)
    for text, row in zip(TEXTS, out, strict=True):
        hidden = tower.bert(**tower.tokenizer(text, return_tensors="pt"))[0][0]
        mean = hidden.mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)
    assert torch.allclose(out.norm(dim=1), torch.ones(3), atol=1e-5)


def test_settings_of_sentence_transformers_are_read(folder, tmp_path):
    place = copy(folder, tmp_path / "st")
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_mean_tokens": true}'
    )
    (place / "modules.json").write_text('[{"type": "x.Normalize"}]')
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    tower = load_text_tower(place)
    assert (tower.pooling, tower.normalise, tower.max_length) == ("mean", True, 9)
    tower = load_text_tower(place, pooling="cls", normalise=False, max_length=99)
    assert (tower.pooling, tower.normalise, tower.max_length) == ("cls", False, 16)


def test_long_texts_are_cut_and_said_so(folder):
    tower = load_text_tower(folder, pooling="mean", max_length=6)
    long = "there is a nodule in the lung"
    cut = tower([long])
    assert torch.allclose(cut, tower(["there is a nodule"]), atol=1e-6)
    with pytest.warns(UserWarning, match=r"1 of 2 texts are longer than 6 tokens"):
        tower.embed([long, "nodule"], cache=False)


def test_embed_is_forward_without_dropout_and_is_cached(folder, monkeypatch):
    tower = load_text_tower(folder).train()
    texts = [*TEXTS, TEXTS[0]]
    vectors = tower.embed(texts, batch=2)
    assert tower.training
    assert vectors.dtype == np.float32
    with torch.no_grad():
        assert np.allclose(vectors, tower.eval()(texts).numpy(), atol=1e-5)
    calls = []
    plain = TextTower.forward
    monkeypatch.setattr(
        TextTower, "forward", lambda self, t: (calls.append(len(t)), plain(self, t))[1]
    )
    assert np.array_equal(tower.embed(texts[::-1]), vectors[::-1])
    assert calls == [], "read from the cache, in another order"
    tower.embed(texts, cache=False, batch=8)
    assert calls == [3], "each different text once"
    with torch.no_grad():
        tower.bert.encoder.layer[0].attention.self.value.weight.normal_()
    assert not np.allclose(tower.embed(texts), vectors), "other weights, other entry"
    tower.pooling = "mean"
    assert len(calls) == 2
    tower.embed(texts)
    assert len(calls) == 3, "another pooling, another entry"
    assert tower.embed([]).shape == (0, 32)


def test_lora_trains_queries_and_values_only(folder):
    tower = load_text_tower(folder)
    before = tower(TEXTS).detach()
    injection = inject(tower, LoRAConfig(r=2))
    assert sorted(n.split(".")[-1] for n in injection.layers) == [
        "query", "query", "value", "value"
    ]  # fmt: skip
    assert torch.allclose(tower(TEXTS), before, atol=1e-6)
    first = tower.fingerprint()
    (tower(TEXTS) * torch.randn(32)).sum().backward()
    given = {n for n, p in tower.named_parameters() if p.grad is not None}
    assert given == {n for n, _ in adapter_parameters(tower)}
    optimiser = torch.optim.SGD([p for _, p in adapter_parameters(tower)], 1.0)
    optimiser.step()
    assert not torch.allclose(tower(TEXTS), before, atol=1e-6)
    assert tower.fingerprint() != first


def test_foreign_code_is_not_run(folder, tmp_path):
    """A page that ships code of its own, as CXR-BERT's does."""
    place = copy(folder, tmp_path / "remote")
    config = json.loads((place / "config.json").read_text())
    config["model_type"] = "cxr-bert"
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (place / "config.json").write_text(json.dumps(config))
    (place / "evil.py").write_text("raise SystemExit('ran')\nclass Evil: pass\n")
    tower = load_text_tower(place)
    assert type(tower.bert).__module__.startswith("transformers.")
    assert torch.allclose(tower(TEXTS), load_text_tower(folder)(TEXTS))


def test_weights_under_the_prefix_of_a_bigger_model(folder, tmp_path):
    """CXR-BERT stores `bert.` in front of every name."""
    from safetensors.torch import load_file, save_file

    place = copy(folder, tmp_path / "prefix")
    state = load_file(place / "model.safetensors")
    named = {f"bert.{k}": v for k, v in state.items()}
    save_file(named, place / "model.safetensors", {"format": "pt"})
    assert torch.allclose(load_text_tower(place)(TEXTS), load_text_tower(folder)(TEXTS))


def test_weights_that_do_not_fill_it_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    place = copy(folder, tmp_path / "half")
    state = load_file(place / "model.safetensors")
    del state["encoder.layer.1.attention.self.query.weight"]
    save_file(state, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(MedtutError, match=r"layer\.1\.attention\.self\.query\.weight"):
        load_text_tower(place)


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "vocab.txt"])
def test_missing_files_are_said(folder, tmp_path, lost):
    place = copy(folder, tmp_path / "lost")
    (place / lost).unlink()
    said = "no config.json" if lost == "config.json" else "lost"
    with pytest.raises(MedtutError, match=said):
        load_text_tower(place)


def test_a_name_without_a_network_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MedtutError, match="needs the network once"):
        load_text_tower("nobody/nothing")
    with pytest.raises(MedtutError, match="pooling 'max'"):
        TextTower(None, None, "max", False, 8)


def test_prompts():
    positive, negative = prompts("Lung nodule")
    assert positive[0] == "There is lung nodule."
    assert negative[0] == "There is no lung nodule."
    assert positive[1] == "Lung nodule is present."
    assert len(positive) == len(negative) == len(TEMPLATES) > 2
    assert len({*positive, *negative}) == 2 * len(TEMPLATES)
    assert prompts("X", TEMPLATES[:1]) == (["There is x."], ["There is no x."])


def test_prompt_features_are_in_place(folder):
    tower = load_text_tower(folder)
    names = ("Nodule", "Effusion", "Lung")
    positive, negative = prompt_features(tower, names, TEMPLATES[:2])
    assert positive.shape == negative.shape == (3, 2, 32)
    for k, name in enumerate(names):
        both = prompts(name, TEMPLATES[:2])
        for side, features in zip(both, (positive, negative), strict=True):
            with torch.no_grad():
                assert np.allclose(features[k], tower(side).numpy(), atol=1e-5)


def test_the_real_minilm():
    from medtut.data import assets

    if not assets.status("minilm-l6-v2")["cached"]:
        pytest.skip("asset minilm-l6-v2 is not in the cache")
    tower = load_text_tower()
    assert (tower.pooling, tower.normalise, tower.max_length) == ("mean", True, 256)
    # 22.7 M with the pooler of the file, which sentence vectors do not use.
    count = sum(p.numel() for p in tower.parameters())
    assert count + 384 * 385 == 22_713_216
    same, near, far = tower.embed(
        [
            "There is a pleural effusion.",
            "Fluid in the pleural space.",
            "A sleepy cat.",
        ],
        cache=False,
    )
    assert same @ near > 0.5 > 0.2 > same @ far
