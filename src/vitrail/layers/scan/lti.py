"""State spaces that do not change with time: S4, S4D and S5, over a sequence at once and step by step.

All are x'(t) = A x(t) + B u(t), y(t) = C x(t) + D u(t), sampled at steps of size delta. S4: Gu, Goel and Re,
"Efficiently Modeling Long Sequences with Structured State Spaces" (2022), https://arxiv.org/abs/2111.00396. S4D: Gu,
Gupta, Goel and Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022),
https://arxiv.org/abs/2206.11893. S5: Smith, Warrington and Linderman, "Simplified State Space Layers for Sequence
Modeling" (2023), https://arxiv.org/abs/2208.04933. Parameters have the names and shapes of the published codes
(state-spaces/s4, lindermanlab/S5), so that their weights load.

States come in conjugate pairs, of which one is kept: N / 2 numbers in the place of N, and 2 Re(.) where they leave.
Shapes: B sequences, L steps, H channels, N states. No layer holds L x H x N numbers at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.errors import InputError, unknown

PIECE = 1 << 20
"""Terms of a Cauchy sum that are in memory at a time; a backward pass computes them again."""
LARGEST_B = 2.0
"""At which the published code clips the imaginary part of HiPPO's input matrix."""

# ---- the mathematics -------------------------------------------------------------------------------------------------


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return HiPPO-LegS, A (N, N) and B (N,): the state is what Legendre's polynomials say of all the past."""
    order = np.arange(size)
    scale = np.sqrt(2 * order + 1)
    return -(np.tril(np.outer(scale, scale)) - np.diag(order)), scale


def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return HiPPO-LegS as a normal matrix less one of rank 1: A = V (diag(poles) - P P*) V*.

    Returns:
        poles (N,), in the order of their imaginary parts, P (N,), V* B (N,) and V (N, N).
    """
    A, B = hippo_legs(size)
    P = np.sqrt(np.arange(size) + 0.5)
    normal = A + np.outer(P, P)  # -1/2 and a skew-symmetric matrix
    imaginary, V = np.linalg.eigh(-1j * normal)
    # Eigenvectors have any phase, and clipping B below depends on it: the first entry is real, as LAPACK leaves it.
    V = V * (np.abs(V[0]) / V[0])
    return np.diag(normal).mean() + 1j * imaginary, V.conj().T @ P, V.conj().T @ B, V


def discretise(poles: Tensor, step: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Return log of the poles of a sampled diagonal system, and the factor of its B.

    Args:
        poles: of any shape, complex, none of them 0.
        step: sizes, above 0, of a shape that broadcasts with it.
        method: ``zoh``, for which the input is constant during a step, or ``bilinear``, the trapezoidal rule.

    Raises:
        UnknownName: another method.
    """
    turn = poles * step
    if method == "zoh":
        return turn, (turn.exp() - 1) / poles
    if method == "bilinear":
        return ((1 + turn / 2) / (1 - turn / 2)).log(), step / (1 - turn / 2)
    raise unknown("discretisation", method, ("zoh", "bilinear"), "there are zoh and bilinear")


def powers(logs: Tensor, steps: Tensor) -> Tensor:
    """Return exp(logs * steps) (..., steps) for logs (...): the angle of a late step is right to double precision."""
    return (logs.to(torch.complex128).unsqueeze(-1) * steps).exp().to(logs.dtype)


def vandermonde_kernel(weights: Tensor, logs: Tensor, length: int) -> Tensor:
    """Return K (H, L) with K_l = 2 Re sum_n weights_n exp(l logs_n), for weights and logs (H, N / 2).

    With l = i S + j and S near sqrt(L) this is a product of matrices (L / S, N) and (N, S) for each channel.
    """
    inside = math.isqrt(length - 1) + 1
    steps = torch.arange(inside, device=logs.device)
    fine = powers(logs, steps)  # (H, N, S)
    coarse = weights.unsqueeze(-1) * powers(logs * inside, steps[: -(-length // inside)])
    product = coarse.real.mT @ fine.real - coarse.imag.mT @ fine.imag
    return 2 * product.flatten(1)[:, :length]


def dplr_kernel(poles: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Return the kernel (H, L) of a system diag(poles) - P P* under the bilinear rule, all (H, N / 2), steps of 1.

    C is already C (I - A^L) of the sampled A: values of the kernel's generating function at the roots of unity are then
    Cauchy sums, joined by Woodbury's identity (S4, algorithm 1). Ours are the paper's times 2 / (1 + w), as those have
    no pole at w = -1.
    """
    frequencies = torch.arange(length // 2 + 1, device=poles.device, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(frequencies), -2 * math.pi / length * frequencies)
    now, past = (1 - turn).to(poles.dtype), ((1 + turn) / 2).to(poles.dtype)
    terms = torch.stack((C * B, C * P, P.conj() * B, P.conj() * P), 1)  # (H, 4, N)
    # Of v / (g - a h) and its conjugate pair: 2 (Re(v) g - Re(v a*) h) / (g^2 - 2 Re(a) g h + |a|^2 h^2).
    above = 2 * torch.cat((terms.real, (terms * poles.conj().unsqueeze(1)).real), 1)  # (H, 8, N)
    size = max(1, PIECE // poles.numel())
    found = []
    for g, h in zip(now.split(size), past.split(size), strict=True):
        arguments = (above, 2 * poles.real, poles.abs().square(), g, h)
        if torch.is_grad_enabled():
            found.append(checkpoint(_cauchy, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_cauchy(*arguments))
    out, left, entered, loop = torch.cat(found, -1).unbind(1)  # (H, L / 2 + 1) each
    return torch.fft.irfft(out - past * left * entered / (1 + past * loop), n=length)


def _cauchy(above: Tensor, twice: Tensor, square: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """Return the four sums (H, 4, frequencies)."""
    below = 1 / (g * g - twice.unsqueeze(-1) * (g * h) + square.unsqueeze(-1) * (h * h))  # (H, N, frequencies)
    sums = torch.complex(above @ below.real, above @ below.imag)
    return sums[:, :4] * g - sums[:, 4:] * h


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """Return y (B, H, L) with y_l = sum_k kernel_k x_(l - k), for x (B, H, L) and a kernel (H, L), by Fourier."""
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x, 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length]


def diagonal_scan(logs: Tensor, entering: Tensor, state: Tensor) -> Tensor:
    """Return all states x_l = exp(logs) x_(l-1) + entering_l.

    Chunks of sqrt(L) steps go side by side from a state of zero, then each adds what the state before it has become.

    Args:
        logs: (P,), complex.
        entering: (B, L, P), complex.
        state: x before the first step, (B, P).

    Returns:
        (B, L, P).
    """
    batch, length, size = entering.shape
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)
    left = powers(logs, torch.arange(1, steps + 1, device=logs.device)).T  # (S, P)
    parts = F.pad(entering, (0, 0, 0, chunks * steps - length)).view(batch, chunks, steps, size).unbind(2)
    inside = [parts[0]]
    for part in parts[1:]:
        inside.append(torch.addcmul(part, left[0], inside[-1]))
    before = [state]
    for end in inside[-1].unbind(1)[:-1]:
        before.append(torch.addcmul(end, left[-1], before[-1]))
    states = torch.addcmul(torch.stack(inside, 2), left, torch.stack(before, 1).unsqueeze(2))
    return states.reshape(batch, chunks * steps, size)[:, :length]


# ---- S4 and S4D: each channel a system of its own --------------------------------------------------------------------


Sampled = tuple[Tensor, ...]
"""A sampled system in the form in which it takes steps, computed once for a stream."""


class _SingleInput(nn.Module):
    """H systems with one input, one output and N states each, whose A has a diagonal part."""

    def __init__(
        self, dim: int, d_state: int, poles: np.ndarray, B: np.ndarray, step_min: float, step_max: float
    ) -> None:
        super().__init__()
        _check_sizes(type(self).__name__, dim, d_state, step_min, step_max)
        self.dim, self.d_state = dim, d_state
        every = torch.from_numpy(poles).expand(dim, -1)
        self.inv_dt = nn.Parameter(_log_steps((dim, 1), step_min, step_max))
        self.C = nn.Parameter(_as_real(torch.randn(1, dim, d_state // 2, dtype=torch.cfloat)))
        self.B = nn.Parameter(_as_real(torch.from_numpy(B).expand(1, dim, -1)))
        # Not below 1e-4, as published.
        self.A_real = nn.Parameter((-every.real).clamp(min=1e-4).log().float())
        self.A_imag = nn.Parameter((-every.imag).clamp(min=1e-4).float())
        self.D = nn.Parameter(torch.randn(1, dim))

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return poles, B, C (H, N / 2), complex, and the step sizes (H, 1); single precision or double."""
        real, imaginary, steps = (_at_least_single(x) for x in (self.A_real, self.A_imag, self.inv_dt))
        return torch.complex(-real.exp(), -imaginary), _complex(self.B)[0], _complex(self.C)[0], steps.exp()

    def kernel(self, length: int) -> Tensor:
        """Return the response (H, L) to an impulse."""
        raise NotImplementedError

    def sampled(self) -> Sampled:
        """Return what ``step`` computes with, for many steps with the same weights."""
        raise NotImplementedError

    def _advance(self, sampled: Sampled, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (B, H), without D, and the next state (B, H, N / 2)."""
        raise NotImplementedError

    def initial_state(self, batch: int) -> Tensor:
        """Return the state before the first step, zeros (B, H, N / 2)."""
        C = _complex(self.C)
        return C.new_zeros(batch, self.dim, self.d_state // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (B, L, H) for x (B, L, H), by convolution.

        Raises:
            InputError: an input of another shape.
        """
        _check_input(type(self).__name__, x, ("B", "L", self.dim))
        u = x.to(self._kind()).transpose(1, 2)
        y = causal_convolution(u, self.kernel(x.shape[1])) + self._skip()[:, None] * u
        return y.transpose(1, 2).to(x.dtype)

    def step(self, x: Tensor, state: Tensor, sampled: Sampled | None = None) -> tuple[Tensor, Tensor]:
        """Return y (B, H) and the next state of one step: for a stream, in constant memory.

        Args:
            x: (B, H).
            state: (B, H, N / 2), of ``initial_state`` or of the step before.
            sampled: of ``sampled()``, so that it is not computed at each step.

        Raises:
            InputError: shapes that do not go together.
        """
        name = type(self).__name__
        _check_input(name, x, ("B", self.dim))
        _check_state(name, state, (len(x), self.dim, self.d_state // 2))
        u = x.to(self._kind())
        y, state = self._advance(self.sampled() if sampled is None else sampled, u, state)
        return (y + self._skip() * u).to(x.dtype), state

    def _kind(self) -> torch.dtype:
        return _at_least_single(self.D).dtype

    def _skip(self) -> Tensor:
        return _at_least_single(self.D)[0]


S4D_INITS = ("lin", "inv", "legs", "real")


class S4D(_SingleInput):
    """Diagonal state spaces of one channel each; the kernel is a product with a Vandermonde matrix.

    Args:
        dim: H.
        d_state: N, even.
        init: of the poles. ``lin``: -1/2 + i pi n; ``inv``: -1/2 + i N / pi (N / (2 n + 1) - 1); ``legs``: those of
            HiPPO's normal part, with its B; ``real``: -(n + 1).
        discretisation: ``zoh`` or ``bilinear``.
        step_min, step_max: between which step sizes are drawn, evenly in their logarithm; above 0.

    Raises:
        InputError: sizes or steps that are not allowed.
        UnknownName: another init or discretisation.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        init: str = "lin",
        discretisation: str = "zoh",
        step_min: float = 1e-3,
        step_max: float = 0.1,
    ) -> None:
        if discretisation not in ("zoh", "bilinear"):
            raise unknown("discretisation", discretisation, ("zoh", "bilinear"), "there are zoh and bilinear")
        poles, B = s4d_init(init, d_state)
        super().__init__(dim, d_state, poles, B, step_min, step_max)
        self.discretisation = discretisation

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        poles, B, C, step = self.system()
        logs, factor = discretise(poles, step, self.discretisation)
        return logs, factor * B, C

    def kernel(self, length: int) -> Tensor:
        """Return the response (H, L) to an impulse."""
        logs, B, C = self._discrete()
        return vandermonde_kernel(B * C, logs, length)

    def sampled(self) -> Sampled:
        """Return what ``step`` computes with, for many steps with the same weights."""
        logs, B, C = self._discrete()
        return logs.exp(), B, C

    def _advance(self, sampled: Sampled, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A, B, C = sampled
        state = A * state + B * x.unsqueeze(-1)
        return 2 * (C * state).sum(-1).real, state


def s4d_init(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return poles and B (N / 2,) of an initialisation of S4D.

    Raises:
        UnknownName: not of ``S4D_INITS``.
    """
    order = np.arange(size // 2)
    if name not in S4D_INITS:
        raise unknown("initialisation of S4D", name, S4D_INITS, f"there are {', '.join(S4D_INITS)}")
    if name == "legs":
        poles, _, B, _ = _hippo_half(size)
        return -0.5 + 1j * poles.imag, B
    if name == "real":
        poles = -(1.0 + order) + 0j
    else:
        frequency = np.pi * order if name == "lin" else size / np.pi * (size / (2 * order + 1) - 1)
        poles = -0.5 - 1j * frequency
    return poles, np.ones(size // 2, dtype=np.complex128)


class S4(_SingleInput):
    """State spaces of one channel each whose A is a diagonal and a matrix of rank 1, beginning as HiPPO-LegS.

    What is learnt is C (I - A^L) in the place of C, for the longest L that the layer convolves with; steps have no
    limit. Discretised by the bilinear rule.

    Args:
        dim: H.
        d_state: N, even.
        length: the longest sequence of ``forward``; ``lengthen`` raises it.
        step_min, step_max: between which step sizes are drawn, evenly in their logarithm; above 0.

    Raises:
        InputError: sizes or steps that are not allowed.
    """

    l_kernel: Tensor

    def __init__(
        self, dim: int, d_state: int = 64, length: int = 1024, step_min: float = 1e-3, step_max: float = 0.1
    ) -> None:
        if length < 1:
            raise InputError(f"S4: length = {length} is not allowed: give the longest sequence, 1 step or more")
        poles, P, B, _ = _hippo_half(d_state)
        super().__init__(dim, d_state, poles, B, step_min, step_max)
        self.P = nn.Parameter(_as_real(torch.from_numpy(P).expand(1, dim, -1)))
        self.register_buffer("l_kernel", torch.tensor(0))
        self._attune(length)

    def lengthen(self, length: int) -> None:
        """Let ``forward`` take sequences of up to ``length`` steps; the response does not change, the weights do.

        Raises:
            InputError: shorter than it takes already.
        """
        if length < int(self.l_kernel):
            raise InputError(f"S4: length = {length} is below the present {int(self.l_kernel)}: give more")
        self._attune(length)

    @torch.no_grad()
    def _attune(self, length: int) -> None:
        """Write C (I - A^length) over the present C (I - A^l), in double precision."""
        A, C = self._dense(), self._output()
        new = C - (torch.linalg.matrix_power(A, length).mT @ C.unsqueeze(-1)).squeeze(-1)
        self.C.copy_(torch.view_as_real(new[:, : self.d_state // 2]).unsqueeze(0))
        self.l_kernel.fill_(length)

    def _dense(self) -> Tensor:
        """Return the sampled A (H, N, N), complex128, for both of each conjugate pair."""
        poles, _, _, step = self.system()
        both, P = (torch.cat((x, x.conj()), -1).to(torch.complex128) for x in (poles, _complex(self.P)[0]))
        half = (
            step.to(torch.float64).unsqueeze(-1)
            / 2
            * (torch.diag_embed(both) - P.unsqueeze(-1) * P.conj().unsqueeze(1))
        )
        identity = torch.eye(self.d_state, dtype=half.dtype, device=half.device)
        return torch.linalg.solve(identity - half, identity + half)

    def _output(self) -> Tensor:
        """Return C (H, N), complex128, for both of each conjugate pair."""
        C = _complex(self.C)[0].to(torch.complex128)
        C = torch.cat((C, C.conj()), -1)
        length = int(self.l_kernel)
        if not length:
            return C
        gone = torch.linalg.matrix_power(self._dense(), length).mT
        identity = torch.eye(self.d_state, dtype=C.dtype, device=C.device)
        return torch.linalg.solve(identity - gone, C.unsqueeze(-1)).squeeze(-1)

    def kernel(self, length: int) -> Tensor:
        """Return the response (H, L) to an impulse.

        Raises:
            InputError: a length above that of the layer.
        """
        longest = int(self.l_kernel)
        if length > longest:
            raise InputError(
                f"S4: a sequence of {length} steps, and the layer takes {longest}: call lengthen({length})"
            )
        poles, B, C, step = self.system()
        P = _complex(self.P)[0] * step.sqrt()
        return dplr_kernel(poles * step, P, B * step, C, longest)[:, :length]

    def sampled(self) -> Sampled:
        """Return what ``step`` computes with, for many steps with the same weights."""
        poles, B, C, step = self.system()
        P = _complex(self.P)[0]
        C = self._output()[:, : self.d_state // 2].to(C.dtype)
        D = 1 / (2 / step - poles)
        gain = 1 / (1 + _both(P.conj() * D * P))  # (H,)
        return 2 / step + poles, D, P, gain, 2 * B, C

    def _advance(self, sampled: Sampled, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        # A1 (A0 x + 2 B u) with A0 = 2 / delta + A and A1 = (2 / delta - A)^-1, which is again of rank 1 (S4, C.2).
        E, D, P, gain, B, C = sampled
        inside = E * state - P * _both(P.conj() * state).unsqueeze(-1) + B * x.unsqueeze(-1)
        inside = D * inside
        state = inside - D * P * (gain * _both(P.conj() * inside)).unsqueeze(-1)
        return _both(C * state), state


def _both(x: Tensor) -> Tensor:
    """Return the sum over the states, those that are not kept among them."""
    return 2 * x.real.sum(-1)


def _hippo_half(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return poles, P, B, clipped, and V of HiPPO's normal form, one of each conjugate pair: imaginary part below 0."""
    poles, P, B, V = (x[..., : size // 2] for x in hippo_normal(size))
    return poles, P, B.real + 1j * B.imag.clip(-LARGEST_B, LARGEST_B), V


# ---- S5: one system for all channels ---------------------------------------------------------------------------------


class S5(nn.Module):
    """One diagonal state space whose inputs and outputs are all channels, computed by a scan.

    Args:
        dim: H.
        d_state: states, N in all; even.
        blocks: of A, each of which begins as the normal part of a HiPPO-LegS matrix; N / blocks is even.
        discretisation: ``zoh`` or ``bilinear``.
        bidirectional: scan a second time from the end, with an output matrix of its own; then there are no steps.
        clip: keep the poles' real parts below -1e-4, for sequences without end.
        step_min, step_max: between which step sizes are drawn, one for each state, evenly in their logarithm; above 0.

    Raises:
        InputError: sizes or steps that are not allowed.
        UnknownName: another discretisation.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        blocks: int = 1,
        discretisation: str = "zoh",
        bidirectional: bool = False,
        clip: bool = False,
        step_min: float = 1e-3,
        step_max: float = 0.1,
    ) -> None:
        super().__init__()
        _check_sizes("S5", dim, d_state, step_min, step_max)
        if blocks < 1 or d_state % (2 * blocks):
            raise InputError(
                f"S5: blocks = {blocks} do not cut {d_state} states into even parts: give a divisor of {d_state // 2}"
            )
        if discretisation not in ("zoh", "bilinear"):
            raise unknown("discretisation", discretisation, ("zoh", "bilinear"), "there are zoh and bilinear")
        self.dim, self.d_state = dim, d_state
        self.discretisation, self.bidirectional, self.clip = discretisation, bidirectional, clip
        half = d_state // blocks // 2
        poles, _, _, V = (x[..., :half] for x in hippo_normal(d_state // blocks))
        self.Lambda_re = nn.Parameter(torch.from_numpy(poles.real).float().repeat(blocks))
        self.Lambda_im = nn.Parameter(torch.from_numpy(poles.imag).float().repeat(blocks))
        basis = torch.block_diag(*[torch.from_numpy(V)] * blocks).to(torch.cfloat)  # (N, N / 2)
        self.B = nn.Parameter(_as_real(basis.mH @ _lecun(d_state, dim, fan_in=d_state).to(torch.cfloat)))
        for name in ("C1", "C2") if bidirectional else ("C",):
            C = torch.complex(*_lecun(2, dim, d_state, fan_in=d_state))
            self.register_parameter(name, nn.Parameter(_as_real(C @ basis)))
        self.D = nn.Parameter(torch.randn(dim))
        self.log_step = nn.Parameter(_log_steps((d_state // 2, 1), step_min, step_max))

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log of the sampled poles (N / 2,), B (N / 2, H) and C (H, N / 2), or (H, N) of both directions."""
        real = _at_least_single(self.Lambda_re)
        poles = torch.complex(real.clamp(max=-1e-4) if self.clip else real, _at_least_single(self.Lambda_im))
        logs, factor = discretise(poles, _at_least_single(self.log_step)[:, 0].exp(), self.discretisation)
        names = ("C1", "C2") if self.bidirectional else ("C",)
        return (
            logs,
            factor.unsqueeze(-1) * _complex(self.B),
            torch.cat([_complex(self.get_parameter(name)) for name in names], -1),
        )

    def initial_state(self, batch: int) -> Tensor:
        """Return the state before the first step, zeros (B, N / 2)."""
        return _complex(self.B).new_zeros(batch, self.d_state // 2)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y (B, L, H) for x (B, L, H), and the state after the last step (B, N / 2).

        Args:
            x: (B, L, H).
            state: before the first step, for a sequence that comes in parts; zero by default.

        Raises:
            InputError: an input or a state of another shape.
        """
        _check_input("S5", x, ("B", "L", self.dim))
        state = self.initial_state(len(x)) if state is None else state
        _check_state("S5", state, (len(x), self.d_state // 2))
        logs, B, C = self.discrete()
        u = x.to(B.real.dtype)
        entering = torch.complex(u @ B.real.T, u @ B.imag.T)
        states = diagonal_scan(logs, entering, state)
        last = states[:, -1]
        if self.bidirectional:
            back = diagonal_scan(logs, entering.flip(1), torch.zeros_like(state)).flip(1)
            states = torch.cat((states, back), -1)
        y = 2 * (states.real @ C.real.T - states.imag @ C.imag.T) + _at_least_single(self.D) * u
        return y.to(x.dtype), last

    def sampled(self) -> Sampled:
        """Return what ``step`` computes with, for many steps with the same weights.

        Raises:
            InputError: a bidirectional layer, whose outputs depend on inputs to come.
        """
        if self.bidirectional:
            raise InputError("S5: a bidirectional layer takes no single steps: build it with bidirectional = False")
        logs, B, C = self.discrete()
        return logs.exp(), B, C

    def step(self, x: Tensor, state: Tensor, sampled: Sampled | None = None) -> tuple[Tensor, Tensor]:
        """Return y (B, H) and the next state (B, N / 2) of one step: for a stream, in constant memory.

        Raises:
            InputError: shapes that do not go together, or a bidirectional layer.
        """
        _check_input("S5", x, ("B", self.dim))
        _check_state("S5", state, (len(x), self.d_state // 2))
        A, B, C = self.sampled() if sampled is None else sampled
        u = x.to(B.real.dtype)
        state = A * state + torch.complex(u @ B.real.T, u @ B.imag.T)
        y = 2 * (state @ C.T).real + _at_least_single(self.D) * u
        return y.to(x.dtype), state


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _lecun(*shape: int, fan_in: int) -> Tensor:
    """Draw from a normal distribution cut at two standard deviations, of variance 1 / fan_in after the cut."""
    uncut = 1 / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(shape), std=uncut, a=-2 * uncut, b=2 * uncut) / math.sqrt(fan_in)


def _log_steps(shape: Sequence[int], low: float, high: float) -> Tensor:
    return torch.empty(*shape).uniform_(math.log(low), math.log(high))


def _as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.to(torch.cfloat).resolve_conj()).contiguous()


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(_at_least_single(x).contiguous())


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_sizes(name: str, dim: int, d_state: int, low: float, high: float) -> None:
    if dim < 1 or d_state < 2 or d_state % 2:
        raise InputError(f"{name}: dim = {dim} and d_state = {d_state} must be at least 1 and an even number from 2")
    if not 0 < low <= high:
        raise InputError(f"{name}: steps from {low} to {high} are not allowed: give 0 < step_min <= step_max")


def _check_input(name: str, x: Tensor, shape: tuple[str | int, ...]) -> None:
    if x.ndim != len(shape) or x.shape[-1] != shape[-1] or x.numel() == 0:
        raise InputError(f"{name}: x {tuple(x.shape)} must be ({', '.join(map(str, shape))}), none of them 0")


def _check_state(name: str, state: Tensor, shape: tuple[int, ...]) -> None:
    if state.shape != shape:
        raise InputError(f"{name}: state {tuple(state.shape)} must be {shape}: begin with initial_state(batch)")
