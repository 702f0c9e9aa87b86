"""Any two edits, on five kinds of network: the second works on what the first left, or says in one line why not."""

import pytest
import torch
from contract import built
from probes import CLASSES, cross_entropy_step, images, unreached, unsettled
from subjects import edits

from vitrail.errors import InputError
from vitrail.models import create_model

SIDE = 32
NETS = {
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}),
    "mobilenetv2": ("mobilenetv2_035", {}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}),
    "vit": ("vit_tiny_patch16_224", {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": SIDE, "window_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)},
    ),
}
EDITS = {subject.name: subject for _, subject in edits()}


def edited(net, *subjects):
    """Return a network with edits made to it, or None if the last of them refused, in one line, then or in its use."""
    name, options = NETS[net]
    torch.manual_seed(0)
    model = create_model(name, num_classes=CLASSES, **options)
    try:
        for subject in subjects:
            fits = subject is not subjects[-1]
            assert subject.edit(model) is model
        with torch.no_grad():
            logits = model.eval()(images(2, SIDE))
    except InputError as error:
        assert "\n" not in str(error)
        assert not fits, "an edit that fits does not fit the second time"
        return None
    assert logits.shape == (2, CLASSES), f"the logits are of shape {logits.shape}"
    assert logits.isfinite().all(), "the logits are not finite"
    return model


def test_every_card_of_an_edit_is_here():
    assert {card.slug for card in built("edit")} <= {card.slug for card, _ in edits()}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("first", EDITS)
def test_an_edit_and_any_after_it(first, net):
    model = edited(net, EDITS[first])
    if model is None:
        return
    try:
        cross_entropy_step(unsettled(model).train(), images(8, SIDE))
    except InputError:  # some act in training alone
        return
    assert not unreached(model), f"no gradient reaches {unreached(model)}"
    for second in EDITS.values():
        edited(net, EDITS[first], second)
