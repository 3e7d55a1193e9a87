"""Read plain data out of pickles without letting them run anything.

A pickle is a program: it may import any name and call it. An allow-list of names to import is not enough
either, because classes written in Python can be called with hostile arguments, or have their attributes
overwritten by the BUILD opcode. So here nothing that a pickle names is imported at all. Every name on a
short, exact list is answered with an inert stand-in of our own:

* a class that only ever serves as a value (a policy class, an activation) becomes a `Reference`, which is
  text and cannot be called;
* an instance of a known class (a space, running statistics) becomes a `Record`, which collects its state;
* NumPy's array, scalar and dtype constructors become readers of raw bytes for numbers;
* random generators, which spaces carry along, become `Record`s that nobody reads.

Any other name raises CheckpointError with that name. What is wanted is then rebuilt from the records by
code of ours (`to_space` and its callers).
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any, ClassVar, Self

import numpy as np
from gymnasium import spaces

from saferl.errors import CheckpointError

# fmt: off
_ACTIVATIONS = (
    "CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU",
    "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softplus", "Softshrink",
    "Softsign", "Tanh", "Tanhshrink",
)
_OPTIMISERS = (
    "adadelta.Adadelta", "adagrad.Adagrad", "adam.Adam", "adamax.Adamax", "adamw.AdamW", "asgd.ASGD",
    "nadam.NAdam", "radam.RAdam", "rmsprop.RMSprop", "rprop.Rprop", "sgd.SGD",
)
# fmt: on

ACTIVATIONS = frozenset(
    {f"torch.nn.modules.activation.{name}" for name in _ACTIVATIONS} | {"torch.nn.modules.linear.Identity"}
)
OPTIMISERS = frozenset(
    {f"torch.optim.{name}" for name in _OPTIMISERS}
    | {"stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike"}
)
EXTRACTORS = frozenset(
    f"stable_baselines3.common.torch_layers.{name}"
    for name in ("FlattenExtractor", "NatureCNN", "CombinedExtractor")
)
ON_POLICY_CLASSES = frozenset(
    f"stable_baselines3.common.policies.{name}"
    for name in ("ActorCriticPolicy", "ActorCriticCnnPolicy", "MultiInputActorCriticPolicy")
)
OFF_POLICY_CLASSES = frozenset(
    f"stable_baselines3.{algorithm}.policies.{name}"
    for algorithm, base in (("sac", "SACPolicy"), ("td3", "TD3Policy"), ("dqn", "DQNPolicy"))
    for name in (base, "CnnPolicy", "MultiInputPolicy")
)
REFERENCES = ACTIVATIONS | OPTIMISERS | EXTRACTORS | ON_POLICY_CLASSES | OFF_POLICY_CLASSES


class Reference:
    """A class that a pickle refers to, as text; never imported by the unpickler and not callable."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError(f"the pickle tries to alter {self.name}.")


class Record:
    """Stand-in for an instance: the state that the pickle gave it and nothing else."""

    kind: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, key: str, default: Any = None) -> Any:
        """One member of the state; `default` where it is absent or the state is no dictionary."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default


def _record(kind: str) -> type[Record]:
    return type(kind, (Record,), {"kind": kind})


_NUMBER_TYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})


class _DType(Record):
    kind = "dtype"

    @property
    def value(self) -> np.dtype[Any]:
        name = self.args[0] if self.args else None
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "="
        if not isinstance(name, str) or name not in _NUMBER_TYPES or order not in ("<", ">", "|", "="):
            raise CheckpointError(f"the file holds an array of type {name!r}, which is not a number type.")
        return np.dtype(f"{order}{name}")


class _Array(Record):
    kind = "ndarray"

    @property
    def value(self) -> np.ndarray[Any, Any]:
        _version, shape, dtype, fortran, raw = self.state
        return _from_bytes(raw, dtype, shape, "F" if fortran else "C")


class _Function:
    """A constructor of NumPy's replaced by ours; slotted and without state, so BUILD cannot alter it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CheckpointError("the pickle tries to alter a function.")


class _FromBuffer(_Function):
    __slots__ = ()

    def __call__(self, raw: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
        return _from_bytes(raw, dtype, shape, order)


class _Reconstruct(_Function):
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _Scalar(_Function):
    __slots__ = ()

    def __call__(self, dtype: Any, raw: Any) -> Any:
        return _from_bytes(raw, dtype, (1,), "C")[0]


def _from_bytes(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """Numbers from raw bytes; every argument comes from the file."""
    if not isinstance(dtype, _DType) or not isinstance(raw, bytes | bytearray):
        raise CheckpointError("the file holds an array that is not made of plain numbers.")
    flat = np.frombuffer(bytes(raw), dtype=dtype.value)
    native = flat.astype(dtype.value.newbyteorder("="))
    if not isinstance(shape, tuple):
        shape = (shape,)
    return native.reshape(tuple(int(n) for n in shape), order="F" if order == "F" else "C")


SPACE_KINDS = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple")
_SPACE_MODULES = {kind: kind.lower().replace("multi", "multi_") for kind in SPACE_KINDS}


def _allowed() -> dict[str, Any]:
    """The whole allow-list: exact name -> stand-in."""
    table: dict[str, Any] = {name: Reference(name) for name in REFERENCES}
    for kind in SPACE_KINDS:
        record = _record(kind)
        for package in ("gymnasium", "gym"):
            table[f"{package}.spaces.{_SPACE_MODULES[kind]}.{kind}"] = record
    table["stable_baselines3.common.vec_env.vec_normalize.VecNormalize"] = _record("VecNormalize")
    table["stable_baselines3.common.running_mean_std.RunningMeanStd"] = _record("RunningMeanStd")
    ignored = _record("random generator")
    for name in (
        "numpy.random._pickle.__generator_ctor",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random._pickle.__randomstate_ctor",
        "numpy.random._pcg64.PCG64",
        "numpy.random._mt19937.MT19937",
        "numpy.random.bit_generator.SeedSequence",
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
        "numpy.random._generator.Generator",
    ):
        table[name] = ignored
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.numeric._frombuffer"] = _FromBuffer()
        table[f"{core}.multiarray._reconstruct"] = _Reconstruct()
        table[f"{core}.multiarray.scalar"] = _Scalar()
    table["numpy.dtype"] = _DType
    table["numpy.ndarray"] = Reference("numpy.ndarray")
    table["collections.OrderedDict"] = OrderedDict
    table["builtins.set"] = set
    return table


ALLOWED = _allowed()


class RefusedGlobal(CheckpointError):
    """A pickle names something outside the allow-list; `name` is what it asked for."""

    def __init__(self, what: str, name: str, advice: str) -> None:
        super().__init__(
            f"{what} refers to {name}, which is not on the list of names that can be read without executing "
            f"code; {advice}"
        )
        self.name = name


def safe_loads(data: bytes, what: str, advice: str) -> Any:
    """Unpickle plain data; the pickle can import nothing and call nothing but the stand-ins above.

    Args:
        data: the pickle.
        what: the thing being read, the subject of an error's sentence.
        advice: what to do where a name is refused, the end of that sentence.

    Raises:
        RefusedGlobal: the pickle names something outside the allow-list.
        CheckpointError: the pickle is damaged or holds something other than plain data.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full not in ALLOWED:
                raise RefusedGlobal(what, full, advice)
            return ALLOWED[full]

    try:
        return Unpickler(io.BytesIO(data)).load()
    except RefusedGlobal:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{what} is refused: {error}") from error
    except Exception as error:
        raise CheckpointError(
            f"{what} is damaged ({type(error).__name__}); save the policy again."
        ) from error


def to_array(value: Any) -> np.ndarray[Any, Any]:
    """The array behind a record, or the array itself."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, np.ndarray | np.generic | int | float):
        return np.asarray(value)
    raise CheckpointError("the file holds something else where an array belongs; save the policy again.")


def to_space(value: Any, what: str) -> spaces.Space[Any]:
    """Rebuild a Gymnasium space from its record, through the space's own constructor.

    Raises:
        CheckpointError: `value` is no record of a supported space, or its members do not fit together.
    """
    try:
        return _to_space(value)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what} is damaged ({type(error).__name__}); save the policy again."
        ) from error


def _to_space(value: Any) -> spaces.Space[Any]:
    kind = value.kind if isinstance(value, Record) else type(value).__name__
    match kind:
        case "Box":
            dtype = value.get("dtype")
            low = to_array(value.get("low"))
            dtype = dtype.value if isinstance(dtype, _DType) else low.dtype
            high = to_array(value.get("high")).astype(dtype)
            return spaces.Box(low.astype(dtype), high, low.shape, dtype=dtype.type)
        case "Discrete":
            return spaces.Discrete(int(value.get("n")), start=int(value.get("start", 0)))
        case "MultiDiscrete":
            nvec = to_array(value.get("nvec"))
            start = value.get("start")
            return spaces.MultiDiscrete(nvec, start=None if start is None else to_array(start))
        case "MultiBinary":
            n = value.get("n")
            return spaces.MultiBinary([int(i) for i in n] if isinstance(n, tuple | list) else int(n))
        case "Dict":
            members = [(str(key), _to_space(sub)) for key, sub in value.get("spaces").items()]
            return spaces.Dict(OrderedDict(members))
        case "Tuple":
            return spaces.Tuple([_to_space(sub) for sub in value.get("spaces")])
    raise CheckpointError(f"the file holds a {kind} where a Gymnasium space belongs; save the policy again.")
