"""PPO-Simmer: PPO-Saute whose start budget a controller moves.

Sootla, Cowen-Rivers, Wang and Bou Ammar 2022, "Enhancing Safe Exploration Using Safety State Augmentation".
As in Saute the policy sees what is left of its cost budget, but an episode starts with z = b / D instead of
1, D being the whole limit. A reference r rises from a small budget to the whole limit, and a controller
corrects it once an iteration by the error between it and what episodes cost:

    e  = r - J_C D / d,    e~ <- rho e~ + (1 - rho) e
    u  = kp e~ + ki sum(the last `integral_window` e~) + kd (b - r - u of the iteration before)
    b <- clip(r + clip(u, -max_change, max_change), 1e-6, D)

so exploration is let off the leash step by step, and the leash is shortened where it costs more than it
should. (At the floor of 1e-6 an episode without any cost still earns its reward.)

With `reference` "schedule", r goes from `start_budget` D to D in a straight line over the share `ramp` of the
run; the authors' code takes a schedule in equal stages, from a list. "budget" is OmniSafe's controller, whose
reference is the last budget itself: a policy that costs more than its budget gets ever less until nothing is
left, and one that costs less gets ever more.

The gains, `start_budget` 1 and `smoothing`, the weight rho of the past error, are those of OmniSafe's
configuration; its benchmark page lists gains of 1.0, 0.001 and 0.01, and the authors' code has its own for
every experiment. With these defaults b hardly moves, so that PPO-Simmer is PPO-Saute: to simmer, start low.
`ramp` is ours. With several limits there is a controller for each. Evaluation starts with the whole limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gymnasium.vector import VectorEnv

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, at_least, train_on_policy
from saferl.agents.online.episode_limits import SauteConfig, saute
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, clipped_policy_loss
from saferl.agents.online.lagrangian import observe_costs
from saferl.envs.wrappers import Saute
from saferl.errors import UsageError, unknown_name
from saferl.experiment.run import Run
from saferl.nn.models import Actor

_LEAST = 1e-6  # of a budget, in the units of D


@dataclass(frozen=True, kw_only=True)
class Config(SauteConfig, FirstOrderConfig):
    """The budgets' hyperparameters, their controllers' and PPO's."""

    start_budget: float = 1.0
    """Share of the limit that the first episodes start with."""
    reference: Literal["schedule", "budget"] = "schedule"
    """What the controller corrects: a rising schedule, or the last budget as in OmniSafe."""
    ramp: float = 0.5
    """Share of the run over which the schedule rises to the whole limit; 0 is there at once."""
    kp: float = 5e-4
    """Proportional gain."""
    ki: float = 1e-5
    """Integral gain."""
    kd: float = 0.0
    """Gain of the difference between the correction applied and the one asked for (against wind-up)."""
    smoothing: float = 0.995
    """Weight of the past in the smoothed error; 0 takes the present error."""
    integral_window: int = 10
    """Iterations over which smoothed errors are summed."""
    max_change: float = 1.0
    """Largest correction, in units of the discounted limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.start_budget <= 1:
            raise UsageError(f"start_budget is {self.start_budget:g}; it must be above 0 and at most 1.")
        if self.reference not in ("schedule", "budget"):
            raise unknown_name("reference", self.reference, ("schedule", "budget"))
        if not 0 <= self.ramp <= 1:
            raise UsageError(f"the ramp is {self.ramp:g} of the run; it must lie between 0 and 1.")
        if not 0 <= self.smoothing < 1:
            raise UsageError(f"the smoothing is {self.smoothing:g}; it must be at least 0 and less than 1.")
        for name in ("kp", "ki", "kd", "max_change"):
            at_least(name.replace("_", " "), getattr(self, name), 0)
        at_least("integral window", self.integral_window, 1)


class BudgetController:
    """The PI controller of one budget, with a guard against wind-up.

    Args:
        config: gains; see above.
        limit: the whole limit d on the undiscounted episode cost.
        allowance: D, the limit in the budget's discounted units.
    """

    def __init__(self, config: Config, limit: float, allowance: float) -> None:
        self.config = config
        self.scale = allowance / limit
        self.allowance = allowance
        self.budget = max(_LEAST, config.start_budget * allowance)
        self._error = 0.0
        self._errors: list[float] = []
        self._excess = 0.0

    @property
    def share(self) -> float:
        """The budget as a share of the limit: z at the start of an episode."""
        return self.budget / self.allowance

    def _reference(self, progress: float) -> float:
        config = self.config
        if config.reference == "budget":
            return self.budget
        risen = min(progress / config.ramp, 1.0) if config.ramp else 1.0
        return (config.start_budget + (1 - config.start_budget) * risen) * self.allowance

    def update(self, cost: float | None, progress: float = 0.0) -> float:
        """Move the budget and return it.

        `cost` is the mean undiscounted episode cost, None while it is not known: the budget is then the
        reference. `progress` is the share of the run that is done.
        """
        config, reference = self.config, self._reference(progress)
        if cost is None:
            self.budget = max(_LEAST, reference)
            return self.budget
        error = reference - cost * self.scale
        self._error = config.smoothing * self._error + (1 - config.smoothing) * error
        self._errors = [*self._errors, self._error][-config.integral_window :]
        asked = config.kp * self._error + config.ki * sum(self._errors) + config.kd * self._excess
        change = min(max(asked, -config.max_change), config.max_change)
        self.budget = min(max(reference + change, _LEAST), self.allowance)
        self._excess = (self.budget - reference) - asked
        return self.budget

    def state_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "error": self._error,
            "errors": self._errors,
            "excess": self._excess,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.budget, self._error = float(state["budget"]), float(state["error"])
        self._errors, self._excess = [float(e) for e in state["errors"]], float(state["excess"])


class PPOSimmer:
    """One step of the budgets' controllers and one PPO update an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        assert isinstance(context.env, Saute)
        self.config = config
        self.env = context.env
        self.epochs = FirstOrderUpdate(config, context)
        self.constraints = config.constraints()
        self.controllers = {
            name: BudgetController(config, budget.limit, budget.allowance)
            for name, budget in self.env.budgets.items()
        }
        self._hand_out()

    def _hand_out(self) -> None:
        """Let the episodes that begin from now on start with the controllers' budgets."""
        self.env.start = {name: controller.share for name, controller in self.controllers.items()}

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        metrics = observe_costs(self.constraints, rollout)
        for constraint in self.constraints:
            estimate, controller = constraint.estimate, self.controllers[constraint.name]
            controller.update(None if estimate is None else estimate.value, progress)
            metrics[f"constraint/{constraint.name}/budget"] = controller.share * constraint.limit
        self._hand_out()
        loss = clipped_policy_loss(rollout, standardise(rollout.advantages), self.config.clip)
        return metrics | self.epochs.run(rollout, loss, progress)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs.state_dict(),
            "constraints": self.constraints.state_dict(),
            "controllers": {name: c.state_dict() for name, c in self.controllers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])
        self.constraints.load_state_dict(state["constraints"])
        for name, controller in self.controllers.items():
            controller.load_state_dict(state["controllers"][name])
        self._hand_out()


def wrap(config: Config) -> Callable[[VectorEnv], VectorEnv]:
    """What training puts around the environments."""
    return saute(config, config.start_budget)


def evaluation_wrap(config: Config) -> Callable[[VectorEnv], VectorEnv]:
    """The same for evaluation, with the whole limit as the budget."""
    return saute(config)


def train(config: Config, run: Run) -> Actor:
    """Train PPO-Simmer; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: PPOSimmer(config, context), wrap=wrap(config))
