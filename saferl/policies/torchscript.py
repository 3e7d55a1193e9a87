"""TorchScript programs as policies, checked before they are loaded.

A TorchScript file holds tensors and a program in a language of its own, which torch parses and interprets
in C++. Its pickles are read by a C++ reader that knows tensors, lists and the program's own classes and has
no way to import or call Python. What remains is what the program can do with torch's operators, and a few
of those reach outside: `torch.save` writes any file, `torch.from_file` maps one into memory, and
`torch.classes` and operators of other namespaces lead into extensions. Methods named `__setstate__` run
while the file is being loaded, so a check afterwards is too late. Therefore the archive is read here
first: the program may use operators of `torch` and a short list of `ops.prim`, never those that touch
files, other processes or unchecked memory; only what passed is handed to `torch.jit.load`, repacked, so
that no second reading of the same bytes can differ. This keeps a file from executing code; it does not
bound the time or memory that its program takes.

torch 2.13 marks `torch.jit.load` as deprecated in favour of `torch.export`, whose loader falls back to
unpickling without restrictions; TorchScript stays the safe carrier for a custom policy.
"""

from __future__ import annotations

import ast
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from saferl.errors import CheckpointError, UsageError
from saferl.policies.protocol import is_torch

MAX_BYTES = 4 * 2**30
MAX_CODE_BYTES = 16 * 2**20

# fmt: off
_PRIM = frozenset((
    "AutogradAdd", "ChunkSizes", "ConstantChunk", "EnumName", "EnumValue", "ModuleContainerIndex",
    "NumToTensor", "Print", "RaiseException", "StringIndex", "TupleIndex", "TupleUnpack", "Uninitialized",
    "abs", "data", "device", "dtype", "grad", "id", "index", "is_cpu", "is_cuda", "is_meta", "is_mps",
    "is_nested", "is_quantized", "is_sparse", "itemsize", "layout", "max", "min", "name", "nbytes",
    "rangelist", "requires_grad", "tolist", "type", "unchecked_cast", "unchecked_unwrap_optional",
))
# fmt: on
_FORBIDDEN = re.compile(
    r"save|from_file|rpc_\w+|\w*PythonOp|set_data|(?!_unsafe_view$)\w*_unsafe\w*|_unsafe_\w+"
)
_ADVICE = "export the policy with torch.jit.trace(policy, obs).save('policy.pt')"


class TorchScriptPolicy:
    """A TorchScript program behind the `Policy` protocol.

    The program's `forward(obs)` returns the actions, or a tuple that starts with them. A program that also
    samples exports `act(obs, deterministic: bool)`, which is then called instead; without it both values
    of `deterministic` give the same actions. Dict observations arrive as Dict[str, Tensor].

    Attributes:
        module: the loaded program, in evaluation mode.
        observation_space, action_space: None; the file does not say.
    """

    observation_space: spaces.Space[Any] | None = None
    action_space: spaces.Space[Any] | None = None

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module = module.eval()
        self.device = device
        floating = [p.dtype for p in module.parameters() if p.is_floating_point()]
        self._dtype = floating[0] if floating else torch.float32
        self._samples = hasattr(module, "act")

    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Run the program on a batch; floating observations take the type of its weights. See `Policy.act`.

        Raises:
            UsageError: the program fails on these observations or returns no tensor of N actions.
        """
        as_torch = is_torch(obs)
        tensors = self._tensors(obs)
        first = next(iter(tensors.values())) if isinstance(tensors, dict) else tensors
        try:
            with torch.no_grad():
                action = self.module.act(tensors, deterministic) if self._samples else self.module(tensors)
        except (RuntimeError, torch.jit.Error) as error:
            reason = (str(error).strip() or "no reason given").splitlines()[-1]
            raise UsageError(
                f"the TorchScript policy failed on observations of shape {tuple(first.shape)}: {reason}"
            ) from error
        action = action[0] if isinstance(action, tuple | list) else action
        if not isinstance(action, torch.Tensor) or action.ndim == 0 or action.shape[0] != first.shape[0]:
            raise UsageError("the TorchScript policy returned no tensor with one action an observation.")
        return action if as_torch else action.cpu().numpy()

    def _tensors(self, obs: Any) -> Any:
        if isinstance(obs, Mapping):
            return {key: self._tensors(value) for key, value in obs.items()}
        tensor = obs.detach() if isinstance(obs, torch.Tensor) else torch.as_tensor(np.array(obs))
        if tensor.ndim == 0:
            raise UsageError("the policy acts on batches; add a leading axis for one observation.")
        return tensor.to(self.device, self._dtype if tensor.is_floating_point() else tensor.dtype)


def load_torchscript(path: str | Path, *, device: str | torch.device = "cpu") -> TorchScriptPolicy:
    """Check and load a TorchScript file.

    Args:
        path: a file written by `torch.jit.save`.
        device: where the weights go, whatever device they were saved from.

    Raises:
        CheckpointError: the file is missing, damaged, no TorchScript, or uses an operator that reaches
            beyond tensors.
    """
    path = Path(path)
    device = torch.device(device)
    checked = io.BytesIO(_checked_archive(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(checked, map_location=device)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or was written by a newer torch; {_ADVICE}.") from error
    return TorchScriptPolicy(module, device)


def _checked_archive(path: Path) -> bytes:
    """The archive's program and tensors, read once, checked, and packed anew."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:
            infos = archive.infolist()
            if sum(info.file_size for info in infos) > MAX_BYTES:
                raise CheckpointError(f"{path} is refused: it unpacks to more than {MAX_BYTES >> 30} GiB.")
            members = {info.filename.partition("/")[2]: info for info in infos}
            if "constants.pkl" not in members or not any(name.startswith("code/") for name in members):
                raise CheckpointError(
                    f"{path} holds no TorchScript program (a file of torch.save is a pickle and is not "
                    f"opened); {_ADVICE}."
                )
            for name, info in members.items():
                is_code = name.startswith("code/") and name.endswith(".py")
                is_pickle = name in ("data.pkl", "constants.pkl")
                is_data = name in ("version", ".data/version", "byteorder") or name.startswith(
                    ("data/", "constants/")
                )
                if not (is_code or is_pickle or is_data):
                    continue  # debugging tables and recorded inputs are not needed to run
                content = archive.read(info)
                if is_code:
                    _check_code(content, path)
                elif is_pickle:
                    _check_pickle(content, path)
                packed.writestr(f"policy/{name}", content)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; give a file that torch.jit.save wrote.") from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no TorchScript file; {_ADVICE}.") from error
    return out.getvalue()


def _refuse(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused: its program uses {what}, which can reach beyond tensors; export the policy "
        "without it."
    )


def _check_pickle(content: bytes, path: Path) -> None:
    """The C++ reader builds the program's own classes; refuse those that belong to extensions."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("STACK_GLOBAL", "INST"):
            raise _refuse(path, "a pickle opcode that TorchScript does not write")
        if opcode.name == "GLOBAL" and "torch.classes" in str(argument).replace(" ", "."):
            raise _refuse(path, "torch.classes")


def _check_code(content: bytes, path: Path) -> None:
    """Refuse a program that names anything outside torch's tensor operators.

    TorchScript's serialised language is a subset of Python's syntax, so Python's parser (which executes
    nothing) reads it.
    """
    if len(content) > MAX_CODE_BYTES:
        raise CheckpointError(f"{path} is refused: its program is larger than {MAX_CODE_BYTES >> 20} MiB.")
    pending: list[ast.AST] = [ast.parse(content.decode("ascii"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Attribute | ast.Name):
            names, rest = _dotted(node)
            _check_name(names, path)
            if rest is not None:
                pending.append(rest)
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            literal = node.args[1] if len(node.args) > 1 else None
            if not (isinstance(literal, ast.Constant) and isinstance(literal.value, str)):
                raise _refuse(path, "getattr with a computed name")
            _check_name(["self", literal.value], path)
        pending.extend(ast.iter_child_nodes(node))


def _dotted(node: ast.AST) -> tuple[list[str], ast.AST | None]:
    """The names of an attribute chain, and the expression it starts from unless that is a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        return [node.id, *reversed(names)], None
    return ["", *reversed(names)], node


def _check_name(names: list[str], path: Path) -> None:
    root = names[0]
    for name in names[1:] if root != "" else names:
        if _FORBIDDEN.fullmatch(name):
            raise _refuse(path, f"the operator {name!r}")
    if root == "ops" and (len(names) != 3 or names[1] != "prim" or names[2] not in _PRIM):
        raise _refuse(path, f"{'.'.join(names)!r}")
    if root == "torch" and len(names) == 1:
        raise _refuse(path, "torch as a value")
    if root == "__torch__" and (names[1:2] in ([], ["torch"]) and names[2:3] in ([], ["classes"])):
        raise _refuse(path, "torch.classes")
