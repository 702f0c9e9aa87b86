"""Knowledge concentration: many specialists, each of classes of its own, teach one network all of them.

Gao et al., "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN" (2017), arXiv 1711.07607. An
image is shown to the one teacher in whose classes its label is. What the teacher says of its likeliest classes is the
target of these; of all other classes, its own and those of other teachers, it is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.edits.structural_head import StructuralHead
from vitrail.errors import InputError
from vitrail.layers.label_tree import LabelTree, class_groups
from vitrail.layers.large_output import Form, large_loss, sampled_loss, sharded_loss
from vitrail.methods.distill.teacher import TaughtMethod
from vitrail.methods.method import Batch, Method, one_hot_targets

Output = Literal["full", "sharded", "sampled"]


def specialist_targets(logits: Tensor, group: Tensor, top: int, form: Form) -> tuple[Tensor, Tensor]:
    """Return the classes that a specialist thinks likeliest, (B, K), and their shares, (B, K).

    Args:
        logits: of the specialist, (B, N_v).
        group: the numbers of its classes among all, (N_v,).
        top: K at most.
        form: of its probabilities; those of a softmax are scaled to a sum of 1.
    """
    logits = logits.float()
    shares, order = (logits.sigmoid() if form == "sigmoid" else logits.softmax(1)).topk(min(top, len(group)), 1)
    return group[order], shares if form == "sigmoid" else shares / shares.sum(1, keepdim=True)


def own_entropy(shares: Tensor, form: Form) -> Tensor:
    """Return the entropy (B,) of targets (B, K), below which their cross-entropy cannot fall."""
    entropy = -torch.xlogy(shares, shares).sum(1)
    return entropy if form == "softmax" else entropy - torch.xlogy(1 - shares, 1 - shares).sum(1)


class KnowledgeConcentration(TaughtMethod):
    """Train ``model`` on all classes by what a specialist says of each image, of which ``TaughtMethod`` tells.

    Args:
        model: the student; returns logits (B, C).
        teacher: the specialists, or one; in a recipe, the paths of their run folders. Trained by
            ``knowledge_concentration:TreeTraining``, as published, their probabilities are sigmoids.
        groups: the class numbers of each specialist, in the order of its outputs; every class once. None: by the names
            of the classes of its run; of one specialist without names, all classes.
        class_names: names of the student's classes, in their order; a run gives those of its data.
        top: classes of a specialist that are targets, from 1; published: 100.
        form: "sigmoid", as published, or "softmax", of specialists and student alike.
        output: "full" computes all logits at once; "sharded" in parts that are computed again for the gradient: the
            same result in less memory; "sampled" estimates what the other classes cost.
        shard: classes of a part of a linear classifier; a structurally connected head has its groups.
        samples: classes that are drawn for a batch.
        multilabel: the labels are multi-hot: the teacher is the one with most of an image's.

    Raises:
        InputError: an argument out of range, no teacher, classes that are not each taught by one specialist, or a
            classifier that cannot be sharded or sampled.

    Example:
        vitrail fit --set method.name=knowledge_concentration:KnowledgeConcentration \
            --set 'method.options.teacher=["runs/birds", "runs/cars"]'
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        class_names: Sequence[str] | None = None,
        top: int = 100,
        form: Form = "sigmoid",
        output: Output = "full",
        shard: int = 8192,
        samples: int = 4096,
        multilabel: bool = False,
    ) -> None:
        several = list(teacher) if isinstance(teacher, list | tuple | nn.ModuleList) else [teacher]
        whole = bool(several) and all(isinstance(each, nn.Module) and each is not model for each in several)
        joined = nn.ModuleList(each for each in several if isinstance(each, nn.Module)) if whole else None
        super().__init__(model, joined or (model if model in several else None), otherwise="supervised")
        for name, value in (("top", top), ("shard", shard), ("samples", samples)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"method.options.{name} = {value!r} is not allowed: give a whole number from 1")
        for name, word, allowed in (
            ("form", form, ("sigmoid", "softmax")),
            ("output", output, ("full", "sharded", "sampled")),
        ):
            if word not in allowed:
                raise InputError(f"method.options.{name} = {word!r} is not allowed: choose one of {', '.join(allowed)}")
        self.top, self.form, self.output, self.shard, self.samples = top, form, output, shard, samples
        classes = int(getattr(model, "num_classes"))  # noqa: B009 - nn.Module types its attributes as modules
        self.groups = class_groups(_taught(several, groups, class_names, classes), classes)
        if len(self.groups) != len(several):
            raise InputError(f"{len(several)} teachers and {len(self.groups)} groups: give each teacher its classes")
        vertical = torch.empty(classes, dtype=torch.long)
        for v, group in enumerate(self.groups):
            vertical[torch.tensor(group)] = v
        self.register_buffer("vertical", vertical, persistent=False)
        self.multilabel = multilabel
        if output != "full":
            self._classifier()

    vertical: Tensor
    """Of each class, the number of its teacher."""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image`` (B, 3, H, W) and ``target``: the cross-entropy less the teachers' entropy."""
        images = batch["image"]
        places, shares = self.targets(images, self._verticals(batch["target"]))
        terms = self._student(images, places, shares) - own_entropy(shares, self.form)
        return {"loss": terms.mean()}

    @torch.no_grad()
    def targets(self, images: Tensor, verticals: Tensor) -> tuple[Tensor, Tensor]:
        """Return classes and shares (B, K) of images, each as its own teacher says; where K is more, 0 is a share.

        Args:
            images: (B, 3, H, W).
            verticals: the number of each image's teacher, (B,).
        """
        width = min(self.top, max(map(len, self.groups)))
        places = images.new_zeros(len(images), width, dtype=torch.long)
        shares = images.new_zeros(len(images), width, dtype=torch.float32)
        teachers: Any = self.teacher
        for v in verticals.unique().tolist():
            rows = (verticals == v).nonzero()[:, 0]
            group = torch.tensor(self.groups[v], device=images.device)
            found, share = specialist_targets(teachers[v](images[rows]), group, self.top, self.form)
            # Padded by the first class again, which counts for nothing.
            places[rows] = torch.cat((found, found[:, :1].expand(-1, width - found.shape[1])), 1)
            shares[rows] = F.pad(share, (0, width - share.shape[1]))
        return places, shares

    def _verticals(self, target: Tensor) -> Tensor:
        """Return the number of the teacher of each image, (B,)."""
        if target.ndim == 1:
            return self.vertical[target]
        counts = target.new_zeros(len(target), len(self.groups))
        return counts.index_add(1, self.vertical, target).argmax(1)

    def _student(self, images: Tensor, places: Tensor, shares: Tensor) -> Tensor:
        """Return the student's loss of each image, (B,)."""
        if self.output == "full":
            logits = self.model(images)
            return large_loss([lambda: logits], [logits.shape[1]], places, shares, form=self.form)
        surface: Any = self.model
        layer = self._classifier()
        x = surface.forward_head(surface.forward_features(images), pre_logits=True)
        if isinstance(layer, StructuralHead):
            sizes = [len(group) for group in layer.groups]
            return large_loss(layer.parts(x), sizes, layer.place[places], shares, form=self.form)
        if self.output == "sampled":
            return sampled_loss(x, layer.weight, layer.bias, places, shares, samples=self.samples, form=self.form)
        return sharded_loss(x, layer.weight, layer.bias, places, shares, size=self.shard, form=self.form)

    def _classifier(self) -> StructuralHead | nn.Linear:
        surface: Any = self.model
        found = surface.get_classifier() if hasattr(surface, "get_classifier") else None
        if type(found) is nn.Linear or (isinstance(found, StructuralHead) and self.output == "sharded"):
            return found
        raise InputError(
            f"method.options.output = {self.output!r}: the classifier of {type(self.model).__name__} is "
            f"{type(found).__name__}, and a linear one is needed, or a structurally connected one for 'sharded': set "
            "output='full'"
        )


def _taught(
    teachers: Sequence[Any],
    groups: Sequence[Sequence[int]] | None,
    class_names: Sequence[str] | None,
    classes: int,
) -> Sequence[Sequence[int]]:
    """Return the class numbers of each teacher."""
    if groups is not None:
        return groups
    names = [getattr(teacher, "classes", None) for teacher in teachers]
    if class_names is None or not all(names):
        if len(teachers) == 1:
            return [range(classes)]
        raise InputError(
            f"KnowledgeConcentration does not know the classes of its {len(teachers)} teachers: give "
            "method.options.groups, or run folders as teachers"
        )
    number = {name: i for i, name in enumerate(class_names)}
    strange = [name for own in names for name in own or () if name not in number]
    if strange:
        raise InputError(
            f"a teacher knows the class {strange[0]!r}, which the data have not: give data with all classes"
        )
    return [[number[name] for name in own or ()] for own in names]


class TreeTraining(Method):
    """Train ``model`` on labels and on those above them in their tree, each a yes or no: specialists and generalists.

    The loss is the binary cross-entropies of all classes, summed, as published.

    Args:
        model: returns logits (B, C).
        class_names: paths of the classes, such as ``bird/perching bird``; a run gives those of its data. None: no tree.
        multilabel: the labels are multi-hot.

    Raises:
        InputError: a name twice.
    """

    def __init__(self, model: nn.Module, *, class_names: Sequence[str] | None = None, multilabel: bool = False) -> None:
        super().__init__(model)
        self.tree = None if class_names is None else LabelTree(class_names)
        self.multilabel = multilabel

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` for ``image`` (B, 3, H, W) and ``target``."""
        logits, target = self.model(batch["image"]).float(), batch["target"]
        wanted = one_hot_targets(target, logits.shape[1]) if self.tree is None else self.tree.expand(target)
        return {"loss": F.binary_cross_entropy_with_logits(logits, wanted.to(logits), reduction="none").sum(1).mean()}
