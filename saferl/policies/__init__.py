"""Policies of any origin behind one protocol, opened without executing code from the file."""

from saferl.policies.loading import load_policy
from saferl.policies.protocol import Policy, Stateful
from saferl.policies.sb3_zip import SB3Policy
from saferl.policies.torchscript import TorchScriptPolicy

__all__ = ["Policy", "SB3Policy", "Stateful", "TorchScriptPolicy", "load_policy"]
