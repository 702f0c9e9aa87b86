import pytest
import torch
from timm.layers import DropPath

from vitrail.errors import InputError
from vitrail.methods.supervised.scheduled_drop_path import ScheduledDropPath
from vitrail.methods.supervised.supervised import Supervised
from vitrail.models import create_model


def model(rate=0.4):
    torch.manual_seed(0)
    return create_model("nasnet_nano", num_classes=3, filters=2, drop_path_rate=rate)


def rates(net):
    return [module.drop_prob for module in net.modules() if isinstance(module, DropPath)]


def test_rates_grow_with_training_and_with_depth():
    net = model()
    last = rates(net)
    assert sorted(last) == last
    assert (min(last), max(last)) == (pytest.approx(0.4 / 5), pytest.approx(0.4))
    method = ScheduledDropPath(net)
    assert set(rates(net)) == {0}
    for progress in (0.25, 1.0, 0.5, 0.0):
        method.schedule(progress)
        assert rates(net) == pytest.approx([rate * progress for rate in last])


def test_it_is_supervised_training_until_paths_are_dropped():
    batch = {"image": torch.randn(6, 3, 16, 16), "target": torch.tensor([0, 1, 2, 0, 1, 2])}
    options = {"smoothing": 0.2, "class_weights": [1.0, 2.0, 0.5]}
    ours, plain = ScheduledDropPath(model(), **options).train(), Supervised(model(0.0), **options).train()
    plain.model.load_state_dict(ours.model.state_dict())
    assert torch.equal(ours.loss(batch)["loss"], plain.loss(batch)["loss"])
    ours.schedule(1.0)
    assert not torch.equal(ours.loss(batch)["loss"], plain.loss(batch)["loss"])


def test_a_model_without_paths_to_drop_is_refused():
    with pytest.raises(InputError, match=r"NASNet has no stochastic depth.*model\.drop_path_rate"):
        ScheduledDropPath(model(0.0))
