"""Adapting a pretrained segmentation network with few labelled volumes.

One call for Swin UNETR and U-Net, and the family of methods of FSEFT (Silva-Rodriguez
et al., arXiv 2303.17051):

>>> from medtut.adapters import adapt
>>> done = adapt(model, "lora", structure=0, decoder="fine-tuned", rank=4)
>>> optimizer = torch.optim.AdamW(done.parameters(model), 1e-4)
"""

from medtut.adapters.adaptive_rank import effective_ranks, proximal_step
from medtut.adapters.methods import METHODS
from medtut.adapters.parts import AdapterError, Parts, find_parts
from medtut.adapters.policy import Adaptation, adapt
from medtut.adapters.size_prior import (
    SizePrior,
    size_prior_loss,
    support_prior,
    transduce,
)
from medtut.adapters.store import load_adaptation, save_adaptation

__all__ = [
    "METHODS", "Adaptation", "AdapterError", "Parts", "SizePrior", "adapt",
    "effective_ranks", "find_parts", "load_adaptation", "proximal_step",
    "save_adaptation", "size_prior_loss", "support_prior", "transduce",
]  # fmt: skip
