"""Whole runs: killed, interrupted, out of disk, refused, offline."""
import csv
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, fit_command, papermill
from PIL import Image


def numbers(folder):
    """What a run found, without what depends on the clock."""
    (run,) = folder.glob("*/metrics.json")
    found = json.loads(run.read_text())
    with (run.parent / "history.csv").open() as f:
        history = list(csv.DictReader(f))
    return found["published"], found["controlled"], history


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    subprocess.run(fit_command(folder), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
                   check=True, capture_output=True)
    return numbers(folder)


def test_only_one_downloads(tmp_path, monkeypatch):
    """Runs that begin together on a bare machine wait for one download, and do not read what is half written."""
    from concurrent.futures import ThreadPoolExecutor

    from seqjepa_nb import images
    at_work, most = [], []
    def slow(root, download=False):
        at_work.append(download)
        most.append(len(at_work))
        time.sleep(0.1)
        at_work.pop()
        return "the digits"
    monkeypatch.setattr(images, "_mnist_files", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(images._mnist, [tmp_path / "data"] * 4))
    assert found == [("the digits", "mnist")] * 4 and most == [1] * 4


def test_a_learned_generator_is_kept(tmp_path, calm):
    """What the run says of its generator is what the file in its folder holds."""
    from seqjepa_nb import files, train
    from seqjepa_nb.config import make_config
    from seqjepa_nb.torus import Generator
    run = train.fit(make_config("rotation", "generator", "quick", device="cpu", overrides=TINY | {"width": 8, "epochs": 1}), tmp_path)
    tensors, meta = files.load_state(run.folder / "generator.safetensors")
    kept = Generator(2 * meta["planes"])
    kept.load_state_dict(tensors)
    found = kept.spectrum(torch.ones(1, 2 * meta["planes"]))
    assert found["frequencies"].tolist() == pytest.approx(run.metrics["controlled"]["generator"]["frequencies"], abs=1e-6)


def kill_after_epoch(folder, epochs, delay):
    """Start a run and SIGKILL it `delay` seconds after its state of `epochs` epochs is written; the seconds
    that its state counts by then."""
    from seqjepa_nb.files import load_state
    process = subprocess.Popen(fit_command(folder), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = 0
    while done < epochs and process.poll() is None:
        state = next(folder.glob("*/state.safetensors"), None)
        done = len(load_state(state)[1]["history"]) if state else 0
        time.sleep(0.01)
    assert process.poll() is None and done >= epochs, process.stdout.read().decode()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return sum(load_state(next(folder.glob("*/state.safetensors")))[1]["seconds"].values())


@pytest.mark.parametrize("epochs, delay", [(1, 0.0), (2, 0.15)], ids=["between epochs", "during an epoch"])
def test_killed_run_goes_on_to_the_same_numbers(tmp_path, calm, unbroken, epochs, delay):
    before = kill_after_epoch(tmp_path, epochs, delay)
    assert not list(tmp_path.glob("*/metrics.json"))
    started = time.time()
    done = subprocess.run(fit_command(tmp_path), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "going on after epoch" in done.stdout
    assert numbers(tmp_path) == unbroken
    (run,) = tmp_path.glob("*/metrics.json")
    spent = json.loads(run.read_text())["environment"]["wall_s"]
    assert before - 0.1 < spent <= before + time.time() - started + 0.1, (before, spent)


def test_kill_before_the_first_epoch_leaves_nothing_in_the_way(tmp_path, calm, unbroken):
    process = subprocess.Popen(fit_command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("*/config.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(fit_command(tmp_path), cwd=ROOT, check=True, capture_output=True)
    assert numbers(tmp_path) == unbroken


def test_interrupt_says_how_to_go_on(tmp_path, calm, unbroken):
    process = subprocess.Popen(fit_command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    while process.poll() is None and not list(tmp_path.glob("*/state.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "The same command goes on from there" in said
    subprocess.run(fit_command(tmp_path), cwd=ROOT, check=True, capture_output=True)
    assert numbers(tmp_path) == unbroken


def test_full_disk_keeps_the_last_whole_state(tmp_path, calm, unbroken):
    """A file can't grow past a limit, as on a full disk: the run fails with a clear error, no half file stays, and
    with room again it goes on."""
    kill_after_epoch(tmp_path, 1, 0.0)
    (state,) = tmp_path.glob("*/state.safetensors")
    before, names = state.read_bytes(), sorted(p.name for p in state.parent.iterdir())
    small = len(before) // 2
    failed = subprocess.run(fit_command(tmp_path), cwd=ROOT, capture_output=True, text=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    assert failed.returncode != 0 and "File too large" in failed.stderr, failed.stderr
    assert state.read_bytes() == before
    assert sorted(p.name for p in state.parent.iterdir()) == names
    subprocess.run(fit_command(tmp_path), cwd=ROOT, check=True, capture_output=True)
    assert numbers(tmp_path) == unbroken


def test_a_finished_run_is_not_trained_again(tmp_path, calm):
    subprocess.run(fit_command(tmp_path), cwd=ROOT, check=True, capture_output=True)
    (file,) = tmp_path.glob("*/metrics.json")
    stamp = file.stat().st_mtime_ns
    done = subprocess.run(fit_command(tmp_path), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "finished already" in done.stdout and file.stat().st_mtime_ns == stamp


def test_what_another_process_has_finished_meanwhile_is_not_trained_again(tmp_path, calm, monkeypatch):
    """Two commands at once: the second waits for nothing, but gets the lock only when the first is done."""
    from seqjepa_nb import files, train
    config, only_one = train.make_config("rotation", "random", "quick", device="cpu", overrides={"width": 2}), files.only_one

    @contextmanager
    def late(root, name):
        files.write_json(root / name / "config.json", config.to_dict())
        files.write_json(root / name / "metrics.json", {"run": 1})
        with only_one(root, name):
            yield
    monkeypatch.setattr(files, "only_one", late)
    monkeypatch.setattr(train, "_fit", None)
    assert train.fit(config, tmp_path).metrics == {"run": 1}


@pytest.mark.parametrize("name", ["train_epoch", "measured"])
def test_an_error_closes_the_log(tmp_path, calm, monkeypatch, name):
    """Weights & Biases is told that the run has failed, wherever it did; nothing is said twice, and the run that
    goes on is one that ended well."""
    from seqjepa_nb import logs, train
    config = train.make_config("rotation", "original", "quick", device="cpu", overrides=TINY | {"n_train": 64, "epochs": 1})
    start, codes = logs.start_wandb, []

    def watched(*arguments):
        log = start(*arguments)
        finish = log.finish
        log.finish = lambda exit_code: codes.append(exit_code) or finish(exit_code=exit_code)
        return log
    monkeypatch.setattr(logs, "start_wandb", watched)
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(train, name, lambda *a: 1 / 0)
        train.fit(config, tmp_path)
    assert codes == [1]
    train.fit(config, tmp_path)
    assert codes == [1, 0]


TINY_YAML = json.dumps({"overrides": TINY | {"epochs": 2}})


@pytest.mark.parametrize("mode", ["rotation", "multi", "translation", "scale"])
def test_papermill_runs_each_mode(tmp_path, calm, mode):
    out = tmp_path / "out.ipynb"
    done = papermill("nbs/20_train.ipynb", out, "-p", "mode", mode, "-p", "preset", "quick", "-p", "runs_dir",
                     tmp_path / "runs", "-y", TINY_YAML)
    assert done.returncode == 0, done.stderr
    assert "s/it" in done.stderr or "it/s" in done.stderr
    metrics = json.loads(next((tmp_path / "runs").glob("*/metrics.json")).read_text())
    assert metrics["run"]["mode"] == mode
    assert list(metrics["controlled"]["factors"]) == {"rotation": ["rotation"], "scale": ["scale"], "translation": ["x", "y"],
                                                      "multi": ["rotation", "x", "y", "scale"]}[mode]
    cells = json.loads(out.read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= (6 if mode in ("rotation", "multi") else 4)
    assert "**Finding.**" in "".join(outputs[-1]["data"]["text/markdown"])
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("arguments, words", [
    (["-p", "mode", "shear"], "rotation, translation, scale, multi"),
    (["-p", "modes", "rotation"], "unknown parameter modes. Valid: dataset, device, mode"),
    (["-p", "variant", "best"], "original"),
    (["-p", "preset", "huge"], "quick"),
    (["-p", "seed", "one"], "seed is a whole number"),
    (["-p", "device", "cuda:99"], "is not there"),
    (["-p", "dataset", "/no/such/folder"], "is not a folder"),
    (["-p", "wandb_mode", "sometimes"], "disabled"),
    (["-y", "{overrides: {lrr: 1}}"], "unknown names lrr"),
    (["-p", "overrides", "{epochs: 3}"], "overrides: names and values expected"),
    (["-y", "{overrides: {lr: .nan, decay: 2.0}}"], "lr is a finite number, not nan; decay is at most 1, not 2.0"),
])
def test_papermill_refuses_before_any_work(tmp_path, calm, arguments, words):
    done = papermill("nbs/20_train.ipynb", tmp_path / "out.ipynb", "-p", "runs_dir", tmp_path / "runs", *arguments)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert not list(tmp_path.glob("runs/[!.]*"))


def test_help_explains_every_parameter():
    from papermill.inspection import inspect_notebook
    found = inspect_notebook(str(ROOT / "nbs" / "20_train.ipynb"))
    assert set(found) == {"mode", "variant", "preset", "dataset", "seed", "device", "runs_dir", "wandb_mode", "overrides"}
    assert all(p["help"] for p in found.values())
    from seqjepa_nb.affine import MODES
    from seqjepa_nb.config import VARIANTS, Config
    listed = lambda name: found[name]["help"].split(": ")[-1]
    assert listed("variant").split(" | ") == list(VARIANTS) and listed("mode").split(" | ") == list(MODES)
    assert set(listed("overrides").split(", ")) == {f.name for f in dataclasses.fields(Config)} - set(found)


def test_without_a_network_the_digits_come_from_the_wheel(tmp_path, calm):
    """With every socket refused and no files, MNIST is the 5 000 digits, said in one line and recorded."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\ndef refuse(*a, **k): raise OSError('the network is cut off')\n"
        "socket.create_connection = socket.getaddrinfo = refuse\n")
    environment = os.environ | {"SEQJEPA_DATA": str(tmp_path / "data"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(fit_command(tmp_path / "runs"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum("mnist5k" in line and "MNIST is neither in" in line for line in done.stdout.splitlines()) == 1
    found = json.loads(next((tmp_path / "runs").glob("*/metrics.json")).read_text())
    assert found["environment"]["data"] == "mnist5k"


def test_photographs_go_all_the_way(tmp_path, calm):
    """CIFAR-10 from JPEG files by class: limited rotations, reflected borders, colour; all figures, both
    families, and what CRATE blocks do."""
    generator = np.random.default_rng(0)
    for part, n in (("train", 44), ("test", 12)):
        for name in ("cat", "ship", "truck"):
            (tmp_path / "data" / "CIFAR10" / part / name).mkdir(parents=True)
            for i in range(n):
                small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                small.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "data" / "CIFAR10" / part / name / f"{i:02d}.jpg")
    options = TINY | {"n_test": 36, "epochs": 1}
    code = (f"from seqjepa_nb.train import fit, make_config\nfor mode, variant in (('rotation', 'torus_phase'), ('multi', 'crate')):\n"
            f"    fit(make_config(mode, variant, 'quick', 'cifar10', device='cpu', overrides={options!r}), {str(tmp_path / 'runs')!r})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"SEQJEPA_DATA": str(tmp_path / "data")},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from seqjepa_nb import runs, tables, viz
    turned, crate = (next(r for r in runs.read_runs(tmp_path / "runs") if r.config["variant"] == v) for v in ("torus_phase", "crate"))
    for run, factors in ((turned, ["rotation"]), (crate, ["rotation", "x", "y", "scale"])):
        environment, found = run.metrics["environment"], run.metrics["controlled"]["factors"]
        assert (environment["data"], environment["train_images"], environment["test_images"]) == ("cifar10-folder", 128, 36)
        assert list(found) == factors and "circle" not in found["rotation"]
        numbers = [n for v in tables.flatten(run.metrics["controlled"]).values() for n in (v if isinstance(v, list) else [v])]
        assert all(isinstance(n, float) for n in numbers), "a controlled number is missing"
        assert ({"combined_trajectories", "eigs_rot", "rank_monitor", "rotation_circle", "sweep_traj_rot"}
                <= set(run.figures) <= set(viz.CAPTIONS))
    assert turned.metrics["controlled"]["factors"]["rotation"]["own_action_error"] >= 0
    blocks = crate.metrics["crate"]
    assert (len(blocks["layers"]) == len(blocks["sparsity"]) == 3
            and set(blocks["heads"]) == set(blocks["untrained"]["heads"]) == set(factors) and "head_heatmap" in crate.figures)
    assert blocks["sparsity"] != blocks["untrained"]["sparsity"]


def test_damaged_files_are_named(tmp_path):
    from seqjepa_nb.images import load_images
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        load_images("mnist", 10, 10, root=tmp_path)
    batch = tmp_path / "cifar-10-batches-bin"
    batch.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (batch / name).write_bytes(b"\x00" * 1000)
    with pytest.raises(ValueError, match="data_batch_1.bin is damaged"):
        load_images("cifar10", 10, 10, root=tmp_path)
