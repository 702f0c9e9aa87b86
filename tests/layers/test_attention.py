import math

import pytest
import torch
import torch.nn.functional as F

from vitrail.errors import InputError
from vitrail.layers.attention import ATTENTION_FORMS, attention


def slow_attention(query, key, value, mask, causal, scale):
    """Loop over every query, from section 3.2.1 of the paper."""
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                seen = range(i + 1) if causal else range(key.shape[2])
                scores = [float(query[b, h, i] @ key[b, h, j]) * scale for j in seen]
                if mask is not None and mask.dtype == torch.bool:
                    scores = [s if mask[i, j] else -math.inf for j, s in zip(seen, scores)]
                elif mask is not None:
                    scores = [s + float(mask[i, j]) for j, s in zip(seen, scores)]
                weights = torch.tensor(scores, dtype=query.dtype).softmax(0)
                out[b, h, i] = sum(w * value[b, h, j] for j, w in zip(seen, weights))
    return out


@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize("case", ["none", "float", "bool", "causal", "scale"])
def test_forms_equal_a_slow_loop(form, case):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    masks = {"float": torch.randn(5, 5), "bool": torch.rand(5, 5) + torch.eye(5) > 0.5}
    mask, causal, scale = masks.get(case), case == "causal", 0.3 if case == "scale" else None
    got = attention(query, key, value, mask, is_causal=causal, scale=scale, form=form)
    want = slow_attention(
        query.double(), key.double(), value.double(), mask, causal, 4**-0.5 if scale is None else scale
    )
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["plain", "fused_fp32"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_gradients_equal_fp64(form, dtype, tolerance):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 17, 8).to(dtype) for _ in range(3)]
    grad = torch.randn(2, 3, 17, 8)
    got = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attention(*got, form=form)
    assert out.dtype == dtype
    out.backward(grad.to(dtype))
    want = [tensor.double().requires_grad_() for tensor in tensors]
    F.scaled_dot_product_attention(*want).backward(grad.double())
    for a, b in zip(got, want):
        assert (a.grad.double() - b.grad).abs().max() <= tolerance * b.grad.abs().max()


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    query = torch.zeros(1, 1, 2000, 4)
    value = torch.ones(1, 1, 2000, 4)
    out = attention(query, query, value, dropout_p=0.5, form="plain")
    assert abs(out.mean() - 1) < 0.02
    assert out.std() > 0


def test_unknown_form_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'plain'"):
        attention(*[torch.zeros(1, 1, 2, 2)] * 3, form="plane")
