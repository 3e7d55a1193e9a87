"""The planar dynamics of Safety-Gymnasium's Point robot, written once for every backend.

Arithmetic operators only, so the same functions run on floats, on NumPy arrays, on torch tensors of any
device, and compiled by numba; what differs between those (sine, clipping, loops) stays with the caller.

Point (safety-gymnasium 1.0.0, point.xml) is a rigid body that slides along x and y and turns about z: a
sphere of radius 0.1 m with a box of half-size 0.05 m in front. With (vx, vy) the velocity of the sphere's
centre in the world, w the turning rate, k = mass x (distance of the centre of mass) and F the motor's force
along the heading (cos, sin), one implicit-damping Euler substep of h seconds (MuJoCo's) solves

    [ m + d h     0        -k sin     ] [ax   ]   [(F + k w^2) cos - d vx]
    [   0       m + d h     k cos     ] [ay   ] = [(F + k w^2) sin - d vy]
    [-k sin      k cos    I + d_z h   ] [alpha]   [ T - d_z w            ]

for the accelerations. The floor's contact force is negligible. The turning servo T = gear clip(a1 - gear w)
is explicit and beyond its stability limit, so the turning rate chatters and trajectories are chaotic:
rounding errors of 1e-16 grow to 1e-3 within 25 to 100 steps. That is a property of the original, and why
backends are compared over short trajectories and by statistics.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CONTROL_SECONDS",
    "FORCE_LIMIT",
    "GEAR",
    "GRAVITY",
    "MAGNETIC_FIELD",
    "SUBSTEPS",
    "SUBSTEP_SECONDS",
    "accelerations",
    "to_ego",
]

SUBSTEP_SECONDS = 0.002
SUBSTEPS = 10
CONTROL_SECONDS = SUBSTEP_SECONDS * SUBSTEPS
GEAR = 0.3  # of the motor and of the servo
FORCE_LIMIT = 0.05  # on both actuators' outputs, before the gear
GRAVITY = 9.81  # m/s^2
MAGNETIC_FIELD = -0.5  # along y

MASS = 0.005188790204786391  # kg
FIRST_MOMENT = MASS * 0.01927231513576232  # kg m, mass times the centre of mass's distance ahead
INERTIA = 2.8421827485812233e-05  # kg m^2 about the origin
SLIDE_DAMPING = 0.01  # N s/m
HINGE_DAMPING = 0.005  # N m s


def accelerations(
    vx: Any, vy: Any, w: Any, sin: Any, cos: Any, force: Any, torque: Any, h: float
) -> tuple[Any, Any, Any]:
    """Accelerations (ax, ay in m/s^2, alpha in rad/s^2) of a substep of `h` seconds.

    `force` (N, along the heading) and `torque` (N m) are the actuators', geared and clipped. h = 0 gives the
    instantaneous accelerations, which the accelerometer reads. All arguments broadcast.
    """
    mass = MASS + SLIDE_DAMPING * h
    push = force + FIRST_MOMENT * w * w
    fx = push * cos - SLIDE_DAMPING * vx
    fy = push * sin - SLIDE_DAMPING * vy
    ft = torque - HINGE_DAMPING * w
    inertia = INERTIA + HINGE_DAMPING * h - FIRST_MOMENT * FIRST_MOMENT / mass
    alpha = (ft + (FIRST_MOMENT / mass) * (sin * fx - cos * fy)) / inertia
    ax = (fx + FIRST_MOMENT * sin * alpha) / mass
    ay = (fy - FIRST_MOMENT * cos * alpha) / mass
    return ax, ay, alpha


def to_ego(x: Any, y: Any, sin: Any, cos: Any) -> tuple[Any, Any]:
    """World components (x, y) in the robot's frame: (ahead, to the left)."""
    return cos * x + sin * y, cos * y - sin * x
