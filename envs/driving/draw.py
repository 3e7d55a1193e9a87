"""A world from above as a picture: the ego's heading up, its speed, limit and score written beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from saferl.envs.driving.frame import LightState
from saferl.envs.driving.geometry import EGO_LENGTH, EGO_WIDTH
from saferl.envs.driving.observe import CHANNELS, bird_view
from saferl.envs.driving.world import tree_map

if TYPE_CHECKING:
    from saferl.envs.driving.env import RouteDrivingVectorEnv

__all__ = ["draw"]

_SIZE, _PER_METRE = 320, 3.2
_COLOURS = {
    "shoulder": (196, 190, 178),
    "road": (84, 88, 96),
    "marking": (236, 236, 236),
    "stop_signs": (150, 60, 60),
    "route": (96, 140, 214),
    "static": (120, 84, 54),
    "vehicles": (244, 178, 62),
    "pedestrians": (226, 74, 122),
}
_GROUND = (226, 228, 220)
_EGO = (48, 170, 92)
_LIGHTS = {LightState.GREEN: (60, 200, 90), LightState.YELLOW: (250, 210, 60), LightState.RED: (230, 50, 50)}


def draw(env: RouteDrivingVectorEnv, index: int) -> np.ndarray:
    """World `index`, (320, 320, 3) uint8. Raises UsageError before the first reset."""
    state = tree_map(lambda t: t[..., index : index + 1], env.state)
    frame = tree_map(lambda t: t[..., index : index + 1], env.frame)
    with torch.no_grad():
        layers = bird_view(env.bank, state, frame, _SIZE, _PER_METRE)[0].cpu().numpy()
    picture = np.empty((_SIZE, _SIZE, 3), np.uint8)
    picture[:] = _GROUND
    for name, colour in _COLOURS.items():
        layer = layers[CHANNELS.index(name)].astype(np.float32)[..., None] / 255.0
        # Broken markings and slow actors are fainter in the codes; here only markings are.
        share = layer * 0.8 if name in ("marking", "route") else (layer > 0) * 1.0
        picture = (picture * (1 - share) + np.array(colour) * share).astype(np.uint8)
    line = layers[CHANNELS.index("lights")] > 0
    picture[line] = _LIGHTS.get(int(frame.light[0]), _EGO)
    row = _SIZE - round(100 / 256 * _SIZE)
    half = int(0.5 * EGO_LENGTH * _PER_METRE), int(0.5 * EGO_WIDTH * _PER_METRE)
    picture[row - half[0] : row + half[0], _SIZE // 2 - half[1] : _SIZE // 2 + half[1]] = _EGO
    return _bars(picture, float(frame.speed[0]), float(frame.speed_limit[0]), float(frame.completion[0]))


def _bars(picture: np.ndarray, speed: float, limit: float, completion: float) -> np.ndarray:
    """Speed as a bar at the left (a tick at the limit), route completion at the top."""
    height = len(picture)
    full = 25.0
    top = height - int(height * min(max(speed, 0.0) / full, 1.0))
    picture[:, :6] = (40, 40, 44)
    picture[top:, :6] = (230, 60, 50) if speed > limit + 0.1 else (70, 150, 230)
    tick = height - int(height * min(limit / full, 1.0))
    picture[max(tick - 1, 0) : tick + 1, :10] = (255, 255, 255)
    picture[:5] = (40, 40, 44)
    picture[:5, : int(len(picture[0]) * completion / 100.0)] = _EGO
    return picture
