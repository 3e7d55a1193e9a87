"""Tasks as tables, batched, with exact dynamics for what is to be solved exactly."""
