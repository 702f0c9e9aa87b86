"""Backbones, registered with timm, and ``create_model`` over all of timm's registry."""

from __future__ import annotations

from vitrail.models.factory import create_model, model_names
from vitrail.models.pretrained import Weights, load_pretrained

__all__ = ["Weights", "create_model", "load_pretrained", "model_names"]
