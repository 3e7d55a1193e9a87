"""The errors a user is meant to read: one sentence that says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaferlError(Exception):
    """Something failed that the user can mend; the command line prints it and exits with status 1."""


class UsageError(SaferlError):
    """The request itself is wrong (unknown name, impossible value); exit status 2."""


class MissingPackageError(SaferlError):
    """An optional package is needed and absent; the message names the command that installs it."""


class CheckpointError(SaferlError):
    """A checkpoint or policy file is missing, damaged, or refused because it could execute code."""


class DatasetError(SaferlError):
    """A data set is missing, damaged or of another layout, or could not be downloaded or written."""


class NonFiniteError(SaferlError):
    """NaN or infinity appeared in an observation, reward, cost or loss; the run stopped before saving it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Build the error for an unknown `kind` (for example "algorithm"), with the nearest known name."""
    candidates = sorted(known)
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5) or [
        c for c in candidates if c.lower() == name.lower()
    ]
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(candidates[:8])}."
    return UsageError(f"unknown {kind} {name!r}; {hint}")
