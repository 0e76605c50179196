"""Sweeps as a user starts them: one run fails, one is skipped, one is killed and resumed, Ctrl-C, what a killed sweep
leaves behind, Slurm's commands."""
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT, TINY

pytestmark = pytest.mark.xdist_group("sweep")
LONG = TINY | {"epochs": 400}


def write(folder, overrides, **more):
    file = folder / "sweep.yml"
    file.write_text(yaml.safe_dump({"runs": {"mode": "rotation", "preset": "quick", "device": "cpu", "overrides": overrides},
                                    "runs_dir": str(folder / "runs")} | more))
    return str(file)


def begin(file):
    return subprocess.Popen([sys.executable, "-m", "seqjepa_nb.sweep", file], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def kept(folder):
    from seqjepa_nb.files import load_state
    state = next(folder.glob("runs/*/state.safetensors"), None)
    return len(load_state(state)[1]["history"]) if state else 0


def wait_for(process, ready):
    while not ready() and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.stdout.read()


def at_work(folder):
    """Processes of the sweep's jobs: those that name its folder, and their children."""
    found = set()
    for p in psutil.process_iter(["cmdline"]):
        if any(str(folder / "runs") in word for word in p.info["cmdline"] or ()):
            found |= {p.pid, *(c.pid for c in p.children(recursive=True))}
    return found


@pytest.fixture()
def sweep(calm, capfd, monkeypatch):
    """The command in this process, which spares an import: its exit code and what it said."""
    from seqjepa_nb.sweep import main
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        code = main(list(arguments))
        return code, "".join(capfd.readouterr())
    usual = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, usual)


def test_a_failing_run_stops_no_other_and_a_finished_one_is_skipped(tmp_path, sweep):
    file = write(tmp_path, [TINY | {"lr": 1e30}, TINY | {"epochs": 1}])
    code, said = sweep(file)
    assert code == 1 and "2 runs, 0 finished, 2 to do" in said, said
    assert "failed, FloatingPointError: the loss was not finite at step" in said and "1 of 2 finished, 1 failed" in said, said
    (done,) = tmp_path.glob("runs/*/metrics.json")
    assert json.loads((tmp_path / "runs" / f"{done.parent.name}.ipynb").read_text())["cells"]  # beside the run, as book/publish.py wants it
    stamp = done.stat().st_mtime_ns
    write(tmp_path, TINY | {"epochs": 1})
    code, said = sweep(file)
    assert code == 0 and "nothing to do" in said and done.stat().st_mtime_ns == stamp, said


def test_interrupted_it_leaves_no_process_and_goes_on(tmp_path, sweep):
    """Ctrl-C leaves no process; the same command goes on; killed, it leaves its job behind, which the next
    one ends before anything else."""
    file = write(tmp_path, LONG)
    process = begin(file)
    wait_for(process, lambda: kept(tmp_path) >= 2)
    assert at_work(tmp_path)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "cancelled" in said and "The same command goes on" in said, said
    assert not at_work(tmp_path)
    before = kept(tmp_path)
    process = begin(file)
    seen = []
    wait_for(process, lambda: seen.append(kept(tmp_path)) or seen[-1] > before)
    assert min(seen) == before  # a run from the beginning would have kept one epoch first
    process.kill()
    process.wait()
    left, before = at_work(tmp_path), kept(tmp_path)
    assert left and 2 < before < LONG["epochs"]
    from seqjepa_nb.sweep import read_sweep, stands
    state, epochs, spent = stands(read_sweep(file).jobs[0])  # of a state that training wrote
    assert state == "broken" and epochs >= before and spent > 0
    code, said = sweep(file, "--budget", "0")
    assert code == 0 and "1 not done within the budget" in said and not at_work(tmp_path), said
    assert kept(tmp_path) >= before


def test_a_job_is_stopped_after_its_minutes(tmp_path, calm):
    """Not before, nothing of it is left, and it is said so."""
    from seqjepa_nb.sweep import Job, Sweep, read_sweep, run_sweep

    class Long(Job):
        def command(self, threads=1, card=None):
            return [sys.executable, "-c", "import time; time.sleep(60)", str(self.folder)]
    (job,) = read_sweep(write(tmp_path, TINY)).jobs
    begun = time.time()
    states = run_sweep(Sweep([Long(job.notebook, job.parameters, job.config, job.folder)], tmp_path / "runs", minutes=0.1), poll=0.1)
    assert [*states.values()] == ["failed, stopped after 0.1 min, its whole epochs are kept"]
    assert 4.5 < time.time() - begun < 30 and not at_work(tmp_path)


@pytest.mark.parametrize("text, words", [("runs: {mode: shear, preset: quick}", "rotation, translation, scale, multi"),
                                         ("runs: {preset: quick, epochs: 3}", "unknown epochs. Valid: notebook, mode"),
                                         ("runs: {preset: quick, overrides: 5}", "overrides: names and values expected"),
                                         ("runs: {preset: quick, seed: []}", "seed without a value"),
                                         ("runs: {preset: quick, dataset: minst}", "'minst' is no folder"),
                                         ("runs: {preset: quick, notebook: {a: 1}}", "notebook is one of 20_train")])
def test_refused_before_any_work(tmp_path, sweep, text, words):
    (tmp_path / "s.yml").write_text(text)
    code, said = sweep(str(tmp_path / "s.yml"), "--runs-dir", str(tmp_path / "runs"))
    assert code == 2 and words in said and not (tmp_path / "runs").exists(), said


def test_dry_run_of_the_reproduction(tmp_path, sweep):
    code, said = sweep("sweeps/reproduction.yml", "--dry-run", "--executor", "slurm", "--runs-dir", str(tmp_path))
    assert (code == 0 and said.count("papermill nbs/20_train.ipynb") == 6 and "Slurm: 1440 minutes" in said
            and not list(tmp_path.iterdir())), said


def test_every_published_run_is_in_a_sweep():
    """So the sweeps, all of them, make the report's runs again."""
    from seqjepa_nb.sweep import read_sweep
    made = {job.folder.name for path in (ROOT / "sweeps").glob("*.yml") for job in read_sweep(path, executor="slurm").jobs}
    published = {path.parent.name for path in ROOT.glob("book/runs/*/config.json")}
    assert len(published) > 100 and not published - made, f"add these to a file in sweeps/: {sorted(published - made)}"


def test_slurm_gets_each_job(tmp_path, calm, monkeypatch):
    """A stand-in for the cluster's commands that runs what it is given: the job is submitted with its limits, its end is seen."""
    from seqjepa_nb.files import write_json
    from seqjepa_nb.sweep import read_sweep, run_sweep
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": "exit 0", "scancel": f"echo $* >> {tmp_path}/scancel",
                       "sacct": "echo 'JobID|State|NodeList'; echo '7|COMPLETED|n'",
                       "sbatch": f"cp $1 {tmp_path}/batch.sh; echo Submitted batch job 7"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    write(tmp_path, TINY, executor="slurm", slurm={"partition": "gpu"}, minutes=7, threads=3)
    found = read_sweep(tmp_path / "sweep.yml")
    states = run_sweep(found, poll=0.1)
    text = (tmp_path / "batch.sh").read_text()
    assert "--partition=gpu" in text and "--time=7" in text and "--cpus-per-task=3" in text, text
    assert list(states.values())[0].startswith("failed")  # nothing has trained
    (tools / "sbatch").write_text(f"#!/bin/sh\ncp -r {tmp_path}/done {found.jobs[0].folder}; echo Submitted batch job 7\n")
    write_json(tmp_path / "done" / "config.json", found.jobs[0].config.to_dict() | {"device": "cuda", "precision": "bfloat16"})
    write_json(tmp_path / "done" / "metrics.json", {"run": 1})
    assert [*run_sweep(found, poll=0.1).values()] == ["finished"]  # a job that leaves its numbers, of a machine that this one does not know
