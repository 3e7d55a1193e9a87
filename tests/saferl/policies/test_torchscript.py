"""TorchScript programs: protocol, and refusal of programs that reach beyond tensors."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saferl.errors import CheckpointError, UsageError
from saferl.policies import Policy, load_policy

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(3), nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)
        )

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.body(obs)
        return mean, mean.exp()

    @torch.jit.export
    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        mean = self.body(obs)
        return mean if deterministic else mean + torch.randn_like(mean)


class DictPolicy(nn.Module):
    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        return torch.cat([obs["a"].float(), obs["b"]], dim=1)


class Recurrent(nn.Module):
    """Uses much of the serialised language: loops, exceptions, functional calls, lists."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.conv = nn.Conv1d(1, 2, 2)

    def forward(self, obs: Tensor) -> Tensor:
        if obs.dim() != 2:
            raise ValueError("two axes")
        out, _ = self.rnn(obs[:, None])
        parts: list[Tensor] = []
        for i in range(2):
            parts.append(torch.nn.functional.gelu(out[:, 0, i : i + 2]))
        return torch.stack(parts, 1).sum(1) + self.conv(obs[:, None]).mean(2)


def test_scripted_sampling_policy(tmp_path: Path) -> None:
    module = Sampler()
    torch.jit.script(module).save(tmp_path / "p.pt")
    policy = load_policy(tmp_path / "p.pt")
    assert isinstance(policy, Policy)
    assert policy.observation_space is None
    assert policy.action_space is None
    obs = np.random.default_rng(0).normal(size=(5, 3))  # float64: taken to the weights' type
    with torch.no_grad():
        expected = module.eval()(torch.as_tensor(obs).float())[0]
    actions = policy.act(obs, deterministic=True)
    assert isinstance(actions, np.ndarray)
    np.testing.assert_array_equal(actions, expected.numpy())
    assert torch.equal(policy.act(torch.as_tensor(obs), deterministic=True), expected)
    assert not np.array_equal(policy.act(obs), policy.act(obs))


@pytest.mark.parametrize("suffix", [".pt", ".ts", ".torchscript"])
def test_traced_network_and_tuple_output(tmp_path: Path, suffix: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    ).eval()
    torch.jit.trace(net, torch.zeros(1, 3, 8, 8)).save(tmp_path / f"p{suffix}")
    obs = torch.randn(6, 3, 8, 8)
    actions = load_policy(tmp_path / f"p{suffix}").act(obs)
    assert not actions.requires_grad
    torch.testing.assert_close(actions, net(obs).detach(), rtol=0, atol=1e-6)


def test_dict_observations_and_wider_language(tmp_path: Path) -> None:
    torch.jit.script(DictPolicy()).save(tmp_path / "d.pt")
    obs = {"a": np.ones((4, 2), np.int64), "b": np.zeros((4, 1))}
    np.testing.assert_array_equal(load_policy(tmp_path / "d.pt").act(obs), [[1, 1, 0]] * 4)
    module = Recurrent()
    torch.jit.script(module).save(tmp_path / "r.pt")
    x = torch.randn(4, 3)
    torch.testing.assert_close(load_policy(tmp_path / "r.pt").act(x), module(x).detach())


def test_wrong_use_is_one_sentence(tmp_path: Path) -> None:
    torch.jit.script(Sampler()).save(tmp_path / "p.pt")
    policy = load_policy(tmp_path / "p.pt")
    for obs in (np.zeros((2, 4)), np.float32(1.0), np.zeros((0, 2))):
        with pytest.raises(UsageError) as caught:
            policy.act(obs)
        assert "\n" not in str(caught.value)
    torch.jit.script(nn.Flatten(0)).save(tmp_path / "f.pt")
    with pytest.raises(UsageError, match="one action"):
        load_policy(tmp_path / "f.pt").act(np.zeros((2, 3)))


# --- hostile and damaged files ---------------------------------------------------------------------------


class Saves(nn.Module):
    def forward(self, obs: Tensor, path: str = "mark") -> Tensor:
        torch.save(obs, path)
        return obs


class Maps(nn.Module):
    def forward(self, obs: Tensor, path: str = "mark") -> Tensor:
        return obs + torch.from_file(path, shared=True, size=4).fill_(1.0).sum()


class Unsafe(nn.Module):
    def forward(self, obs: Tensor) -> Tensor:
        return torch._unsafe_index(obs, [torch.tensor([10**9])])


@pytest.mark.parametrize(
    ("module", "operator"), [(Saves, "save"), (Maps, "from_file"), (Unsafe, "_unsafe_index")]
)
def test_programs_that_reach_files_or_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: type[nn.Module], operator: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(module()).save(tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match=operator):
        load_policy(tmp_path / "p.pt")
    if module is not Unsafe:
        torch.jit.load(tmp_path / "p.pt")(torch.zeros(2))  # torch itself runs it
        assert (tmp_path / "mark").exists()


def splice(source: Path, target: Path, old: str, new: str) -> Path:
    """Copy a TorchScript file with its program's text changed."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as out:
        for info in archive.infolist():
            content = archive.read(info)
            if info.filename.endswith(".py"):
                content = content.replace(old.encode(), new.encode())
            out.writestr(info.filename, content)
    return target


class Plain(nn.Module):
    def forward(self, obs: Tensor) -> Tensor:
        return torch.neg(obs)


@pytest.mark.parametrize(
    "body",
    [
        'ops.aten.save(obs, "mark")',
        '"mark".from_file()',
        'obs.save("mark")',
        'getattr(obs, "save")("mark")',
        'getattr(obs, "sa" "ve")("mark")',
        'getattr(obs, "\\163ave")("mark")',
        'getattr(torch, "relu")(obs)',
        "ops.symm_mem.nvshmem_broadcast(obs, \"mark\")",
        "ops.prim.PythonOp(obs)",
        "ops.prim.rpc_sync(obs)",
        "ops.prim",
        "ops",
        "torch",
        "__torch__.torch",
        "__torch__.torch.classes.aoti.Model(obs)",
        "(torch).save(obs)",
        "torch . \\\n    save(obs)",
    ],
)  # fmt: skip
def test_disguised_operators_are_refused(tmp_path: Path, body: str) -> None:
    torch.jit.script(Plain()).save(tmp_path / "plain.pt")
    bad = splice(
        tmp_path / "plain.pt", tmp_path / "bad.pt", "return torch.neg(obs)", f"_0 = {body}\n    return obs"
    )
    with pytest.raises(CheckpointError, match="is refused"):
        load_policy(bad)
    good = splice(tmp_path / "plain.pt", tmp_path / "good.pt", "torch.neg(obs)", "torch.relu(obs)")
    assert load_policy(good).act(np.array([-1.0])) == 0.0


def test_duplicate_members_cannot_hide_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Plain()).save(tmp_path / "p.pt")
    code = next(n for n in zipfile.ZipFile("p.pt").namelist() if n.endswith(".py"))
    text = zipfile.ZipFile("p.pt").read(code)
    evil = text.replace(b"return torch.neg(obs)", b'torch.save(obs, "mark")\n    return obs')
    for first, second in ((evil, text), (text, evil)):
        with zipfile.ZipFile("p.pt") as old, zipfile.ZipFile("two.pt", "w") as new:
            for name in old.namelist():
                if name == code:
                    new.writestr(name, first)
                    with pytest.warns(UserWarning, match="Duplicate"):
                        new.writestr(name, second)
                else:
                    new.writestr(name, old.read(name))
        with contextlib.suppress(CheckpointError):
            load_policy("two.pt").act(np.zeros(2))
        assert not Path("mark").exists()


def test_extension_classes_in_pickles_are_refused(tmp_path: Path) -> None:
    torch.jit.script(Plain()).save(tmp_path / "p.pt")
    for pickled in (
        b"\x80\x02c__torch__.torch\nclasses.aoti.Model\n.",
        b"\x80\x02c__torch__.torch.classes.a\nB\n.",
    ):
        with zipfile.ZipFile(tmp_path / "p.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
            for name in old.namelist():
                new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
        with pytest.raises(CheckpointError, match=r"torch\.classes"):
            load_policy(tmp_path / "b.pt")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    torch.jit.script(Sampler()).save(tmp_path / "p.pt")
    whole = (tmp_path / "p.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            load_policy(tmp_path / "cut.pt")
    torch.save(Sampler().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"torch\.jit\.trace"):
        load_policy(tmp_path / "weights.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"bare\.pt"):
        load_policy(tmp_path / "bare.pt")
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),)), buffer)
    (tmp_path / "program.pt2").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"torch\.export"):
        load_policy(tmp_path / "program.pt2")
