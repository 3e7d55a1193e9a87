"""Pictures of distances between rewards: a heat map, and a map that shows them as points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from saferl.starc.tabular import Floats

__all__ = ["classical_scaling", "draw_heatmap", "draw_map"]


def classical_scaling(distances: ArrayLike, dimensions: int = 2) -> Floats:
    """Points (K, dimensions) whose Euclidean distances come near the given ones (K, K) (Torgerson 1952)."""
    squares = np.asarray(distances, float) ** 2
    centred = squares - squares.mean(axis=0) - squares.mean(axis=1)[:, None] + squares.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    chosen = np.argsort(values)[::-1][:dimensions]
    points = vectors[:, chosen] * np.sqrt(np.maximum(values[chosen], 0))
    missing = dimensions - points.shape[1]
    return np.asarray(np.pad(points, ((0, 0), (0, missing))))


def draw_heatmap(path: Path, names: Sequence[str], distances: Floats) -> None:
    """Write the matrix of distances as an image."""
    from matplotlib.figure import Figure

    size = 2.2 + 0.7 * len(names)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(distances, cmap="viridis_r", vmin=0, vmax=max(2.0, float(distances.max())))
    for i, row in enumerate(distances):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 1 else "black")
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="STARC distance", shrink=0.8)
    figure.savefig(path, dpi=120)


def draw_map(path: Path, names: Sequence[str], distances: Floats) -> None:
    """Write the rewards as points, as far apart as two dimensions let them be."""
    from matplotlib.figure import Figure

    points = classical_scaling(distances)
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    ax = figure.subplots()
    ax.scatter(*points.T, zorder=3)
    for name, (x, y) in zip(names, points, strict=True):
        ax.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points")
    shown = np.linalg.norm(points[:, None] - points[None], axis=-1)
    upper = np.triu_indices(len(names), 1)
    error = float(np.abs(shown - distances)[upper].max()) if len(names) > 1 else 0.0
    ax.set(title=f"rewards by STARC distance (largest error {error:.2f})", aspect="equal")
    ax.margins(0.2)
    figure.savefig(path, dpi=120)
