"""What an exported file says about itself: all that turns pixels into named answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from vitrail import __version__
from vitrail.data.preprocess import Preprocess

# The names of the tensors between which the parts of the file lie; see ``vitrail.deploy.graph``.
IMAGE, PIXELS, INPUT, LOGITS, PROBABILITIES = "image", "pixels", "input", "logits", "probabilities"


@dataclass(frozen=True)
class Interface:
    """Stored in the metadata of the file, each field as JSON.

    Args:
        classes: names, in the order of the logits.
        preprocess: how an image becomes the network's input.
        temperature: the logits are divided by it before they become probabilities.
        multilabel: each class has a probability of its own (sigmoid) rather than a share of one (softmax).
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    multilabel: bool = False

    def to_metadata(self) -> dict[str, str]:
        """Return the entries of the file's metadata."""
        return {
            "classes": json.dumps(list(self.classes), ensure_ascii=False),
            "preprocess": json.dumps(self.preprocess.to_dict()),
            "temperature": json.dumps(self.temperature),
            "multilabel": json.dumps(self.multilabel),
            "vitrail_version": __version__,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Read the entries back.

        Raises:
            ValueError: an entry is missing or damaged.
        """
        try:
            return cls(
                tuple(json.loads(metadata["classes"])),
                Preprocess.from_dict(json.loads(metadata["preprocess"])),
                float(json.loads(metadata["temperature"])),
                bool(json.loads(metadata["multilabel"])),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"metadata without {error}") from None
