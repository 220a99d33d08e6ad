"""What `assets.yml` may say: the typed form of the list of assets."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from medtut.errors import MedtutError

SHA256 = Field(pattern=r"^[0-9a-f]{64}$")


class AssetError(MedtutError):
    """An asset is unknown, its entry is wrong, or its bytes are not the pinned ones."""


class AssetUnavailable(AssetError):
    """No place that was tried has the asset, usually for lack of a network."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Archive(_Strict):
    """One file of a Python package on the user's package index."""

    project: str
    version: str
    filename: str
    sha256: str = SHA256
    bytes: int


class Source(_Strict):
    """Where one file may come from: exactly one of the three kinds."""

    url: str | None = None
    archive: str | None = None
    member: str | None = None
    embedded: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        if sum(v is not None for v in (self.url, self.archive, self.embedded)) != 1:
            raise ValueError("a source is one of url, archive + member, embedded")
        if (self.archive is None) != (self.member is None):
            raise ValueError("archive and member come together")
        return self

    @field_validator("member", "embedded")
    @classmethod
    def _plain_path(cls, path: str | None) -> str | None:
        parts = path.split("/") if path is not None else ["x"]
        if ".." in parts or "" in parts or re.search(r"[\\:]", path or ""):
            raise ValueError(f"'{path}' is not a plain relative path inside an archive")
        return path


class AssetFile(_Strict):
    """One file, its pinned bytes and where to get it, best source first."""

    filename: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    sha256: str = SHA256
    bytes: int
    sources: tuple[Source, ...] = Field(min_length=1)


class Asset(_Strict):
    """A named group of files that belong together."""

    title: str
    licence: str
    files: dict[str, AssetFile]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(f.bytes for f in self.files.values())


class Registry(_Strict):
    """The content of ``assets.yml``."""

    archives: dict[str, Archive] = {}
    assets: dict[str, Asset]

    @model_validator(mode="after")
    def _known_archives(self) -> Registry:
        for name, asset in self.assets.items():
            for file in asset.files.values():
                for source in file.sources:
                    if source.archive and source.archive not in self.archives:
                        raise ValueError(f"{name}: no archive '{source.archive}'")
        return self


def load_registry(path: Path) -> Registry:
    """Read and check a registry file.

    Raises
    ------
    AssetError
        If an entry is wrong; says which.
    """
    import yaml
    from pydantic import ValidationError

    try:
        return Registry.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise AssetError(f"{path} is not a good list of assets: {error}") from error
