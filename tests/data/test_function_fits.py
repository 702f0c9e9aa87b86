import pytest
import torch

from vitrail.data.synthetic.function_fits import FUNCTIONS, function_fit
from vitrail.errors import InputError


def test_functions_are_scaled_and_drawn_anew():
    for name, (variables, _) in FUNCTIONS.items():
        x, y = function_fit(name, 2000, seed=3)
        assert x.shape == (2000, variables)
        assert y.shape == (2000, 1)
        assert -1 <= float(x.min()) < -0.9
        assert float(y.std()) == pytest.approx(1, abs=0.1)
        assert torch.equal(x, function_fit(name, 2000, seed=3)[0])
        assert not torch.equal(x, function_fit(name, 2000, seed=4)[0])
    x, y = function_fit("product", 500)
    slope = torch.linalg.lstsq(torch.stack((x[:, 0] * x[:, 1], torch.ones(500)), 1), y).solution
    torch.testing.assert_close(y, (x[:, 0] * x[:, 1])[:, None] * slope[0] + slope[1], rtol=1e-4, atol=1e-5)


def test_another_function_is_refused():
    with pytest.raises(InputError, match="'bessel'"):
        function_fit("besel", 3)
