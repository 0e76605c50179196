"""What a run leaves on the disk: whole files under every fault, a W&B log that can be read back, progress in the terminal."""
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import seqjepa_nb
from seqjepa_nb import files, logs, runs, settings, tables

CONFIG = {"mode": "rotation", "variant": "original", "preset": "quick", "dataset": "mnist", "seed": 0}


def figure():
    fig = Figure((3, 2))
    fig.subplots().plot([1, 4, 9])
    return fig


WRITERS = {
    "text": lambda path, n: files.write_text(path, "0123456789" * n),
    "json": lambda path, n: files.write_json(path, {"values": list(range(n))}),
    "figure": lambda path, n: files.write_figure(path, figure(), dpi=50 + n // 100),
    "history": lambda path, n: files.write_history(path.parent, [{"epoch": i, "loss": i / 7} for i in range(n)]),
    "state": lambda path, n: files.save_state(path, {"w": torch.arange(n, dtype=torch.float32)}, {"epoch": n}),
}


@contextmanager
def room_for(n_bytes):
    """No file of this process can grow beyond `n_bytes`, as on a full disk: what fits is written, then the system refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("old", [True, False])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, kind, old):
    path = tmp_path / ("history.csv" if kind == "history" else f"file.{kind}")
    if old:
        WRITERS[kind](path, 10)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with room_for(600), pytest.raises(OSError):
        WRITERS[kind](path, 5000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    WRITERS[kind](path, 5000)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.stat().st_size > 600


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_no_space_left(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"r2": 1})
    (tmp_path / ".metrics.json.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"r2": 2})
    assert os.listdir(tmp_path) == ["metrics.json"] and json.loads(path.read_text()) == {"r2": 1}


def test_killed_while_writing(tmp_path):
    path = tmp_path / "state.safetensors"
    code = ("import sys, torch; from seqjepa_nb.files import save_state\n"
            "for i in range(10**6): save_state(sys.argv[1], {'w': torch.full((200_000,), float(i))}, {'epoch': i}); print(i, flush=True)")
    for wait in (0.0, 0.013, 0.031):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        while int(child.stdout.readline()) < 5:
            pass
        time.sleep(wait)
        child.kill()
        child.communicate()
        tensors, meta = files.load_state(path)
        assert meta["epoch"] >= 5 and torch.equal(tensors["w"], torch.full((200_000,), float(meta["epoch"])))
    files.save_state(path, {"w": torch.zeros(1)}, {"epoch": 0})
    assert os.listdir(tmp_path) == [path.name], "what the kill left behind is gone after the next write"


def test_state_round_trip_is_exact(tmp_path):
    tensors = {"f": torch.randn(5, 3).T, "i": torch.arange(4), "b": torch.randn(3).bfloat16(),
               "n": torch.tensor([float("nan"), float("inf")]), "empty": torch.zeros(0, 2)}
    files.save_state(tmp_path / "s", tensors, {"history": [{"loss": 1 / 3}], "wandb_id": None})
    back, meta = files.load_state(tmp_path / "s")
    assert meta == {"history": [{"loss": 1 / 3}], "wandb_id": None} and set(back) == set(tensors)
    assert all(back[k].dtype == v.dtype and torch.equal(back[k].nan_to_num(7), v.nan_to_num(7)) for k, v in tensors.items())


def test_damaged_state_names_file_and_remedy(tmp_path):
    path = tmp_path / "state.safetensors"
    files.save_state(path, {"w": torch.zeros(100)}, {"epoch": 1})
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1], b"<html>" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*[Rr]emove it"):
            files.load_state(path)
    from safetensors.torch import save_file
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="damaged"):
        files.load_state(path)
    with pytest.raises(FileNotFoundError):
        files.load_state(tmp_path / "nowhere.safetensors")


def make_run(root, seed=0, metrics=None, **config):
    config = CONFIG | {"seed": seed} | config
    folder = root / settings.run_name(config)
    files.write_json(folder / "config.json", config)
    if metrics is not None:
        files.write_json(folder / "metrics.json", metrics)
        files.write_history(folder, [{"epoch": 1, "loss": 0.5}])
        files.write_figure(folder / "figures" / "eigs_rot.png", figure())
    return folder


def test_read_runs_on_a_mixture(tmp_path):
    here, there = tmp_path / "runs", tmp_path / "published"
    make_run(here, 0, {"published": {"r2": 0.25}, "controlled": {"class_z": None}})
    make_run(here, 1)
    make_run(here, 2, {"published": {"r2": 0.5}, "lie": {"snr": 11.3, "restarts": [11.3, 4.6]}}, variant="lie")
    make_run(there, 0, {"published": {"r2": 0.75}})
    (here / "stray").mkdir()
    (here / "stray" / "metrics.json").write_text("{}")
    (here / "README.md").write_text("no run")
    (here / "rotation-original-quick-mnist-s1" / "figures").mkdir()
    (here / "rotation-original-quick-mnist-s1" / "figures" / ".eigs_rot.png.part").write_bytes(b"half")
    found = runs.read_runs(here, there, tmp_path / "not there")
    assert [(r.folder.parent.name, r.name, r.finished) for r in found] == [
        ("runs", "rotation-lie-quick-mnist-s2", True), ("runs", "rotation-original-quick-mnist-s0", True),
        ("runs", "rotation-original-quick-mnist-s1", False), ("published", "rotation-original-quick-mnist-s0", True)]
    assert found[2].metrics == {} and found[2].figures == {} and found[2].history.empty
    assert list(found[0].figures) == ["eigs_rot"] and found[0].history["loss"].tolist() == [0.5]

    table = tables.table(found)
    assert table["published.r2"].tolist()[:2] == [0.5, 0.25] and pd.isna(table["published.r2"].iloc[2])
    assert table["lie.snr"].dtype == float and table["lie.snr"].isna().tolist() == [False, True, True, True]
    assert table["run.variant"].tolist() == ["lie", "original", "original", "original"]
    shown = tables.show(tables.table(found, {"published.r2": "R2", "controlled.class_z": "class", "never.measured": "x",
                                             "lie.restarts": "restarts"}))
    assert shown["R2"].tolist() == ["0.500", "0.250", "not measured", "0.750"]
    assert set(shown["class"]) == set(shown["x"]) == {"not measured"} and shown["restarts"].iloc[0] == "11.3, 4.600"


@pytest.mark.parametrize("name, content", [("metrics.json", '{"published": {"r2"'), ("metrics.json", ""), ("metrics.json", "[1]"),
                                           ("config.json", "\0\0"), ("history.csv", ""), ("history.csv", "a,b\n1,2,3\n4,5,6,7\n")])
def test_damaged_run_names_file_and_remedy(tmp_path, name, content):
    folder = make_run(tmp_path, 0, {"published": {}})
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"(?s){name} is damaged.*train this run again"):
        runs.read_runs(tmp_path)


def read_wandb(path):
    """The records of a .wandb file: LevelDB log frames of protocol buffers, after 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2
    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + 7])
        whole, at = whole + data[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def history_of(folder):
    """{step: {key: value}} of all offline logs in a run's folder, and their ids."""
    rows, ids = {}, set()
    for path in sorted(Path(folder).glob("wandb/offline-run-*/run-*.wandb")):
        for record in read_wandb(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {tuple(i.nested_key) or (i.key,): json.loads(i.value_json) for i in record.history.item}
                kept = rows.setdefault(row[("_step",)], {})
                for (name, *inner), value in row.items():
                    if inner:
                        kept.setdefault(name, {})[inner[0]] = value
                    else:
                        kept[name] = value
    return rows, ids


@pytest.fixture
def no_wandb_settings(monkeypatch):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def test_wandb_offline_log_reads_back(tmp_path, no_wandb_settings, capfd):
    folder = tmp_path / settings.run_name(CONFIG)
    log = logs.start_wandb(CONFIG, folder)
    for epoch in range(1, 4):
        logs.log_history(log, {"epoch": epoch, "loss": -1.31 * epoch, "r2": epoch / 7}, epoch)
        if epoch != 2:
            logs.log_figures(log, {"rotation_circle": figure(), "eigs_rot": figure()}, epoch)
    log.finish(exit_code=1)
    again = logs.start_wandb(CONFIG, folder, run_id=log.id)
    logs.log_history(again, {"epoch": 4, "loss": -5.5, "r2": 1.0}, 4)
    again.finish()
    given_up = time.monotonic() + 30  # W&B's own process writes the file, now and then behind finish()
    while 4 not in history_of(folder)[0] and time.monotonic() < given_up:
        time.sleep(0.1)

    rows, ids = history_of(folder)
    assert ids == {log.id}, "a run that goes on keeps its id"
    assert [rows[e]["loss"] for e in (1, 2, 3, 4)] == [-1.31 * 1, -1.31 * 2, -1.31 * 3, -5.5]
    assert [rows[e]["r2"] for e in (1, 2, 3, 4)] == [1 / 7, 2 / 7, 3 / 7, 1.0]
    assert "viz/eigs_rot" not in rows[2]
    for epoch in (1, 3):
        for name in ("rotation_circle", "eigs_rot"):
            entry = rows[epoch][f"viz/{name}"]
            assert entry["_type"] == "image-file" and entry["format"] == "png"
            [file] = folder.glob(f"wandb/offline-run-*/files/{entry['path']}")
            with Image.open(file) as picture:
                assert picture.format == "PNG" and picture.size == (entry["width"], entry["height"]) == (300, 200)
                assert len(picture.convert("RGB").getcolors(100_000)) > 2, "not an empty picture"
    config = [json.loads(u.value_json) for r in read_wandb(next(folder.glob("wandb/offline-run-*/*.wandb"))) if r.HasField("run")
              for u in r.run.config.update if u.key == "mode"]
    assert config == ["rotation"]
    assert capfd.readouterr() == ("", ""), "no console noise"


def test_wandb_modes(tmp_path, no_wandb_settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = logs.start_wandb(CONFIG, tmp_path / "run")
    logs.log_history(log, {"loss": 1.0}, 1)
    logs.log_figures(log, {"eigs_rot": figure()}, 1)
    log.finish()
    assert not list(tmp_path.rglob("*.wandb"))
    for given, name in (("perhaps", "perhaps"), (None, "dryrun")):
        monkeypatch.setenv("WANDB_MODE", "dryrun")
        with pytest.raises(ValueError, match=f"offline, online, disabled, not '{name}'"):
            logs.start_wandb(CONFIG, tmp_path / "run", given)


def test_progress_in_a_kernel_reaches_the_terminal(tmp_path):
    """papermill shows its own bar only; ours must come out of papermill's standard error, and stay out of the notebook."""
    import nbformat
    code = ("from seqjepa_nb import logs\nbar = logs.progress(3, 'training-of-a-run')\nfor _ in range(3): bar.update()\nbar.close()\n"
            "print('said in the notebook')")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)],
                                        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(notebook, tmp_path / "in.ipynb")
    environment = {k: v for k, v in os.environ.items() if k != "JPY_SESSION_NAME"}
    done = subprocess.run([sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb"], cwd=tmp_path, capture_output=True,
                          text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "training-of-a-run: 100%" in done.stderr and "3/3" in done.stderr
    outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    assert [o.text for o in outputs] == ["said in the notebook\n"]


def test_progress_outlives_its_terminal():
    out, into = os.pipe()
    os.close(out)
    stream = logs.Terminal(into)
    assert stream.write("nobody reads") == 12 and not stream.isatty() and stream.columns() == 100
    os.close(into)


def test_commit_and_root(tmp_path, monkeypatch):
    git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], cwd=tmp_path, check=True,
                                    capture_output=True, text=True).stdout
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert runs.find_root() == tmp_path and runs.published_root() == tmp_path / "book" / "runs"
    here = runs.commit()
    monkeypatch.chdir(Path(__file__).parent)
    assert here == runs.commit()  # that of the code, not of the folder where it is used
    monkeypatch.setattr(seqjepa_nb, "__file__", str(tmp_path / "seqjepa_nb" / "__init__.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.commit() == "unknown"
    git("init", "-q")
    git("add", "settings.ini")
    git("commit", "-qm", "one")
    (tmp_path / "new file").write_text("untracked files do not count")
    clean = runs.commit()
    assert clean == git("rev-parse", "--short=12", "HEAD").strip() and len(clean) == 12
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nx = 1\n")
    assert runs.commit() == clean + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.commit() == "unknown"
