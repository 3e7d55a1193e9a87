"""Reward design: shaping, weighting and mixing of rewards, as functions of arrays and small learners.

A module a system; import from the module. `saferl.gates` holds the gates that several of them share, and
`saferl.starc` compares what comes out.
"""
