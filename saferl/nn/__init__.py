"""Networks, action distributions, observation encoders and normalisers."""

from saferl.nn.batched import BatchedMLPs
from saferl.nn.distributions import (
    CategoricalActions,
    DeterministicActions,
    GaussianActions,
    SquashedGaussianActions,
    action_distribution,
)
from saferl.nn.models import ActorCritic
from saferl.nn.networks import mlp
from saferl.nn.normalise import RunningNormaliser
from saferl.nn.shapes import same_shape
from saferl.nn.spaces import ObservationEncoder

__all__ = [
    "ActorCritic",
    "BatchedMLPs",
    "CategoricalActions",
    "DeterministicActions",
    "GaussianActions",
    "ObservationEncoder",
    "RunningNormaliser",
    "SquashedGaussianActions",
    "action_distribution",
    "mlp",
    "same_shape",
]
