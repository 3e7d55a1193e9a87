"""Run directories, checkpoints, metrics, progress, evaluation and reports."""
