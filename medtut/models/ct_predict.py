"""Ask a CT-CLIP about one CT in sentences: ``medtut predict ct``.

A contrastive model knows no classes. A finding gets a probability from two sentences,
one that affirms and one that denies it: the softmax over their similarities to the
volume (CT-CLIP, arXiv:2403.17834). A sentence without an opposite has a similarity
only, which says little by itself. Volumes and sentences are embedded once and kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from medtut.data import cache, ct_rate, ct_volume, download
from medtut.errors import MedtutError
from medtut.evaluate.zero_shot import pair_scores
from medtut.models import ctclip, text_tower

SMALL_WEIGHTS = Path(__file__).parent / "weights" / "ctclip_small.safetensors"
MAKE = "make the course's own with: python data_scripts/pretrain_ctclip_small.py"
NOTE = "a teaching model; not for patients"
_PAIR = r"(there is) (no )?(?!(?:no|not|nothing|neither|none)\b)(?:an? )?(.+)"


def opposite(sentence: str) -> str | None:
    """Return the other of the published pair "There is X." and "There is no X.".

    An article goes: "There is a nodule." is denied by "There is no nodule.". None for
    sentences of another kind, which may be denied in ways that no rule here knows.
    """
    said = re.fullmatch(_PAIR, sentence, re.IGNORECASE)
    return said and f"{said[1]} {'' if said[2] else 'no '}{said[3]}"


def spacing_of(weights: Path) -> tuple[float, ...] | None:
    """Voxels (D, H, W) in mm of a model's volumes; None if its file does not say.

    ``save_ctclip(model, path, spacing=(6.0, 3.6, 3.6))`` writes them.

    Raises
    ------
    MedtutError
        If what stands there is not three numbers above 0.
    """
    text = safe_open(weights, "pt").metadata().get("spacing", "")
    mm = re.fullmatch(r"[\[(]" + ", *".join([r"(\d+\.?\d*)"] * 3) + r"[\])]", text)
    if text and not (mm and all(map(float, mm.groups()))):
        raise MedtutError(f"{weights}: its spacing {text!r} is not (D, H, W) in mm.")
    return mm and tuple(map(float, mm.groups()))


def embed_volume(model: Any, weights: Path, path: Path, key: dict[str, Any]) -> Any:
    """Return the vector of a CT, of length one, from the cache if it was asked before.

    Parameters
    ----------
    model : CTCLIP
    weights : Path
        Its file, for the key of the cache.
    path : Path
        NIfTI or NRRD; see `medtut.data.ct_volume.read_hu` for what is refused.
    key : dict
        ``size`` and ``spacing`` (D, H, W); ``rescale``, slope and intercept or twice
        None.

    Returns
    -------
    (latent,) float32 array

    Notes
    -----
    The entry goes by the file's content, not its name. A header with its voxels in a
    second file (.nhdr, .hdr) is read each time: its own content is not all there is.
    """

    def make() -> dict[str, Any]:
        ct = ct_volume.read_hu(path, *key["rescale"])
        x = torch.from_numpy(ct_volume.prepare(ct, key["size"], key["spacing"]))[None]
        return {"vector": model.encode_image(x.to(model.log_scale))[0].cpu().numpy()}

    one = path.name.lower().endswith((".nii", ".nii.gz", ".nrrd"))
    files = {str(i): download.sha256_of(p) for i, p in enumerate((path, weights))}
    full = key | files | {"version": 1}  # raise it when the vector is made otherwise
    return (cache.cached_arrays("predict", full, make) if one else make())["vector"]


@torch.inference_mode()
def predict_ct(
    volume: Path | str,
    prompts: list[str] | None = None,
    against: list[str] | None = None,
    weights: Path | str | None = None,
    text: str | Path = "asset",
    rescale: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """Compare a CT with sentences, or with the 18 findings of CT-RATE.

    Parameters
    ----------
    volume : path
        NIfTI or NRRD.
    prompts : list of str
        Without any, "There is X." for every finding, the most probable first.
    against : list of str
        The opposite of each prompt. Without any, that of `opposite`.
    weights : path
        From `medtut.models.ctclip.save_ctclip`; by default the course's. Volumes are
        brought to its tower's size, and to the spacing in its metadata or else
        `medtut.data.ct_volume.SPACING`.
    text : "asset", a folder, or a name on Hugging Face
        The text tower that the model was trained with.
    rescale : slope and intercept
        Beside the file, if its values are not in HU: see
        `medtut.data.ct_volume.read_hu`.

    Returns
    -------
    dict, ready for JSON
        ``volume``, ``weights``, ``size``, ``spacing``, ``spacing_known``, ``note``, and
        ``answers``, a list of ``sentence``, ``against`` (or None), ``p`` (softmax over
        the two, or None) and ``cosine``.

    Raises
    ------
    MedtutError
        Files missing, damaged or no CT; empty sentences, another number of opposites;
        a text tower of another width than the model's.
    """
    yes, no = ([" ".join(s.split()) for s in x or ()] for x in (prompts, against))
    if not all(yes + no) or len(no) not in (0, len(yes)):
        said = f"{len(yes)} --prompt, {len(no)} --against, {(yes + no).count('')} empty"
        raise MedtutError(f"{said}: put words in each; one --against each, or none.")
    path, weights = Path(volume), Path(weights or SMALL_WEIGHTS)
    for file, cure in ((path, "give one CT, NIfTI or NRRD"), (weights, MAKE)):
        if not file.is_file():
            raise MedtutError(f"There is no file {file}; {cure}.")
    model, known = ctclip.load_ctclip(weights), spacing_of(weights)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tower, width = text_tower.load_text_tower(text), model.to_text.in_features
    if tower.width != width:
        said = f"{weights} was trained on texts of width {width}, {text} gives "
        raise MedtutError(f"{said}{tower.width}; give --text what it was trained with.")
    key = {"size": model.image_tower.image, "spacing": known or ct_volume.SPACING}
    image = embed_volume(model, weights, path, key | {"rescale": rescale})
    ask = yes or [text_tower.prompts(f)[0][0] for f in ct_rate.FINDINGS]
    no = no or [opposite(s) for s in ask]
    # Where none is known a sentence stands against itself, and its 0.5 is not shown.
    flat = ask + [b or a for a, b in zip(ask, no, strict=True)]
    texts = model.encode_text(torch.from_numpy(tower.embed(flat)).to(model.log_scale))
    a, b = texts.cpu().numpy().reshape(2, len(ask), -1)
    p = pair_scores(image[None], a, b, model.log_scale.exp().item())[0]
    answers = [
        {"sentence": s, "against": n, "p": float(x) if n else None, "cosine": float(c)}
        for s, n, x, c in zip(ask, no, p, a @ image, strict=True)
    ]
    answers.sort(key=lambda one: 0 if yes else -one["p"])
    facts = {"volume": str(path), "weights": str(weights), "note": NOTE} | key
    return facts | {"spacing_known": known is not None, "answers": answers}
