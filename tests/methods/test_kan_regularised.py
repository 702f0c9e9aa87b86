import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.layers.kan_layers import BottleneckKANExperts, KANConv, imbalance
from vitrail.methods.supervised.kan_regularised import KANRegularised


def net(**experts):
    torch.manual_seed(0)
    layers = [KANConv(3, 4, 3), BottleneckKANExperts(4, 4, 3, experts=3, top_k=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


BATCH = {"image": torch.randn(6, 3, 9, 9), "target": torch.arange(6) % 5}


def test_the_loss_is_the_sum_of_its_terms():
    factors = {"activation_l1": 0.3, "activation_l2": 0.2, "weight_l1": 1e-3, "balance": 0.5}
    model = net().eval()
    terms = KANRegularised(model, smoothing=0.0, **factors)(BATCH)
    first = model[0](BATCH["image"])
    second = model[1](first)
    expected = {
        "activation_l1": first.abs().mean() + second.abs().mean(),
        "activation_l2": (first**2).mean() + (second**2).mean(),
        "weight_l1": sum(p.abs().sum() for layer in model[:2] for p in layer.parameters()),
        "balance": imbalance(*model[1].router(model[1].inner_proj(first))),
        "supervised": nn.functional.cross_entropy(model(BATCH["image"]), BATCH["target"]),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach())
    total = expected["supervised"] + sum(factors[name] * expected[name] for name in factors)
    torch.testing.assert_close(terms["loss"], total)
    total.backward()
    slopes = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    terms["loss"].backward()
    for slope, p in zip(slopes, (p for p in model.parameters() if p.grad is not None)):
        torch.testing.assert_close(p.grad, slope)
    assert not any(m._forward_hooks for m in model.modules())


def test_what_it_cannot_train_is_refused():
    with pytest.raises(InputError, match="Kolmogorov-Arnold layers"):
        KANRegularised(nn.Linear(2, 2))
    with pytest.raises(InputError, match="activation_l2 = -1"):
        KANRegularised(net(), activation_l2=-1)
