import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.positions import resampled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_interpolated_row_by_row_and_column_by_column(dtype):
    torch.manual_seed(0)
    positions = torch.randn(1, 3, 4, 5).to(dtype)
    assert resampled(positions, (3, 4)) is positions
    found = resampled(positions, (6, 2))
    assert (found.shape, found.dtype) == ((1, 6, 2, 5), dtype)
    for channel in range(5):
        plane = F.interpolate(positions[None, ..., channel].float(), (6, 2), mode="bicubic")
        torch.testing.assert_close(found[..., channel], plane[0].to(dtype))
