"""The scripts are not a package: they are loaded by path, from the repository root.

SMAC_SCRIPT and RECORDER_SCRIPT name another copy, to see the tests fail on a line broken on purpose.
"""

import contextlib
import csv
import importlib.util
import io
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for spawned workers: `pytest`, unlike `python -m pytest`, leaves it out


def load(name: str, path: Path) -> ModuleType:
    """The script as a module; in sys.modules, where dataclasses look for their annotations."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Result(NamedTuple):
    code: int | str  # what the script ended with: 0, or its sentence
    output: str
    directory: Path | None

    def rows(self) -> list[dict[str, str]]:
        with open(self.directory / "metrics.csv") as file:
            return list(csv.DictReader(file))

    def state(self, name: str = "final.pt") -> dict:
        return torch.load(self.directory / name, weights_only=True)

    def agent(self, name: str = "final.pt") -> dict[str, torch.Tensor]:
        return self.state(name)["parts"]["agent"]


@contextlib.contextmanager
def command_line(script: ModuleType, words: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *shlex.split(words)])
        yield


def inside(script: ModuleType, words: str, folder: Path) -> Result:
    """main() in this process and in a folder that holds no other run: a fraction of a new process's time."""
    folder.mkdir(exist_ok=True)
    output, code = io.StringIO(), 0
    with command_line(script, words), contextlib.chdir(folder), contextlib.redirect_stdout(output):
        try:
            script.main()
        except SystemExit as ended:
            code = ended.code
    return Result(code, output.getvalue(), next(folder.glob("runs/*"), None))


@pytest.fixture(scope="session")
def smac() -> ModuleType:
    """smac_offline_online.py"""
    path = os.environ.get("SMAC_SCRIPT", ROOT / "smac_offline_online.py")
    return load("smac_offline_online", Path(path))


@pytest.fixture(scope="session")
def recorder() -> ModuleType:
    """make_dataset.py"""
    return load("make_dataset", Path(os.environ.get("RECORDER_SCRIPT", ROOT / "make_dataset.py")))
