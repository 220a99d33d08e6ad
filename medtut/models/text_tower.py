"""A real text tower: a BERT from files, its sentence vectors, and prompts.

By default all-MiniLM-L6-v2 from the assets; in `full`, CXR-BERT as CT-CLIP has it
(``microsoft/BiomedVLP-CXR-BERT-specialized``). Only tensors and word lists are read:
the code that some pages ship beside their weights is never run, the network inside is
the plain BERT of transformers, and weights that do not fill it are refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medtut.data.assets import fetch
from medtut.data.cache import cached_arrays
from medtut.errors import MedtutError

ASSET = "minilm-l6-v2"
CXR_BERT = "microsoft/BiomedVLP-CXR-BERT-specialized"
# The pair of CT-CLIP's trainer first; present and absent.
TEMPLATES = (
    ("There is {}.", "There is no {}."),
    ("{} is present.", "{} is not present."),
    ("The scan shows {}.", "The scan shows no {}."),
    ("Findings are consistent with {}.", "No evidence of {}."),
)


class TextTower(nn.Module):
    """BERT, its tokenizer, and one vector per text.

    Attributes
    ----------
    width : int
        Of the vectors.
    pooling : {"mean", "cls"}
        The mean over the tokens of the text (sentence-transformers), or the first token
        (CT-CLIP). Padding never counts.
    normalise : bool
        Vectors of length 1.
    max_length : int
        In tokens, the two marks at the ends included; longer texts are cut at the end.
    """

    def __init__(
        self, bert: nn.Module, tokenizer, pooling: str, normalise: bool, max_length: int
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise MedtutError(f"pooling {pooling!r}; there are 'mean' and 'cls'.")
        self.bert, self.tokenizer = bert, tokenizer
        self.pooling, self.normalise, self.max_length = pooling, normalise, max_length
        self.width = bert.config.hidden_size

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, uncut; above `max_length` it will be cut."""
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [len(i) for i in ids]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Texts (B) -> (B, width)."""
        cut = {"truncation": True, "max_length": self.max_length, "padding": True}
        given = self.tokenizer(list(texts), return_tensors="pt", **cut)
        hidden = self.bert(**given.to(self.bert.device)).last_hidden_state
        return self.pool(hidden, given["attention_mask"].to(hidden.device))

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Last layer (B, L, width) and which of it is text (B, L) -> (B, width)."""
        mask = mask[..., None].to(hidden)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        vectors = mean if self.pooling == "mean" else hidden[:, 0]
        return nn.functional.normalize(vectors, dim=-1) if self.normalise else vectors

    def fingerprint(self) -> str:
        """sha256 of the weights as they are now, the words and the settings."""
        from medtut.lora.fingerprint import tensor_hash, total

        hashes = {k: tensor_hash(v) for k, v in self.state_dict().items()}
        settings = (self.pooling, self.normalise, self.max_length)
        words = sorted(self.tokenizer.get_vocab().items())
        case = getattr(self.tokenizer, "do_lower_case", None)
        return total(hashes | {"settings": repr((settings, case, words))})

    def embed(
        self, texts: Sequence[str], cache: bool = True, batch: int = 32
    ) -> np.ndarray:
        """Frozen vectors of many texts, each different text computed once.

        Parameters
        ----------
        texts : sequence of str
        cache : bool
            Through the cache of the course, by weights and texts.
        batch : int
            Texts of similar length go together, so little is spent on padding.

        Returns
        -------
        (N, width) float32

        Warns
        -----
        UserWarning
            Texts longer than `max_length` tokens.
        """
        unique = sorted(set(texts))
        if not unique:
            return np.zeros((0, self.width), np.float32)
        make = partial(self._embed, unique, batch)
        key = {"weights": self.fingerprint(), "texts": unique} if cache else None
        found = cached_arrays("text_tower", key, make) if cache else make()
        place = np.searchsorted(np.array(unique, object), list(texts))
        return found["vectors"][place]

    def _embed(self, texts: list[str], batch: int) -> dict[str, np.ndarray]:
        length = self.lengths(texts)
        if cut := sum(n > self.max_length for n in length):
            most = f"{self.max_length} tokens (up to {max(length)})"
            said = f"{cut} of {len(texts)} texts are longer than {most}: ends not read."
            warnings.warn(said, stacklevel=3)
        order, training = np.argsort(length, kind="stable"), self.training
        groups = np.split(order, range(batch, len(texts), batch))
        self.eval()
        try:
            with torch.inference_mode():
                parts = [self([texts[i] for i in g]).float().cpu() for g in groups]
        finally:
            self.train(training)
        return {"vectors": torch.cat(parts).numpy()[np.argsort(order)]}


def load_text_tower(
    source: str | Path = "asset", pooling: str | None = None,
    normalise: bool | None = None, max_length: int | None = None,
) -> TextTower:  # fmt: skip
    """Load a BERT and its tokenizer.

    Parameters
    ----------
    source : "asset", a folder, or a name on Hugging Face
        "asset": all-MiniLM-L6-v2, 384 wide, no network once it is in the cache. A name
        (`CXR_BERT`) needs the network the first time.
    pooling, normalise, max_length : optional
        As the page of the model says where its files do, else the first token, not
        normalised, as many tokens as it has positions. MiniLM: mean, length 1, 256
        tokens. CXR-BERT in CT-CLIP: first token, 512; CT-CLIP normalises after its own
        projection.

    Returns
    -------
    TextTower, in eval mode

    Raises
    ------
    MedtutError
        Files missing or damaged, no BERT, weights that leave part of it random.
    """
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils import logging

    folder, pool_file = Path(source), "1_Pooling/config.json"
    if str(source) == "asset":
        paths = fetch(ASSET)
        folder, pool_file = paths["weights"].parent, paths["pooling"].name
    here, level = folder.is_dir(), logging.get_verbosity()
    place, how = folder if here else str(source), {"local_files_only": here}
    # It lists what the file has and the tower has not; we check what matters.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if here and not (folder / "config.json").is_file():
            raise OSError("there is no config.json")  # else a default is taken
        config = BertConfig.from_pretrained(place, **how)
        words = BertTokenizerFast.from_pretrained(place, **how)
        how |= {"trust_remote_code": False, "output_loading_info": True}
        how |= {"config": config, "add_pooling_layer": False}
        bert, info = BertModel.from_pretrained(place, **how)
        # What sentence-transformers has beside a BERT; another BERT has none of it.
        names = (pool_file, "modules.json", "sentence_bert_config.json")
        files = map(folder.joinpath, names)
        texts = [f.read_text("utf-8") if f.is_file() else "{}" for f in files]
        pool, modules, cut = map(json.loads, texts)
    except Exception as error:  # transformers raises many kinds
        raise MedtutError(
            f"No BERT to be had from {source}: {str(error)[:300]}. Give 'asset', a "
            "folder with config.json, model.safetensors and vocab.txt, or a name on "
            f"Hugging Face such as {CXR_BERT} (needs the network once)."
        ) from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    lost = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if lost or not 10 < len(words) <= config.vocab_size:
        raise MedtutError(
            f"{source} does not fill a BERT: {len(lost)} tensors are missing or of "
            f"another shape ({', '.join(lost[:3])}), {len(words)} words for "
            f"{config.vocab_size} rows. Is it another kind of model, or damaged?"
        )
    pooling = pooling or ("mean" if pool.get("pooling_mode_mean_tokens") else "cls")
    if normalise is None:
        normalise = any(m["type"].endswith("Normalize") for m in modules)
    most = config.max_position_embeddings
    length = min(max_length or cut.get("max_seq_length", most), most)
    return TextTower(bert, words, pooling, normalise, length).eval()


def prompts(
    finding: str, templates: Sequence[tuple[str, str]] = TEMPLATES
) -> tuple[list[str], list[str]]:
    """Sentences that affirm and deny a finding, the published pair first.

    CT-CLIP's trainer asks "There is X." against "There is no X.", its evaluation script
    other words: a mismatch. ``templates[:1]`` is the published pair, more of them are
    an ensemble.

    Returns
    -------
    positives, negatives : lists of str, one per template
    """
    flat = [side.format(finding.lower()) for pair in templates for side in pair]
    said = [sentence[:1].upper() + sentence[1:] for sentence in flat]
    return said[::2], said[1::2]


def prompt_features(
    tower: TextTower, findings: Sequence[str],
    templates: Sequence[tuple[str, str]] = TEMPLATES, cache: bool = True,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Vectors of the prompts of many findings, from the cache.

    Returns
    -------
    positive, negative : (K, P, width) float32
        K findings, P templates; before any projection into a common space.
    """
    both = [prompts(f, templates) for f in findings]
    flat = [s for pair in both for side in pair for s in side]
    vectors = tower.embed(flat, cache).reshape(len(both), 2, len(templates), -1)
    return vectors[:, 0], vectors[:, 1]
