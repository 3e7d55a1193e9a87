"""Safety-Gymnasium's single-agent tasks: which there are (importing this loads neither it nor MuJoCo)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLANAR", "SIMULATED", "Task", "tasks"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One registered task of safety-gymnasium 1.0.0."""

    id: str
    """Its id there, for example "SafetyPointGoal1-v0"."""
    summary: str
    """One line, "family: what it is"."""
    max_episode_steps: int
    """Steps after which an episode is truncated."""


ROBOTS = ("Point", "Car", "Racecar", "Doggo", "Ant")

# name: (what the agent does, levels, steps of an episode)
_NAVIGATION = {
    "Goal": ("reach goals", (0, 1, 2), 1000),
    "Button": ("press the lit button", (0, 1, 2), 1000),
    "Push": ("push a box to goals", (0, 1, 2), 1000),
    "Circle": ("run in a circle", (0, 1, 2), 500),
    "Run": ("run along a street", (0,), 500),
}
# What costs, by task and level.
_COSTS = {
    "Goal": ("nothing costs", "hazards cost", "hazards and vases cost"),
    "Button": (
        "nothing costs",
        "wrong buttons, 4 hazards, 4 gremlins cost",
        "wrong buttons, 8 hazards, 6 gremlins cost",
    ),
    "Push": ("nothing costs", "hazards cost", "hazards and pillars cost"),
    "Circle": ("nothing costs", "leaving |x| < 1.125 costs", "leaving |x|, |y| < 1.125 costs"),
    "Run": ("leaving |x| < 0.5 costs",),
}
_VELOCITY = ("HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant", "Humanoid")


def tasks() -> list[Task]:
    """Return all single-agent navigation and velocity tasks without vision, in a fixed order."""
    navigation = [
        Task(
            id=f"Safety{robot}{name}{level}-v0",
            summary=f"safety-gymnasium: {robot}, {aim}; {_COSTS[name][level]}",
            max_episode_steps=steps,
        )
        for name, (aim, levels, steps) in _NAVIGATION.items()
        for level in levels
        for robot in ROBOTS
    ]
    velocity = [
        Task(
            id=f"Safety{robot}Velocity-{version}",
            summary=f"safety-gymnasium: {robot} runs; speed above a threshold costs",
            max_episode_steps=1000,
        )
        for version in ("v1", "v0")
        for robot in _VELOCITY
    ]
    return navigation + velocity


#: Tasks in closed form (see `planar`): contacts decide neither their rewards nor their costs.
PLANAR = frozenset(
    f"SafetyPoint{name}-v0" for name in ("Goal0", "Goal1", "Circle0", "Circle1", "Circle2", "Run0")
)
#: Tasks of the batched MuJoCo engine (see `simulated`).
SIMULATED = frozenset(task.id for task in tasks())
