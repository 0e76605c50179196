"""`make report`: train both modes on this machine, build the site, say where it is and how long each part took."""
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MODES = ("rotation", "multi")
PAGE = ROOT / "book" / "_build" / "html" / "index.html"


def clock(seconds):
    """Seconds as minutes and seconds."""
    return f"{int(seconds) // 60:3d} min {int(seconds) % 60:02d} s"


def train(mode):
    """Run the training notebook in one mode, with the preset that suits the machine; the exit code."""
    command = [BIN / "papermill", "nbs/20_train.ipynb", f"runs/{mode}.ipynb", "-p", "mode", mode, "--no-progress-bar",
               "--log-level", "WARNING"]
    return subprocess.run(command, cwd=ROOT).returncode


def build_site():
    """Build the site, a line for each notebook that was executed, the whole log only if it fails; the exit code."""
    command = [BIN / "jupyter-book", "build", "book", "-W", "-n", "--keep-going", "--all"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # a page's small computations are fastest so
    process = subprocess.Popen(command, cwd=ROOT, env=one_thread, text=True, errors="replace", stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    log, written = [], 0
    for line in process.stdout:
        log.append(line)
        if done := re.search(r"([^/]+)\.ipynb: Executed notebook in ([\d.]+) seconds, (\d+) of (\d+)", line):
            print(f"{done[1]:<18} {float(done[2]):5.0f} s   {done[3]} of {done[4]}"
                  + (", then the pages are written, in some minutes" if done[3] == done[4] else ""), flush=True)
        elif (done := re.search(r"writing output.*?\[ *(\d+)%\]", line)) and int(done[1]) >= written + 20:
            print(f"{(written := int(done[1]))} % of the pages are written", flush=True)
    if process.wait():
        print("".join(log))
    return process.returncode


def main(started):
    import torch

    gpu = torch.cuda.is_available()
    took = {"install and check": time.time() - started}
    print(f"Plan: train {' and '.join(MODES)} with preset {'base' if gpu else 'quick'} on the {'GPU' if gpu else 'CPU'}, "
          "then build the site.")
    print("On two cores and no GPU: about two to four minutes a mode, five to eight for the site, its pages two at a time. "
          "Finished runs are not trained again.", flush=True)
    (ROOT / "runs").mkdir(exist_ok=True)
    parts = {f"train {mode}": partial(train, mode) for mode in MODES} | {"build the site": build_site}
    for name, part in parts.items():
        print(f"\n--- {name}", flush=True)
        begun = time.time()
        code = part()
        took[name] = time.time() - begun
        if code:
            sys.exit(f"'{name}' failed after {clock(took[name]).strip()}: see above. Once that is mended, "
                     "the same command goes on from there.")
    print("\n" + "\n".join(f"{name:<18} {clock(s)}" for name, s in took.items()))
    print(f"{'together':<18} {clock(time.time() - started)}\n\nThe report: {PAGE.as_uri()}")


if __name__ == "__main__":
    main(float(sys.argv[1]))
