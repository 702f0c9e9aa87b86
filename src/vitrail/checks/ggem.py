"""GGeM against the class token, mean, max and GeM pooling of a small vision transformer.

The paper finetunes pretrained ViT-B and ViT-L. Here one small transformer is trained with its class token; every arm
starts from its weights, changes the pooling, and trains on as many images: all of the network, or with the backbone
frozen the classifier and the exponents alone. The final normalisation stands before the pooling in all arms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vitrail.checks.check import Arm, Context, Finding, Verdict, paired
from vitrail.data.index import Index
from vitrail.edits.ggem import GGeM
from vitrail.training.device import resolved

DEPTH, HEADS = 4, 4
NET = {"embed_dim": 64, "depth": DEPTH, "num_heads": HEADS, "fc_norm": False}
EDITS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean": {"global_pool": "avg"},
    "max": {"global_pool": "max"},
    "gem": {"edit": {"groups": 1}},
    "ggem": {"edit": {"groups": HEADS}},
}
LAYERS = DEPTH + 2
"""As timm groups them: the embedding, the blocks (the last with the normalisation), and what pools and classifies."""
FROZEN = {"train.freeze": (LAYERS - 1) / LAYERS}
MODES: dict[str, dict[str, Any]] = {"finetuned": {}, "frozen": FROZEN}
PRETRAINING, EPOCHS = 0.75, 0.2
"""Passes over Fashion-MNIST before the arms part, and of each arm."""
CLAIMS = {
    "class token": "is more accurate than the class token it was trained with",
    "mean": "is more accurate than mean pooling",
    "max": "is more accurate than max pooling",
    "gem": "is more accurate than GeM, with one exponent for all channels",
}


def run(ctx: Context) -> Verdict:
    """Compare accuracy and retrieval of the poolings, finetuned and with the backbone frozen."""
    index = ctx.index("digits") if ctx.quick else ctx.index("fashion", val_fraction=0.02)
    pretraining, epochs = (0.1, 0.04) if ctx.quick else (PRETRAINING, EPOCHS)
    patch = resolved(ctx.recipe(index, {}).model.img_size) // 4  # 4 x 4 patches
    net = {"model.name": "vit_tiny_patch16_224", "train.channels_last": False}

    def train(arm: str, seed: int, length: float, settings: dict[str, Any], **options: Any) -> Arm:
        options = {**NET, "patch_size": patch, **options}
        return ctx.train(index, arm, seed, {**net, "model.options": options, "train.epochs": length, **settings})

    arms: dict[tuple[str, str], list[Arm]] = {(mode, name): [] for mode in MODES for name in EDITS}
    for seed in ctx.seeds:
        weights = ctx.folder / f"backbone-{seed}.safetensors"
        backbone = train("backbone", seed, pretraining, {})
        save_file({key: value.contiguous() for key, value in backbone.model.state_dict().items()}, weights)
        for (mode, name), trained in arms.items():
            options = dict(EDITS[name])
            edits = [{"name": "ggem", "options": options.pop("edit")}] if "edit" in options else []
            settings = {**MODES[mode], "model.pretrained": str(weights), "model.edits": edits}
            trained.append(train(f"{mode}-{name.replace(' ', '-')}", seed, epochs, settings, **options))

    top1 = {key: [arm.top1 for arm in trained] for key, trained in arms.items()}
    found = {key: [_retrieval(ctx, index, arm) for arm in trained] for key, trained in arms.items()}

    def beats(mode: str, other: str, claim: str, quantity: str, values: dict[tuple[str, str], list[float]]) -> Finding:
        both = {name: values[mode, name] for name in ("ggem", other)}
        return paired(claim, quantity, both, ours="ggem", against=other)

    accuracy = "top-1 accuracy, held-out images, a share"
    precision = "mean average precision of retrieval by cosine among held-out images, a share"
    findings = [
        beats(mode, other, f"A {mode} vision transformer with GGeM {claim}.", accuracy, top1)
        for mode in MODES
        for other, claim in CLAIMS.items()
    ]
    findings += [
        beats(mode, other, f"The {mode} embeddings of GGeM retrieve better than those of {other}.", precision, found)
        for mode in MODES
        for other in CLAIMS
    ]
    notes = [
        f"{len(index.rows('train'))} training images; {pretraining:g} epochs with the class token, then {epochs:g} for "
        "each arm; the paper finetunes ViT-B and ViT-L that saw ImageNet or more",
        "The backbone was trained with its class token, on the same classes: the frozen comparison favours that arm.",
        f"GGeM has {HEADS} exponents and GeM one; they start at 3 and learn at the rate of all other parameters.",
    ]
    rows = [
        {
            "arm": name,
            "backbone": mode,
            "seed": seed,
            "top1": arm.top1,
            "map": found[mode, name][i],
            "p": _exponents(arm),
        }
        for (mode, name), trained in arms.items()
        for i, (seed, arm) in enumerate(zip(ctx.seeds, trained))
    ]
    return Verdict(findings, notes, {"arms": rows})


def _exponents(arm: Arm) -> str:
    """Return what the exponents became."""
    learned = [module.p.tolist() for module in arm.model.modules() if isinstance(module, GGeM)]
    return ", ".join(f"{p:.3f}" for group in learned for p in group)


@torch.no_grad()
def _retrieval(ctx: Context, index: Index, arm: Arm) -> float:
    """Return the mean average precision when each held-out image seeks the others of its class."""
    model: Any = arm.model
    embedded, targets = [], []
    for images, target in ctx.held_out(index, arm.preprocess, most=100 if ctx.quick else 2000)():
        embedded.append(model.forward_head(model.forward_features(images), pre_logits=True))
        targets.append(target)
    return mean_average_precision(torch.cat(embedded), torch.cat(targets))


def mean_average_precision(embeddings: Tensor, targets: Tensor) -> float:
    """Return the mean over images of the average precision of the others, ranked by cosine; with several labels, one
    shared label makes a match. Images without a match are left out.

    Args:
        embeddings: (N, C).
        targets: (N,) or (N, classes).
    """
    vectors = F.normalize(embeddings, dim=1)
    same = targets[:, None] == targets if targets.ndim == 1 else targets @ targets.T > 0
    others = ~torch.eye(len(targets), dtype=torch.bool)
    order = (vectors @ vectors.T).masked_fill(~others, -torch.inf).argsort(1, descending=True)[:, :-1]
    match = same.gather(1, order).double()
    precision = match.cumsum(1) / torch.arange(1, match.shape[1] + 1)
    has = match.any(1)
    return float(((match * precision).sum(1)[has] / match.sum(1)[has]).mean()) if has.any() else 0.0
