"""Networks, action distributions, observation encoders and normalisers."""

from saferl.nn.distributions import CategoricalActions, GaussianActions, action_distribution
from saferl.nn.models import ActorCritic
from saferl.nn.networks import mlp
from saferl.nn.normalise import RunningNormaliser
from saferl.nn.shapes import same_shape
from saferl.nn.spaces import ObservationEncoder

__all__ = [
    "ActorCritic",
    "CategoricalActions",
    "GaussianActions",
    "ObservationEncoder",
    "RunningNormaliser",
    "action_distribution",
    "mlp",
    "same_shape",
]
