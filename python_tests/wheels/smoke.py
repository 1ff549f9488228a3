"""Run by the Python of a clean environment, outside the sources: does an installed wheel work there?

Self-contained: nothing but the wheel, torch and what they require is installed. Prints the steps that ran, exits with
1 and a traceback at the first that fails.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import torch
from torch import nn

import lowrank_kernels as lk
import lowrank_kernels.cuda_library


class Model(nn.Module):
    """Two linear layers, one of them with sizes that fit no tile."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 200), nn.Linear(200, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def model() -> Model:
    """Always the same one, its adapter (rank 8) no longer zero."""
    torch.manual_seed(0)
    model = Model()
    lk.replace_linear(model, r=8, lora_dropout=0.0, progress=False)
    for layer in (model.up, model.down):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return model


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def installed() -> None:
    site = pathlib.Path(sysconfig.get_path("platlib")).resolve()
    here = pathlib.Path(lk.__file__).resolve()
    assert site in here.parents, f"{here} was imported, expected one below {site}"
    report = lk.backends.report()
    assert report["active"] == "cpu", report
    heavy = {"peft", "transformers", "trl", "triton", "bitsandbytes"} & set(sys.modules)
    assert not heavy, f"import lowrank_kernels imported {heavy}"


def doctor() -> None:
    command = [sys.executable, "-I", "-m", "lowrank_kernels", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    end, code = "all good", 0
    cuda = lk.cuda_library.path().exists() and torch.version.cuda is not None
    if cuda and not torch.cuda.is_available():  # all of it was meant for a GPU: that is a finding
        assert "CUDA FAILED: torch finds no usable GPU" in result.stdout, "no GPU, and it is silent"
        end, code = "1 problem(s)", 1
    assert result.stdout.rstrip().endswith(end), f"doctor does not end with {end}"
    assert result.returncode == code, f"doctor: exit code {result.returncode}, expected {code}"


def training() -> None:
    """The first step has the reference's gradients; 20 steps halve the loss and move adapters alone."""
    trained, x, target = model(), torch.randn(33, 64), torch.randn(33, 64)
    adapters = [p for p in trained.parameters() if p.requires_grad]
    assert len(adapters) == 4
    frozen = {name: t.clone() for name, t in trained.state_dict().items() if "lora_" not in name}

    def loss() -> torch.Tensor:
        return (trained(x) - target).square().mean()

    got = torch.autograd.grad(loss(), adapters)
    with lk.backends.use("reference"):
        expected = torch.autograd.grad(loss(), adapters)
    for g, e in zip(got, expected):
        close(g, e)

    optimizer = torch.optim.Adam(adapters, lr=1e-2)
    first = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first / 2, f"loss {first} became {loss().item()}"
    for name, before in frozen.items():
        assert torch.equal(trained.state_dict()[name], before), f"{name} changed"


def many_adapters() -> None:
    """Rows of one batch with different adapters or none give what each gives alone."""
    mixed, x = model(), torch.randn(5, 64)
    for layer in (mixed.up, mixed.down):
        layer.add_adapter("other", 3)
        nn.init.normal_(layer.lora_B["other"].weight)
    names = ["default", "other", None, "other", "default"]
    bank = lk.AdapterBank.for_model(mixed, num_pages=4)
    bank.load("default")
    bank.load("other")
    with torch.no_grad():
        with bank.using(bank.plan(names)):
            together = mixed(x)
        for row, name in enumerate(names):
            for layer in (mixed.up, mixed.down):
                layer.disable_adapters() if name is None else layer.enable_adapters()
                if name is not None:
                    layer.set_adapter(name)
            close(together[row], mixed(x[row]))


def files() -> None:
    """An adapter that was saved and loaded gives the same bits."""
    saved, loaded, x = model(), model(), torch.randn(5, 64)
    nn.init.normal_(saved.up.lora_A["default"].weight)
    assert not torch.equal(saved(x), loaded(x))
    with tempfile.TemporaryDirectory() as folder:
        lk.save_adapter(saved, folder)
        lk.load_adapter(loaded, folder)
    assert torch.equal(saved(x), loaded(x))


def compiled() -> None:
    """torch.compile without a graph break: forward and gradients as without."""
    eager, x = model(), torch.randn(7, 64)
    adapters = [p for p in eager.parameters() if p.requires_grad]
    fast = torch.compile(eager, fullgraph=True)
    close(fast(x), eager(x))
    got = torch.autograd.grad(fast(x).square().sum(), adapters)
    for g, e in zip(got, torch.autograd.grad(eager(x).square().sum(), adapters)):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-3)


def main() -> None:
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    steps = [installed, doctor, training, many_adapters, files]
    # Inductor compiles C++ that includes Python.h.
    if shutil.which("g++") and pathlib.Path(sysconfig.get_path("include"), "Python.h").exists():
        steps.append(compiled)
    for step in steps:
        step()
    print("ran:", ", ".join(step.__name__.replace("_", " ") for step in steps))


if __name__ == "__main__":
    main()
