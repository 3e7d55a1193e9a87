"""Bullet-Safety-Gym's tasks of which DSRL has data (importing this loads neither it nor PyBullet)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Task", "tasks"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One registered task of bullet-safety-gym 1.4.0."""

    id: str
    """Its id there, for example "SafetyBallRun-v0"."""
    summary: str
    """One line, "family: what it is"."""
    max_episode_steps: int
    """Steps after which an episode is truncated."""
    agent: str
    """The package's class of the robot."""
    task: str
    """The package's class of the task."""
    world: str
    """The package's class of the ground and walls."""


# robot: (the package's class, steps of Run, steps of Circle)
_ROBOTS = {
    "Ball": ("Ball", 100, 200),
    "Car": ("RaceCar", 200, 300),
    "Drone": ("Drone", 200, 300),
    "Ant": ("Ant", 200, 500),
}


def tasks() -> list[Task]:
    """Return the tasks in a fixed order: Run, then Circle, of each robot."""
    run = [
        Task(
            id=f"Safety{robot}Run-v0",
            summary=f"bullet-safety-gym: {robot}, run along x; |y| > 2 and speed above a threshold cost",
            max_episode_steps=steps,
            agent=agent,
            task="RunTask",
            world="Plane200",
        )
        for robot, (agent, steps, _) in _ROBOTS.items()
    ]
    circle = [
        Task(
            id=f"Safety{robot}Circle-v0",
            summary=f"bullet-safety-gym: {robot}, run in a circle; |x| > 6 costs",
            max_episode_steps=steps,
            agent=agent,
            task="CircleTask",
            world="Octagon",
        )
        for robot, (agent, _, steps) in _ROBOTS.items()
    ]
    return run + circle
