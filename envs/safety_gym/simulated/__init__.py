"""Safety-Gymnasium's tasks on MuJoCo in batches: the package's numbers without its Python loops."""

from saferl.envs.safety_gym.simulated.env import SimulatedVectorEnv

__all__ = ["SimulatedVectorEnv"]
