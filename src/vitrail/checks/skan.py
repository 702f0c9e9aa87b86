"""S-KAN against KANs of one space each and an MLP, of as many parameters, on seven functions.

All arms take as many steps on the same points. S-KAN trains with all spaces for half of them, lets its nodes choose,
and goes on pruned: what is measured has the parameters of a KAN of one space.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

from vitrail.app.build import count_parameters
from vitrail.checks.check import Context, Verdict, bounded, paired
from vitrail.data.synthetic.function_fits import FUNCTIONS, function_fit
from vitrail.layers.selectable_kan import DEFAULT, select, selection
from vitrail.models.sconvkan import SKAN

HIDDEN, SIZE = 8, 6
POINTS, STEPS = 1000, 800
LR = 1e-2


def run(ctx: Context) -> Verdict:
    """Compare errors on held-out points, and show what was chosen."""
    steps = 6 if ctx.quick else STEPS
    arms = ("s-kan", *DEFAULT, "mlp")
    errors: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in FUNCTIONS} for arm in arms}
    chosen: list[dict[str, Any]] = []
    sizes: dict[tuple[str, str], int] = {}
    for seed in ctx.seeds:
        for name, (variables, _) in FUNCTIONS.items():
            ctx.tell(f"{name}, seed {seed}")
            data, test = function_fit(name, POINTS, seed=2 * seed + 1), function_fit(name, POINTS, seed=2 * seed + 2)
            for arm in arms:
                torch.manual_seed(seed)
                net = _net(arm, variables)
                _train(net, *data, steps // 2, 1.0, 0.5)
                if arm == "s-kan":
                    select(net)
                    chosen += [{"function": name, "seed": seed, **row} for row in selection(net)]
                    net = reparameterize_model(net)
                _train(net, *data, steps - steps // 2, 0.5, 0.0)
                with torch.no_grad():
                    error = F.mse_loss(net(test[0]), test[1])
                errors[arm][name].append(float(error.sqrt().log10()))
                sizes[arm, name] = count_parameters(net)

    means = {arm: np.mean(list(found.values()), axis=0).tolist() for arm, found in errors.items()}
    best = min(DEFAULT, key=lambda arm: float(np.mean(means[arm])))
    quantity = "log10 of the root mean square error on held-out points, mean over seven functions"

    def beats(other: str, claim: str) -> Any:
        both = {name: means[name] for name in ("s-kan", other)}
        return paired(claim, quantity, both, ours="s-kan", against=other, higher_is_better=False)

    findings = [beats(best, f"S-KAN fits seven functions better than a KAN of the best single space, {best}.")]
    findings += [beats(name, f"S-KAN fits better than a KAN of {name}s alone.") for name in DEFAULT if name != best]
    findings += [beats("mlp", "S-KAN fits better than an MLP of as many parameters.")]
    worst = max(
        float(np.mean(errors["s-kan"][name]) - min(np.mean(errors[space][name]) for space in DEFAULT))
        for name in FUNCTIONS
    )
    findings.append(
        bounded(
            "On no function is S-KAN's error more than twice that of the best single space.",
            "log10 of the ratio of errors, on the worst function",
            worst,
            at_most=float(np.log10(2)),
        )
    )
    rows = [
        {"function": name, "arm": arm, "parameters": sizes[arm, name], "log10_rmse": float(np.mean(errors[arm][name]))}
        for name in FUNCTIONS
        for arm in arms
    ]
    notes = [
        f"Two layers with {HIDDEN} nodes between, {SIZE} functions a space, {POINTS} points, {steps} steps of Adam.",
        "Which seven functions the paper fits could not be read: four are those of the paper of KANs, three are ours.",
        "The best single space is taken by the errors that are compared: that favours it.",
    ]
    return Verdict(findings, notes, {"errors": rows, "chosen": chosen})


def _net(arm: str, variables: int) -> nn.Module:
    """Return the net of an arm; the MLP is as wide as the parameters of a KAN of one space allow."""
    widths = (variables, HIDDEN, 1)
    if arm == "s-kan":
        return SKAN(widths, DEFAULT, SIZE)
    one: nn.Module = SKAN(widths, DEFAULT[:1] if arm == "mlp" else (arm,), SIZE)
    select(one)
    one = reparameterize_model(one)
    if arm != "mlp":
        return one
    # Two hidden layers of w nodes: v w + w + w^2 + w + w + 1 parameters.
    wanted = count_parameters(one)
    width = max(w for w in range(1, 64) if w * (variables + w + 3) + 1 <= wanted)
    layers = [nn.Linear(variables, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
    return nn.Sequential(*layers)


def _train(net: nn.Module, x: Tensor, y: Tensor, steps: int, first: float, last: float) -> None:
    """Take steps on batches of 256, at a rate that falls evenly between two shares of ``LR``."""
    optimizer = torch.optim.Adam(net.parameters(), LR)
    rng = torch.Generator().manual_seed(steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * (first + (last - first) * step / steps)
        rows = torch.randint(len(x), (256,), generator=rng)
        loss = F.mse_loss(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
