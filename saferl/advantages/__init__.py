"""Advantage estimation, the same for a reward, for costs and for tokens."""

from saferl.advantages.gae import gae, next_values
from saferl.advantages.scaling import centre, standardise

__all__ = ["centre", "gae", "next_values", "standardise"]
