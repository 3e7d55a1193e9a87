"""On-policy and off-policy constrained learners, one file each."""
