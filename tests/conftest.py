"""The scripts are not a package: they are loaded by path, from the repository root.

SMAC_SCRIPT and RECORDER_SCRIPT name another copy, to see the tests fail on a line broken on purpose.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


def load(name: str, path: Path) -> ModuleType:
    """The script as a module; in sys.modules, where dataclasses look for their annotations."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def returns_of(script: ModuleType, *arguments) -> np.ndarray:
    """Returns (E,) of the episodes of script.evaluate(*arguments)."""
    return np.array([rewards.sum() for rewards in script.evaluate(*arguments)])


@pytest.fixture(scope="session")
def smac() -> ModuleType:
    """smac_offline_online.py"""
    path = os.environ.get("SMAC_SCRIPT", ROOT / "smac_offline_online.py")
    return load("smac_offline_online", Path(path))


@pytest.fixture(scope="session")
def recorder() -> ModuleType:
    """make_dataset.py"""
    return load("make_dataset", Path(os.environ.get("RECORDER_SCRIPT", ROOT / "make_dataset.py")))
