"""`python -m saferl` is the `saferl` command."""

from saferl.cli import run

run()
