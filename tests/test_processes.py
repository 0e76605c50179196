"""Two CPU processes train as one does: the same losses, one writer, the same run."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

STEPS = 20
LOSSES = """
import json, sys, torch
from seqjepa_nb import processes, train
torch.set_num_threads(1)
processes.join("cpu")
found = {"processes": processes.count()}
for kind in ("single", "double"):
    if kind == "double":  # so that rounding, which training amplifies, does not decide
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float, views = torch.Tensor.double, train.make_views
        train.make_views = lambda *a: views(*a).double()
    for variant, overrides in ({"original": {}} | ({"teacherless": {"rate_on": "projector"}} if kind == "double" else {})).items():
        c = train.make_config("multi", variant, "quick", device="cpu",
                              overrides={"width": 4, "n_train": 64, "n_test": 32, "batch": 64, "epochs": STEPS,
                                         "precision": "float32"} | overrides)
        step = train.Step(c, *train.prepare(c))
        rows = [train.train_epoch(c, step, e) for e in range(c.epochs)]  # one step each
        found[f"{kind} {variant}"] = [r["loss"] for r in rows] + [float(p.detach().square().sum()) for p in step.probes.parameters()]
if processes.first():
    open(sys.argv[1], "w").write(json.dumps(found))
""".replace("STEPS", str(STEPS))
ENV = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command):
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_first_twenty_losses_equal_one_process(tmp_path):
    """Dropout, BatchNorm, the rate over the whole batch, the slow copy and the online probes included. In float32 rounding grows
    from step to step, as it does between any two orders of summation."""
    (tmp_path / "losses.py").write_text(LOSSES)
    for name, launcher in (("one", [sys.executable]), ("two", TWO)):
        run([*launcher, str(tmp_path / "losses.py"), str(tmp_path / name)])
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    for kind, found in one.items():
        steps, other = found[:STEPS], two[kind][:STEPS]
        gaps = [abs(a - b) for a, b in zip(steps, other)]
        print(kind, [f"{g:.0e}" for g in gaps])
        assert len(set(steps)) == STEPS and max(gaps) > 0, kind
        assert max(gaps if "double" in kind else gaps[:8]) < 1e-5, (kind, gaps)
        assert found[STEPS:] == pytest.approx(two[kind][STEPS:], rel=1e-6 if "double" in kind else 1e-2)


def test_a_launched_run_has_one_writer(tmp_path):
    words = ["mode=rotation", "preset=quick", "device=cpu", f"runs_dir={tmp_path}", f"overrides={json.dumps(TINY | {'epochs': 2})}"]
    said = run([*TWO, "-m", "seqjepa_nb.train", *words])
    (folder,) = tmp_path.glob("[!.]*")
    assert ({"config.json", "metrics.json", "history.csv", "figures", "model.json", "model.safetensors"}
            == {p.name for p in folder.iterdir()} - {"wandb"})
    assert said.count("2 epochs on cpu") == 1, said
    before = (folder / "metrics.json").stat().st_mtime_ns
    again = run([sys.executable, "-m", "seqjepa_nb.train", *words])
    assert "finished already" in again and (folder / "metrics.json").stat().st_mtime_ns == before
