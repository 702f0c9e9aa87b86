"""Errors a user can act on.

Every message says what was given, what is allowed and what to do next, in one line. The command line prints
the message of a ``VitrailError`` without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class VitrailError(Exception):
    """A failure that the user can mend; its text is the whole explanation."""


class InputError(VitrailError, ValueError):
    """A path, an option or a recipe entry that cannot be used."""


class DataError(VitrailError):
    """Data that cannot serve the purpose: one class only, too few images, labels that disagree."""


class RunError(VitrailError):
    """A run folder or a training run that cannot go on; names what was kept."""


class MissingExtra(VitrailError, ImportError):
    """An optional dependency is absent; names the extra that installs it."""


def nearest(given: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """Return the allowed names closest to ``given``, best first."""
    return difflib.get_close_matches(given, list(allowed), n=n, cutoff=0.5)


def unknown(kind: str, given: str, allowed: Iterable[str], hint: str = "") -> InputError:
    """Build the error for a name that is not among ``allowed``: offers the nearest names, or the first few."""
    names = sorted(set(allowed))
    close = nearest(given, names)
    if close:
        offer = "did you mean " + " or ".join(repr(name) for name in close) + "?"
    else:
        shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
        offer = f"allowed: {shown}"
    return InputError(f"unknown {kind} {given!r}: {offer}" + (f" {hint}" if hint else ""))


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or raise ``MissingExtra`` naming the extra that provides it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs the package {module.split('.')[0]!r}, which is not installed ({error}): "
            f"run  pip install 'vitrail[{extra}]'"
        ) from error
