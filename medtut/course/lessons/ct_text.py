"""Lesson 05, one arm of its sweep: the text tower learns too, by LoRA."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from medtut.lora import LoRAConfig, inject

if TYPE_CHECKING:
    from medtut.models.text_tower import TextTower

LAYERS, RANK = 2, 8


class AdaptedText(nn.Module):
    """The last layers of a BERT, with LoRA on their queries and values.

    What the frozen layers below say of a sentence never changes, so each different
    sentence is tokenised and read by them once and kept. That makes a step of the arm
    affordable on a CPU; a LoRA in all layers could learn more. Without dropout, which
    the frozen vectors of the other arms do not have either.

    Parameters
    ----------
    tower : TextTower
        Stays as it is, outside of this module.
    layers, rank : int
        How many layers are adapted, counted from the end, and the rank.
    """

    def __init__(
        self, tower: TextTower, layers: int = LAYERS, rank: int = RANK
    ) -> None:
        super().__init__()
        self.layers = copy.deepcopy(tower.bert.encoder.layer[-layers:])
        where = r"attention\.self\.(query|value)$"
        inject(self, LoRAConfig(r=rank, alpha=2 * rank, pattern=where))
        # In a tuple, so that its weights are not counted as this module's.
        self._tower, self._read = (tower,), {}

    def train(self, mode: bool = True) -> AdaptedText:
        """As in `eval`, always."""
        return super().train(False)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """What the frozen layers say of each text: (tokens, width), kept."""
        (tower,), new = self._tower, [t for t in texts if t not in self._read]
        cut = {"truncation": True, "max_length": tower.max_length, "padding": True}
        for start in range(0, len(new), 64):
            some = new[start : start + 64]
            given = tower.tokenizer(some, return_tensors="pt", **cut)
            given = given.to(tower.bert.device)
            # In float32 whoever asks first, a training in bfloat16 or a test.
            with torch.autocast(tower.bert.device.type, enabled=False):
                states = tower.bert(**given, output_hidden_states=True).hidden_states
            lengths = given["attention_mask"].sum(1).tolist()
            below = states[-1 - len(self.layers)].float()
            kept = (h[:n].clone() for h, n in zip(below, lengths, strict=True))
            self._read |= dict(zip(some, kept, strict=True))
        return [self._read[t] for t in texts]

    def forward(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """Different texts (B) -> (B, width); texts of similar length go together."""
        found, device = self.read(texts), next(self.parameters()).device
        order, parts = np.argsort([len(h) for h in found], kind="stable"), []
        for some in np.split(order, range(batch, len(order), batch)):
            hidden = pad_sequence([found[i] for i in some], True).to(device)
            length = torch.tensor([len(found[i]) for i in some], device=device)
            mask = torch.arange(hidden.shape[1], device=device) < length[:, None]
            # Added to the logits: nothing where there is text.
            added = (~mask).to(hidden) * torch.finfo(hidden.dtype).min
            for layer in self.layers:
                hidden = layer(hidden, added[:, None, None])
            parts.append(self._tower[0].pool(hidden.float(), mask))
        return torch.cat(parts)[np.argsort(order)]

    def reports(self, each: Sequence[Sequence[str]]) -> Tensor:
        """The mean vector (B, width) of each report's sentences."""
        different = sorted({sentence for one in each for sentence in one})
        place = {sentence: k for k, sentence in enumerate(different)}
        vectors = self(different)
        means = [vectors[[place[s] for s in one]].mean(0) for one in each]
        return torch.stack(means)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], cache: bool = False) -> np.ndarray:
        """Vectors (N, width) as they are now, never from the cache."""
        different = sorted(set(texts))
        place = np.searchsorted(np.array(different, object), list(texts))
        return self(different).cpu().numpy()[place]
