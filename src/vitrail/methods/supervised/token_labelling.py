"""Token labelling: every place of an image has a label of its own, which a teacher gives, and MixToken.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (NeurIPS 2021), arXiv
2104.10858, and the authors' code (zihangJiang/TokenLabeling); VOLO (arXiv 2106.13112) and UniFormer are trained with
it. The teacher's classifier is applied at each place of its last feature map, and a further head of the student learns
these answers at the same places. MixToken is CutMix between the embedded patches of two images, in place of their
pixels: each patch, and its label, belongs to one image alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torchvision.ops import roi_align

from vitrail.errors import InputError
from vitrail.methods.distill.teacher import TaughtMethod
from vitrail.methods.method import Batch, one_hot_targets

Box = tuple[int, int, int, int]
"""First row and column, and those behind the last."""
CLASS_TARGETS = ("label", "teacher", "both")
STEMS = ("patch_embed", "stem", "maxpool", "conv_stem", "stages.0.embed", "stages.0.downsample")
"""Where timm's nets and ours embed patches."""


# ---- labels


def token_labels(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the label of each token: the softmax of a map of class scores, brought to the tokens' grid.

    The map is averaged or interpolated as the published code cuts labels out of a stored map, with the whole of it cut.

    Args:
        scores: logits at each place (B, K, H, W), any floating type; computed in float32 at least.
        grid: rows and columns of tokens, h and w.

    Returns:
        Probabilities (B, h, w, K).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    height, width = scores.shape[2:]
    if (height, width) != tuple(grid):
        # Boxes from -0.5: roi_align counts from the middle of the first place.
        corners = scores.new_tensor([-0.5, -0.5, width - 0.5, height - 0.5]).expand(len(scores), 4)
        numbers = torch.arange(len(scores), device=scores.device, dtype=scores.dtype)[:, None]
        scores = roi_align(scores, torch.cat((numbers, corners), 1), grid)
    return scores.movedim(1, -1).softmax(-1)


def class_labels(target: Tensor, scores: Tensor, kind: str = "label") -> Tensor:
    """Return the label of each image, (B, K).

    Args:
        target: class numbers (B,) or probabilities (B, K).
        scores: the teacher's logits at each place (B, K, H, W).
        kind: ``"label"``, the target, as in the paper; ``"teacher"``, the softmax of the mean of the scores, as in the
            published code; ``"both"``, the teacher's with a share of 0.5 where it names the target's class and else of
            0.9, and the target: as in the published code with ``--ground-truth``.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    truth = one_hot_targets(target, scores.shape[1]).to(scores)
    if kind == "label":
        return truth
    answer = scores.mean((2, 3)).softmax(1)
    if kind == "teacher":
        return answer
    agree = answer.argmax(1) == truth.argmax(1)
    share = torch.where(agree, 0.5, 0.9).to(answer)[:, None]
    return share * answer + (1 - share) * truth


def token_labelling_losses(
    logits: Tensor,
    token_logits: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    box: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of images and that of their tokens, each a mean; published: the first + 0.5 the second.

    Args:
        logits: of images (B, K), any floating type; the losses are computed in float32 at least.
        token_logits: of their tokens (B, h, w, K).
        target: probabilities (B, K), of images before they were mixed.
        labels: probabilities (B, h, w, K), of images before they were mixed.
        smoothing: share of all labels that is spread evenly over all classes, in [0, 1).
        box: of tokens that come from the image as far from the end of the batch as this one is from its beginning.

    Raises:
        InputError: shapes that do not go together.
    """
    fits = logits.shape == target.shape and token_logits.shape == labels.shape and labels.ndim == 4
    if not fits or target.shape != (labels.shape[0], labels.shape[3]):
        shapes = ", ".join(str(tuple(each.shape)) for each in (logits, token_logits, target, labels))
        raise InputError(
            f"{shapes} do not go together: give logits (B, K) and (B, h, w, K), and probabilities of the same shapes"
        )
    if box is not None:
        top, left, bottom, right = box
        share = 1 - (bottom - top) * (right - left) / (labels.shape[1] * labels.shape[2])
        target = share * target + (1 - share) * target.flip(0)
        labels = mixed(labels, box)
    return _cross_entropy(logits, target, smoothing), _cross_entropy(token_logits, labels, smoothing)


def _cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -((1 - smoothing) * (target.to(log_p) * log_p).sum(-1) + smoothing * log_p.mean(-1)).mean()


# ---- MixToken


def draw_box(grid: tuple[int, int], alpha: float, rng: np.random.Generator) -> Box:
    """Return the box of CutMix on a grid of tokens, cut off at the border.

    Its sides are sqrt(1 - lambda) of the grid's, lambda from Beta(alpha, alpha), and its centre is any token's.
    """
    cut = (1 - rng.beta(alpha, alpha)) ** 0.5
    sides = []
    for size in grid:
        side, centre = int(size * cut), int(rng.integers(size))
        # As in timm: the published box has no room for the middle of an odd side, and is empty on the smallest grids.
        sides.append((max(centre - side // 2, 0), min(centre + (side + 1) // 2, size)))
    (top, bottom), (left, right) = sides
    return top, left, bottom, right


def mixed(x: Tensor, box: Box, view: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Return ``x`` with what is inside the box taken from the batch in reverse order.

    Args:
        x: (B, h, w, C), or another shape of which ``view`` makes it, as a view.
        box: rows and columns.
        view: to a grid.
    """
    top, left, bottom, right = box
    out = x.clone()
    view(out)[:, top:bottom, left:right] = view(x)[:, top:bottom, left:right].flip(0)
    return out


def on_finer(box: Box, grid: tuple[int, int], finer: tuple[int, int]) -> Box:
    """Return the same box on the grid of patches, of which each place of ``grid`` has as many.

    Sides that were rounded go with the last place.
    """
    edges = []
    for axis in (0, 1):
        step = round(finer[axis] / grid[axis])
        edges.append([finer[axis] if at == grid[axis] else min(at * step, finer[axis]) for at in box[axis::2]])
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


# ---- what nets give for places


def on_grid(x: Tensor, size: tuple[int, int], *, prefix: int = 0, channels_last: bool = False) -> Tensor:
    """Return patches or features as a grid (B, h, w, C): a view, which may be written to.

    Args:
        x: tokens (B, prefix + h w, C), or a map (B, C, h, w) or (B, h, w, C), told apart by the shape of the images
            where it can be.
        size: height and width of the images.
        prefix: tokens in front that are no places.
        channels_last: takes a map for (B, h, w, C), whatever its shape.

    Raises:
        InputError: not one map or one sequence of tokens, or a number of tokens that fills no grid of this aspect.
    """
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        given = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(
            f"token labelling needs one (B, N, C), (B, C, H, W) or (B, H, W, C), and the model gives {given}: use a "
            "model with one grid of tokens"
        )
    if x.ndim == 3:
        places = x.shape[1] - prefix
        rows = max(1, round((places * size[0] / size[1]) ** 0.5))
        if places < 1 or places % rows:
            raise InputError(
                f"the model gives {x.shape[1]} tokens, {prefix} of them in front, for images of {size[0]} x {size[1]}, "
                "and they fill no grid of this shape: use square images, or a model that gives a map of features"
            )
        return x[:, prefix:].unflatten(1, (rows, places // rows))
    channels_last = channels_last or _unlike(x.shape[1:3], size) < _unlike(x.shape[2:], size)
    return x if channels_last else x.movedim(1, -1)


def _unlike(sides: torch.Size, size: tuple[int, int]) -> float:
    """Return how far the aspect of a grid is from that of the images."""
    return abs(math.log(size[0] * sides[1] / (size[1] * sides[0])))


def prefix_of(model: nn.Module) -> int:
    """Return the number of tokens that a model puts before those of the places.

    Raises:
        InputError: it has a class token that stands elsewhere.
    """
    has_token = getattr(model, "cls_token", None) is not None
    number = int(getattr(model, "num_prefix_tokens", has_token))
    if has_token and not number:
        raise InputError(
            f"token labelling needs class tokens in front of the places, and {type(model).__name__} has one elsewhere: "
            "build the model without a class token, or with one in front"
        )
    return number


def features_on_grid(model: nn.Module, features: Any, size: tuple[int, int]) -> Tensor:
    """Return what ``forward_features`` gave for images of ``size`` as (B, h, w, C)."""
    last = str(getattr(model, "output_fmt", "")) == "NHWC"
    return on_grid(features, size, prefix=prefix_of(model), channels_last=last)


def place_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Return a classifier's logits at each place of its last feature map, (B, K, h, w).

    Each place goes alone through the classifier and all that is before it, as if it were the whole map. A net with an
    ``aux_head``, which was itself trained for places, answers by that, as published.

    Args:
        model: with timm's ``forward_features`` and ``forward_head``.
        images: (B, 3, H, W).
    """
    surface: Any = model
    features = surface.forward_features(images)
    size = (images.shape[2], images.shape[3])
    grid = features_on_grid(model, features, size)  # (B, h, w, C)
    if getattr(model, "aux_head", None) is not None:
        scores = surface.aux_head(grid)
    else:
        places = grid.flatten(0, 2)[:, None]  # (B h w, 1, C)
        if features.ndim == 3:
            # The token stands for those in front, too, so that any pooling returns it.
            places = places.expand(-1, 1 + prefix_of(model), -1)
        elif grid is features:
            places = places[:, None]  # (B h w, 1, 1, C)
        else:
            places = places.mT[..., None]  # (B h w, C, 1, 1)
        scores = surface.forward_head(places).unflatten(0, grid.shape[:3])
    return scores.movedim(-1, 1)


# ---- the method


class TokenLabelling(TaughtMethod):
    """Train ``model`` on the labels of images, and on those that a teacher gives to each of their places.

    The student's ``aux_head`` learns the places' labels if it has one, as timm's VOLO; in evaluation such a net adds
    half of the places' largest logits to its answer. For other nets a linear layer learns them, which is trained
    along and does not ship.

    Args:
        model: the student, whose ``forward_features`` gives (B, N, C), (B, C, H, W) or (B, H, W, C).
        teacher: a classifier of the same classes with such features; in a recipe, the path of its run folder.
        weight: of the places' loss, from 0; published: 0.5.
        mix_token: alpha of MixToken's Beta distribution, from 0, which is off; published: 1.
        class_target: what the image's label is: one of ``CLASS_TARGETS``, of which ``class_labels`` tells.
        smoothing: label smoothing of images and places, in [0, 1); published: 0.1.
        patches: the module whose output MixToken mixes; None takes the first of ``STEMS`` that there is.
        multilabel: refused, as the loss is of one label per image.

    Raises:
        InputError: an argument out of range, several labels per image, no teacher, or a model without these features.

    Example:
        vitrail fit --set model.name=volo_nano --set method.name=volo:TokenLabelling
        --set method.options.teacher=runs/teacher
    """

    seed: Tensor
    batches: Tensor

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        weight: float = 0.5,
        mix_token: float = 1.0,
        class_target: str = "label",
        smoothing: float = 0.1,
        patches: str | None = None,
        multilabel: bool = False,
    ) -> None:
        super().__init__(model, teacher, otherwise="supervised")
        if multilabel:
            raise InputError(
                "TokenLabelling is for one label per image, and these data have several: use method.name='supervised'"
            )
        for name, value in (("weight", weight), ("mix_token", mix_token)):
            if not (isinstance(value, int | float) and 0 <= value < float("inf")):
                raise InputError(f"method.options.{name} = {value!r} is not allowed: give a number from 0")
        if not (isinstance(smoothing, int | float) and 0 <= smoothing < 1):
            raise InputError(f"method.options.smoothing = {smoothing!r} is not allowed: give a number in [0, 1)")
        if class_target not in CLASS_TARGETS:
            raise InputError(
                f"method.options.class_target = {class_target!r} is not allowed: give one of {', '.join(CLASS_TARGETS)}"
            )
        for role, net in (("student", model), ("teacher", self.teacher)):
            missing = [name for name in ("forward_features", "forward_head") if not hasattr(net, name)]
            if missing:
                raise InputError(
                    f"TokenLabelling: the {role}, {type(net).__name__}, has no {missing[0]}: use a model of timm or "
                    "Vitrail"
                )
        self.weight, self.mix_token, self.smoothing = weight, mix_token, smoothing
        self.class_target = class_target
        self.patches = _stem(model, patches) if mix_token else ""
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self.token_head: nn.Linear | None = None
        if getattr(model, "aux_head", None) is None:
            surface: Any = model
            place = next(model.parameters())
            self.token_head = nn.Linear(surface.num_features, surface.num_classes, device=place.device)
            trunc_normal_(self.token_head.weight, std=0.02)
            nn.init.zeros_(self.token_head.bias)
        # In the state, so that a run that was interrupted goes on with the boxes that it would have had.
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its parts ``supervised`` and ``tokens`` for ``image`` (B, 3, H, W) and ``target``."""
        images = batch["image"]
        size = (images.shape[2], images.shape[3])
        with torch.no_grad():
            scores = place_scores(self.teacher, images)
        box = self._box(images) if self.mix_token else None
        model: Any = self.model
        features = self._features(images, box)
        grid = features_on_grid(model, features, size)
        if self.token_head is None:
            # Such a net's own head adds the places' answers to the image's, which are apart in training.
            logits, tokens = model.get_classifier()(model.forward_head(features, pre_logits=True)), model.aux_head(grid)
        else:
            logits, tokens = model.forward_head(features), self.token_head(grid)
        target = class_labels(batch["target"], scores, self.class_target)
        labels = token_labels(scores, (tokens.shape[1], tokens.shape[2]))
        supervised, places = token_labelling_losses(logits, tokens, target, labels, smoothing=self.smoothing, box=box)
        loss = supervised + self.weight * places
        return {"loss": loss, "supervised": supervised.detach(), "tokens": places.detach()}

    def after_step(self) -> None:
        """Go on to another box."""
        self.batches += 1

    def _box(self, images: Tensor) -> Box:
        """Return the box of this batch, on the grid of the last features."""
        size = (images.shape[2], images.shape[3])
        if size not in self._grids:
            # The box lies on whole places of the last features, and has to be known before there are any.
            modes = [(module, module.training) for module in self.model.modules()]
            self.model.eval()
            with torch.no_grad():
                features = self._features(images[:1], None)
            for module, mode in modes:
                module.training = mode
            grid = features_on_grid(self.model, features, size)
            self._grids[size] = (grid.shape[1], grid.shape[2])
        rng = np.random.default_rng((int(self.seed), int(self.batches)))
        return draw_box(self._grids[size], self.mix_token, rng)

    def _features(self, images: Tensor, box: Box | None) -> Any:
        """Return the last features of images whose patches inside the box are mixed."""
        surface: Any = self.model
        if box is None:
            return surface.forward_features(images)
        size = (images.shape[2], images.shape[3])
        met = []

        def mix(module: nn.Module, inputs: Any, out: Any) -> Any:
            met.append(True)
            patches, *more = out if isinstance(out, tuple) else (out,)  # timm's XCiT gives their number along
            last = "NHWC" in str(getattr(module, "output_fmt", ""))
            grid = on_grid(patches, size, channels_last=last)
            finer = on_finer(box, self._grids[size], (grid.shape[1], grid.shape[2]))
            mixture = mixed(patches, finer, lambda x: on_grid(x, size, channels_last=last))
            return (mixture, *more) if more else mixture

        # The hook lives for this call only, so that copies of the model do not carry it.
        hook = self.model.get_submodule(self.patches).register_forward_hook(mix)
        try:
            features = surface.forward_features(images)
        finally:
            hook.remove()
        if not met:
            raise InputError(
                f"TokenLabelling: {type(self.model).__name__} went past its layer {self.patches!r} in training: name "
                "another in method.options.patches, or set method.options.mix_token=0"
            )
        return features


def _stem(model: nn.Module, name: str | None) -> str:
    """Return the name of the module that embeds patches."""
    known = dict(model.named_modules())
    found = [each for each in STEMS if each in known] if name is None else [name] if name in known else []
    if not found:
        wanted = f"{name!r}" if name else ", ".join(STEMS)
        children = ", ".join(each for each, _ in model.named_children())
        raise InputError(
            f"TokenLabelling: {type(model).__name__} has no {wanted}, and MixToken needs the module that embeds "
            f"patches: name it in method.options.patches, of {children}, or set method.options.mix_token=0"
        )
    return found[0]
