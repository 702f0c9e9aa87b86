"""Parts fold themselves; what only has a part of such a name does not."""

import torch
from torch import nn

from vitrail.deploy.reparameterise import foldable, reparameterise


class Fuses(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.b(self.a(x))

    def fuse(self):
        whole = nn.Linear(3, 3, bias=False)
        whole.weight.data = self.b.weight.data @ self.a.weight.data
        return whole


class InPlace(Fuses):
    fuse = None

    def forward(self, x):
        return self.b(x) if self.a is None else super().forward(x)

    def reparameterize(self):
        self.b.weight.data = self.b.weight.data @ self.a.weight.data
        self.a = None


class HasFuse(nn.Module):
    """As the fusion of CrossViT's branches: a part, not a method."""

    def __init__(self):
        super().__init__()
        self.fuse = nn.Sequential(InPlace())

    def forward(self, x):
        return self.fuse(x)


def test_parts_fold_and_outputs_stay():
    torch.manual_seed(0)
    model = nn.Sequential(Fuses(), nn.Sequential(InPlace(), HasFuse()))
    x = torch.randn(4, 3)
    before = model(x)
    assert [foldable(part) for part in (model[0], model[1][0], model[1][1])] == ["fuse", "reparameterize", None]
    assert reparameterise(model) is model
    torch.testing.assert_close(model(x), before)
    assert isinstance(model[0], nn.Linear)
    assert len(list(model.parameters())) == 3
