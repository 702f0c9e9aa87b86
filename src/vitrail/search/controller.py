"""NASNet's search: a recurrent controller writes an architecture, decision by decision, and learns from its reward.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition" (CVPR 2018), arXiv
1707.07012, appendix A. The controller is an LSTM with a softmax for each decision. It learns by proximal policy
optimisation (Schulman et al., 2017, arXiv 1707.06347) from rewards less a moving average of those before. The
authors' search is not published; what the paper does not say is marked as ours.

Shapes: N architectures of D decisions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrail.errors import InputError
from vitrail.search.strategy import Architecture, Space, Trial


class Controller(nn.Module):
    """An LSTM that at each decision is told the option taken at the one before.

    Args:
        choices: how many options each of the D decisions has.
        hidden: units; published: 100.
    """

    def __init__(self, choices: Sequence[int], hidden: int = 100) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(hidden))
        self.told = nn.ModuleList(nn.Embedding(count, hidden) for count in choices[:-1])
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, count) for count in choices)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the probability of each option taken, and the entropy of each decision, (N, D).

        Args:
            codes: options taken, (N, D).
        """
        _, log_probs, entropies = self._write(len(codes), codes, None)
        return log_probs, entropies

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw architectures; return their codes and logarithms of probabilities, (count, D)."""
        codes, log_probs, _ = self._write(count, None, generator)
        return codes, log_probs

    def _write(
        self, count: int, codes: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        state: tuple[Tensor, Tensor] | None = None
        told = self.start.expand(count, -1)
        taken, log_probs, entropies = [], [], []
        for number, head in enumerate(self.heads):
            state = self.lstm(told, state)
            log_p = head(state[0]).log_softmax(-1)
            if codes is None:
                option = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
            else:
                option = codes[:, number]
            taken.append(option)
            log_probs.append(log_p.gather(1, option[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            if number < len(self.told):
                told = self.told[number](option)
        return torch.stack(taken, 1), torch.stack(log_probs, 1), torch.stack(entropies, 1)


def ppo_loss(log_probs: Tensor, before: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Return the loss of proximal policy optimisation, summed over decisions, a mean over architectures.

    Args:
        log_probs: of the options taken, now, (N, D).
        before: the same when they were drawn, (N, D).
        advantages: reward less baseline of each architecture, (N,).
        clip: how far a probability may go from what it was, as a share of it, before more is of no use; above 0.

    Returns:
        A scalar.
    """
    ratio = (log_probs - before).exp()
    gain = advantages[:, None]
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).sum(1).mean()


class ControllerSearch:
    """Let a controller say what to try, and learn from it.

    Args:
        space: of the architectures.
        seed: of the controller's weights and draws.
        lr: of Adam; published: 3.5e-4, for the rewards of 20,000 architectures. Fewer need more.
        entropy_weight: what a decision gets for staying open; published: 1e-5.
        baseline_decay: of the moving average of rewards, in [0, 1); published: 0.95. It begins, which is ours, at the
            mean of the first rewards.
        clip: of ``ppo_loss``; the paper does not say, 0.2 is that of proximal policy optimisation.
        steps: of Adam on each batch of rewards, 1 or more; ours.
        hidden: units of the controller; published: 100.

    Raises:
        InputError: an argument out of range.

    Example:
        trials = search(ControllerSearch(CellSpace(), lr=0.01), reward, trials=100, batch=10)
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        lr: float = 3.5e-4,
        entropy_weight: float = 1e-5,
        baseline_decay: float = 0.95,
        clip: float = 0.2,
        steps: int = 4,
        hidden: int = 100,
    ) -> None:
        for name, value, fits, allowed in (
            ("lr", lr, lr > 0, "a number above 0"),
            ("entropy_weight", entropy_weight, entropy_weight >= 0, "a number from 0"),
            ("baseline_decay", baseline_decay, 0 <= baseline_decay < 1, "a number in [0, 1)"),
            ("clip", clip, clip > 0, "a number above 0"),
            ("steps", steps, steps >= 1, "1 or more"),
            ("hidden", hidden, hidden >= 1, "1 or more"),
        ):
            if not fits:
                raise InputError(f"the controller's {name} = {value} is not allowed: give {allowed}")
        self.space, self.entropy_weight, self.clip, self.steps = space, entropy_weight, clip, steps
        self.baseline_decay = baseline_decay
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.controller = Controller(space.choices, hidden)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=lr)
        self.baseline: float | None = None
        self._asked: tuple[Tensor, Tensor] | None = None

    def ask(self, count: int) -> list[Architecture]:
        """Return so many architectures, drawn as likely as the controller finds them."""
        self._asked = self.controller.sample(count, self.generator)
        return [self.space.decode(code) for code in self._asked[0].tolist()]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Make what got more than the baseline likelier, and what got less less likely.

        Args:
            trials: what was asked for last, in this order.

        Raises:
            InputError: other architectures.
        """
        told = [list(self.space.encode(trial.architecture)) for trial in trials]
        if self._asked is None or told != self._asked[0].tolist():
            raise InputError(f"the controller was told of {len(told)} architectures that it did not just ask for")
        codes, before = self._asked
        rewards = torch.tensor([trial.reward for trial in trials])
        if self.baseline is None:
            self.baseline = float(rewards.mean())
        advantages = rewards - self.baseline
        for _ in range(self.steps):
            log_probs, entropies = self.controller(codes)
            loss = ppo_loss(log_probs, before, advantages, self.clip)
            loss = loss - self.entropy_weight * entropies.sum(1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        for reward in rewards.tolist():
            self.baseline = self.baseline_decay * self.baseline + (1 - self.baseline_decay) * reward
        self._asked = None
