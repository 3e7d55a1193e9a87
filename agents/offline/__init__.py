"""Learners from recorded data alone."""
