"""What several test files share: the root, a run that takes seconds, and the commands that start one."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = {"width": 2, "n_train": 128, "n_test": 64, "batch": 16, "epochs": 4, "precision": "float32"}


@pytest.fixture()
def calm(monkeypatch):
    """No W&B files unless a test asks for them; one thread, so that numbers don't depend on the load."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def papermill(notebook, out, *more):
    """Run a notebook from the root as a user would; returns the finished process."""
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), *map(str, more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def fit_command(folder):
    """The command that trains a tiny run into `folder`."""
    options = {"mode": "rotation", "preset": "quick", "device": "cpu", "overrides": TINY}
    code = f"from seqjepa_nb.train import fit, make_config; fit(make_config(**{options!r}), {str(folder)!r})"
    return [sys.executable, "-c", code]
