"""ShuffleMamba: the nets whose training the stochastic layer-wise shuffle was made for, of up to 340 M parameters.

Huang et al., "Stochastic Layer-Wise Shuffle: A Good Practice to Improve Vision Mamba Training" (2024; ICML 2025), arXiv
2408.17081, and the authors' code (huangzizheng01/ShuffleMamba). They are Vim with the class token first and with first
weights of their own; the shuffle is an edit, ``edits/layer_shuffle.py``, which these nets know nothing of.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from vitrail.models.vim import NANO, Vim, create_vim, vim_cfg, vim_nano_cfg


class ShuffleMamba(Vim):
    """Vim with the class token first, and other first weights.

    Args: as ``Vim``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"class_token": "first", **kwargs})

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the first weights as the authors' code does: of Mamba's own, only the rates of decay are left.

        All linear layers begin small, the step sizes of both ways at softplus(0), and the class token at zero. What
        leads out of a mixer is drawn as torch draws a linear layer, over the root of the depth.
        """
        super().init_weights()
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("out_proj"):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


# ---- the variants ----------------------------------------------------------------------------------------------------

default_cfgs = generate_default_cfgs(
    {
        "shufflemamba_nano": vim_nano_cfg(),
        "shufflemamba_tiny": vim_cfg(),
        "shufflemamba_small": vim_cfg(),
        "shufflemamba_middle": vim_cfg(),
        "shufflemamba_base": vim_cfg(),
        "shufflemamba_large_40": vim_cfg(),
        "shufflemamba_large": vim_cfg(),
    }
)


@register_model
def shufflemamba_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """0.3 M parameters, for images of 16 to 64 pixels; ours, not the paper's."""
    return create_vim(ShuffleMamba, "shufflemamba_nano", pretrained, **{**NANO, **kwargs})


@register_model
def shufflemamba_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """7 M parameters."""
    return create_vim(ShuffleMamba, "shufflemamba_tiny", pretrained, **kwargs)


@register_model
def shufflemamba_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """26 M parameters."""
    return create_vim(ShuffleMamba, "shufflemamba_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def shufflemamba_middle(pretrained: bool = False, **kwargs: Any) -> Vim:
    """74 M parameters; layer norms, where the others have root mean squares."""
    own = {"embed_dim": 576, "depth": 32, "norm": "layer"}
    return create_vim(ShuffleMamba, "shufflemamba_middle", pretrained, **{**own, **kwargs})


@register_model
def shufflemamba_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """98 M parameters; trained with stochastic depth 0.5 and a shuffle rate of 0.5."""
    return create_vim(ShuffleMamba, "shufflemamba_base", pretrained, **{"embed_dim": 768, **kwargs})


@register_model
def shufflemamba_large_40(pretrained: bool = False, **kwargs: Any) -> Vim:
    """284 M parameters, in 40 blocks."""
    own = {"embed_dim": 1024, "depth": 40}
    return create_vim(ShuffleMamba, "shufflemamba_large_40", pretrained, **{**own, **kwargs})


@register_model
def shufflemamba_large(pretrained: bool = False, **kwargs: Any) -> Vim:
    """341 M parameters, in 48 blocks."""
    own = {"embed_dim": 1024, "depth": 48}
    return create_vim(ShuffleMamba, "shufflemamba_large", pretrained, **{**own, **kwargs})
