"""VOLO: is outlook attention better than a convolution of its window, and do labels of tokens help?

The paper trains on ImageNet for 310 epochs, with labels of tokens from a far larger net. Here a net with one stage of
outlookers and one of attention sees a few thousand small images, and a small residual network, trained before, is the
teacher. All arms see the same number of images.
"""

from __future__ import annotations

from typing import Any

from timm.models.volo import OutlookAttention
from torch import Tensor, nn

from vitrail.checks.check import Context, Finding, Verdict, arm_cost, paired
from vitrail.edits.surgery import Edit, replace_modules

NET: dict[str, Any] = {
    "layers": (2, 1, 1, 1),
    "embed_dims": (32, 64, 64, 64),
    "num_heads": (2, 4, 4, 4),
    "stem_hidden_dim": 8,
}
TEACHER = {"model.options": {"channels": (16, 32, 64, 128), "stem_stride": 2}}
PASSES, TEACHER_PASSES = 7_000, 30_000
"""Of images, for each arm and for their teacher."""


class WindowedConvolution(nn.Conv2d):
    """A convolution of tokens (B, H, W, C) over windows of 3 x 3."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C)."""
        return super().forward(x.movedim(3, 1)).movedim(1, 3)


def windowed_convolution() -> Edit:
    """Put a convolution of the same window in the place of each outlook attention."""

    def build(module: Any) -> nn.Module:
        width = module.v.in_features
        return WindowedConvolution(width, width, module.kernel_size, padding=module.padding)

    def edit(model: nn.Module) -> nn.Module:
        return replace_modules(
            model, lambda _name, module: isinstance(module, OutlookAttention), build, what="outlook attention"
        )

    return edit


def run(ctx: Context) -> Verdict:
    """Train a teacher, then every arm on every seed."""
    index = ctx.index("digits" if ctx.quick else "fashion")
    epochs, before = (n / len(index.rows("train")) for n in ((64, 128) if ctx.quick else (PASSES, TEACHER_PASSES)))
    teacher, path = ctx.teacher(index, {**TEACHER, "train.epochs": before})
    # Without places' labels, the head for places, which answers in evaluation too, has nothing to learn from.
    alone = {**NET, "use_aux_head": False}
    convolved = [{"name": "vitrail.checks.volo:windowed_convolution"}]
    method = "volo:TokenLabelling"
    image = {"teacher": path, "weight": 0.0, "mix_token": 0.0, "class_target": "both"}
    settings: dict[str, dict[str, Any]] = {
        "outlook": {"model.options": alone},
        "convolution": {"model.options": alone, "model.edits": convolved},
        "token labels": {"model.options": NET, "method.name": method, "method.options": {"teacher": path}},
        "image labels": {"model.options": alone, "method.name": method, "method.options": image},
    }
    arms = {
        name: [
            ctx.train(
                index,
                name.replace(" ", "-"),
                seed,
                {"model.name": "volo_nano", "train.batch_size": 32, "train.epochs": epochs, **own},
            )
            for seed in ctx.seeds
        ]
        for name, own in settings.items()
    }
    top1 = {name: [arm.top1 for arm in trained] for name, trained in arms.items()}

    def beats(ours: str, against: str, claim: str) -> Finding:
        pair = {name: top1[name] for name in (ours, against)}
        return paired(claim, "top-1 accuracy, held-out images", pair, ours=ours, against=against)

    findings = [
        beats(
            "outlook",
            "convolution",
            "With outlook attention in its first stage a net is more accurate than with a convolution of the same "
            "window.",
        ),
        beats(
            "token labels",
            "outlook",
            "Trained by token labelling it is more accurate than on the labels of images alone.",
        ),
        beats(
            "token labels",
            "image labels",
            "Labels of tokens teach more than the same teacher's answer for the whole image.",
        ),
    ]
    notes = [
        f"{len(index.rows('train'))} training images; each arm sees {epochs:.3g} epochs of them",
        f"one teacher, a residual network of top-1 {teacher.top1:.1%}, for all seeds",
        "token labels come with MixToken and the net's second head, as published; the other arms have neither",
    ]
    costs = [arm_cost(name, arms[name][0]) for name in ("outlook", "convolution")]
    return Verdict(findings, notes, {"costs": costs})
