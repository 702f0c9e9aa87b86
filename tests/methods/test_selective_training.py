import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.selectable_kan import SelectableKAN
from vitrail.methods.supervised.selective_training import SelectiveTraining
from vitrail.models import create_model
from vitrail.models.sconvkan import SKAN


def test_training_lets_nodes_choose_when_its_share_is_over():
    torch.manual_seed(0)
    method = SelectiveTraining(create_model("sconvkan_nano", num_classes=3), full=0.25)
    layers = [m for m in method.model.modules() if isinstance(m, SelectableKAN)]
    method.schedule(0.2)
    assert all((layer.selected < 0).all() for layer in layers)
    method.schedule(0.25)
    assert all((layer.selected >= 0).all() for layer in layers)
    other = SelectiveTraining(create_model("sconvkan_nano", num_classes=3))
    other.load_state_dict(method.state_dict())
    x = torch.randn(2, 3, 8, 8)
    method.eval(), other.eval()
    torch.testing.assert_close(other.model(x), method.model(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SelectiveTraining(nn.Linear(2, 2)), "has none"),
        (lambda: SelectiveTraining(SKAN((2, 2)), full=2), "full = 2"),
    ],
)
def test_what_it_cannot_train_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
