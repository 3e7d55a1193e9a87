"""Safety-Gymnasium's planar tasks in closed form: `env` is the environment, `equations` the model."""
