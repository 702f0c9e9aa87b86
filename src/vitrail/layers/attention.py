"""Scaled dot-product attention in three equal forms, for training on CPUs.

The mathematics is that of Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1. Which form is fastest
depends on the processor, the precision and the number of tokens: torch's fused kernel never writes the (N, N) scores to
memory, but at the short sequences of small images its backward in bfloat16 is several times slower than the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import unknown

ATTENTION_FORMS = ("fused", "plain", "fused_fp32")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    form: str = "plain",
) -> Tensor:
    """Return softmax(query key^T * scale + mask) value, as ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: (..., N, D).
        key: (..., M, D).
        value: (..., M, E).
        attn_mask: broadcastable to (..., N, M); booleans say what may be attended to, floats are added to the scores.
        dropout_p: share of the attention weights that is dropped, in [0, 1).
        is_causal: query i attends to keys 0 to i only; excludes ``attn_mask``.
        scale: factor of the scores; None is 1 / sqrt(D).
        form: ``"fused"`` (torch's), ``"plain"`` (matrix products and a softmax), ``"fused_fp32"`` (torch's, computed
            in float32 and cast back).

    Returns:
        (..., N, E), in the type of ``query``.

    Raises:
        InputError: no such form.
    """
    if form == "fused":
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if form == "fused_fp32":
        mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        with torch.autocast(query.device.type, enabled=False):
            wide = F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), mask, dropout_p, is_causal, scale=scale
            )
        return wide.to(query.dtype)
    if form != "plain":
        raise unknown("attention form", form, ATTENTION_FORMS)
    # Scaling the query, and not the scores, touches D numbers per token where the scores have M.
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)  # (..., N, M)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value
