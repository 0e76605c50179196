"""One build of the book for all tests that look at it."""
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@functools.cache
def build():
    """Build the book with warnings as errors: `.html` (folder), `.log` (text), `.code` (exit status)."""
    html = ROOT / "book" / "_build" / "html"
    shutil.rmtree(html, ignore_errors=True)
    done = subprocess.run([BIN / "jupyter-book", "build", "book", "-W", "-n", "--keep-going", "--all"], cwd=ROOT, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return SimpleNamespace(html=html, log=re.sub(r"\x1b\[[0-9;]*m", "", done.stdout), code=done.returncode)


@pytest.fixture(scope="session")
def site():
    """The built book, see `build`."""
    return build()
