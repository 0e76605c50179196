"""Whole runs of the Lie-group baseline: papermill, refused, killed and gone on with, degenerate data."""
import csv
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, papermill

TINY = {"n_train": 60, "n_test": 40, "planes": 12, "torus": 1, "multiplicity": 2, "grid": 16, "templates": 3, "steps": 3,
        "pair_epochs": 2, "restarts": 2, "restart_epochs": 2, "epochs": 2, "batch": 20}


def options(**more):
    """What a tiny run of the baseline is asked for."""
    return {"mode": "rotation", "preset": "quick", "device": "cpu", "overrides": TINY} | more


def fit_here(folder, **more):
    """Train a tiny run into `folder`, in this process: importing the package again would take longer than the run."""
    import torch
    from seqjepa_nb.baseline import fit_run, make_config
    torch.set_num_threads(1)
    return fit_run(make_config(**options(**more)), folder)


def numbers(folder):
    """What a run found, without what depends on the clock."""
    (run,) = folder.glob("*/metrics.json")
    found = json.loads(run.read_text())
    with (run.parent / "history.csv").open() as f:
        return found["controlled"], found["lie"], list(csv.DictReader(f))


def test_papermill_leaves_a_run_like_the_others(tmp_path, calm):
    out = tmp_path / "out.ipynb"
    done = papermill("nbs/21_lie_baseline.ipynb", out, "-p", "mode", "rotation", "-p", "preset", "quick", "-p", "runs_dir",
                     tmp_path / "runs", "-y", json.dumps({"overrides": TINY}))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("[!.]*")
    assert {"config.json", "metrics.json", "history.csv", "figures", "model.safetensors"} == {p.name for p in folder.iterdir()}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"run", "controlled", "lie", "environment"} and list(metrics["controlled"]["factors"]) == ["rotation"]
    assert len(metrics["lie"]["restarts"]) == 2 and metrics["lie"]["snr"] > 1
    assert ({"circle", "r2", "ev"} <= set(metrics["controlled"]["factors"]["rotation"])
            and set(metrics["lie"]["representations"]) == {"code", "planes", "angles", "alpha"})
    outputs = [o for c in json.loads(out.read_text())["cells"] for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6 and "**Finding.**" in "".join(outputs[-1]["data"]["text/markdown"])
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_papermill_refuses_before_any_work(tmp_path, calm):
    done = papermill("nbs/21_lie_baseline.ipynb", tmp_path / "out.ipynb", "-p", "runs_dir", tmp_path / "runs", "-p", "modes", "rotation")
    assert done.returncode == 1 and "unknown parameter modes. Valid: dataset, device, mode" in done.stderr, done.stderr
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("parameters, words", [
    ({"mode": "shear"}, "translation, rotation_scale, untransformed, rotation, scale, multi"),
    ({"overrides": {"planes": 500}}, "planes is at most 392"),
    ({"wandb_mode": "cloud"}, "the W&B mode is one of offline, online, disabled"),
])
def test_the_notebook_refuses_values_before_any_work(tmp_path, calm, parameters, words):
    """The cells as papermill parametrises them, run in this process."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    notebook = parameterize_notebook(load_notebook_node(str(ROOT / "nbs" / "21_lie_baseline.ipynb")),
                                     parameters | {"runs_dir": str(tmp_path / "runs"), "preset": "quick"})
    space = {}
    with pytest.raises(ValueError, match=re.escape(words)):
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(cell.source, space)
    assert not list(tmp_path.glob("runs/*/*.json"))


def test_unknown_values_name_the_valid_ones():
    from seqjepa_nb.baseline import make_config
    for options, words in (({"variant": "best"}, "lie, lie_exemplars"), ({"preset": "huge"}, "quick"),
                           ({"seed": "one"}, "seed is a whole number"), ({"device": "cuda:99"}, "is not there"),
                           ({"overrides": {"lrr": 1}}, "unknown names lrr")):
        with pytest.raises(ValueError, match=words):
            make_config(**options)


def test_killed_run_goes_on_to_the_same_numbers(tmp_path, calm, capsys):
    from seqjepa_nb.files import load_state
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code = ("import torch; torch.set_num_threads(1); from seqjepa_nb.baseline import fit_run, make_config; "
            f"fit_run(make_config(**{options()!r}), {str(broken)!r})")
    process, done = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while done < 3 and process.poll() is None:
        state = next(broken.glob("*/state.safetensors"), None)
        done = len(load_state(state)[1]["history"]) if state else 0
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done >= 3 and not list(broken.glob("*/metrics.json"))
    fit_here(broken)
    assert "going on after epoch" in capsys.readouterr().out
    fit_here(whole)
    assert numbers(broken) == numbers(whole)


def test_few_first_learns_from_one_image_a_class_and_then_from_all(tmp_path, calm):
    """Both stages stand in the history, the restarts and the counted views; the figure of the notebook draws both."""
    import nbformat
    out = tmp_path / "out.ipynb"
    done = papermill("nbs/21_lie_baseline.ipynb", out, "-p", "variant", "lie_few_first", "-p", "preset", "quick", "-p",
                     "runs_dir", tmp_path / "runs", "-y", json.dumps({"overrides": TINY | {"n_exemplar": 60}}))
    assert done.returncode == 0, done.stderr[-2000:]
    _, lie, history = numbers(tmp_path / "runs")
    phases = [row["phase"] for row in history]
    learn = ["restart"] * 4 + ["best"] * 2
    assert phases == [f"first {p}" for p in ["pairs"] * 2 + learn] + learn and len(lie["restarts"]) == 2
    text = "".join(o["data"].get("text/markdown", "") for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if "data" in o)
    assert "on 60 digits, one digit a class first" in text


def test_folder_of_one_black_class(tmp_path, calm):
    """Two classes, one of them all black: a defined result; all of them black: an error that says so."""
    from PIL import Image
    for kind, value in (("black", 0), ("gray", 90)):
        for i in range(100):
            path = tmp_path / "images" / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (12, 12), value and value + i).save(path)
    asked = {"dataset": str(tmp_path / "images"), "overrides": TINY | {"n_test": 40, "n_train": 100, "planes": 8}}
    assert fit_here(tmp_path / "runs", **asked).metrics["lie"]["snr"] > 1
    for path in (tmp_path / "images" / "gray").iterdir():
        Image.new("L", (12, 12), 0).save(path)
    with pytest.raises(ValueError, match="X is black everywhere"):
        fit_here(tmp_path / "none", **asked)


def test_the_log_holds_history_and_figures(tmp_path, calm, monkeypatch):
    """What Weights & Biases is given: a row an epoch, then the figures, then the numbers."""
    from seqjepa_nb import logs
    given, summary, ends = [], {}, []
    class Log:
        log = staticmethod(lambda row, step: given.append((step, set(row))))
        finish = staticmethod(lambda exit_code=0: ends.append(exit_code))
    Log.summary = summary
    monkeypatch.setattr(logs, "start_wandb", lambda config, folder, mode=None, run_id=None: Log)
    run = fit_here(tmp_path / "runs")
    assert [step for step, row in given if "snr" in row] == list(run.history["epoch"]) and ends == [0]
    assert given[-1] == (len(run.history), {f"viz/{name}" for name in run.figures}) and {"controlled", "lie"} == set(summary)


def test_an_error_while_measuring_closes_the_log_as_failed(tmp_path, calm, monkeypatch):
    """And what was trained stays for the next try."""
    from seqjepa_nb import baseline, logs
    ends = []
    class Log:
        log = staticmethod(lambda row, step: None)
        finish = staticmethod(lambda exit_code=0: ends.append(exit_code))
        summary = {}
    def broken(*given):
        raise RuntimeError("no room")
    monkeypatch.setattr(logs, "start_wandb", lambda config, folder, mode=None, run_id=None: Log)
    monkeypatch.setattr(baseline, "yardstick", broken)
    with pytest.raises(RuntimeError, match="no room"):
        fit_here(tmp_path)
    assert ends == [1] and list(tmp_path.glob("*/state.safetensors")) and not list(tmp_path.glob("*/metrics.json"))


def test_what_another_process_finished_meanwhile_is_not_trained_again(tmp_path, calm, monkeypatch):
    """It may have come to its end between the first look and the lock."""
    from seqjepa_nb import runs
    answers = iter([None, "theirs"])
    monkeypatch.setattr(runs, "finished_run", lambda *given: next(answers))
    assert fit_here(tmp_path) == "theirs" and not list(tmp_path.glob("*/config.json"))


def test_help_explains_every_parameter():
    from papermill.inspection import inspect_notebook
    found = inspect_notebook(str(ROOT / "nbs" / "21_lie_baseline.ipynb"))
    assert (set(found) == {"mode", "variant", "preset", "dataset", "seed", "device", "runs_dir", "wandb_mode", "overrides"}
            and all(p["help"] for p in found.values()))


def test_posteriors_are_held_a_few_images_at_a_time(monkeypatch):
    """However fine the grid, no array of posteriors has more points than the budget, and the numbers are the same."""
    import torch
    from seqjepa_nb import lie, posterior
    g = torch.Generator().manual_seed(0)
    model = lie.LieSparseCoder(templates=2, torus=2, planes=6, grid=8, device="cpu", dtype="float64").known(
        torch.linalg.qr(torch.randn(16, 12, generator=g))[0], torch.nn.functional.normalize(torch.randn(16, 2, generator=g), dim=0))
    images, sizes, whole = torch.rand(40, 16, generator=g), [], posterior.Torus.log_density
    before = model.transform(images), model.posterior(images), torch.tensor(list(model.evaluate(images).values()))
    monkeypatch.setattr(posterior.Torus, "log_density", lambda self, c: sizes.append(len(c) * self.grid**self.n) or whole(self, c))
    for budget, most in ((2_000, 1_984), (20, 256)):  # the second holds not even one image: then one at a time
        monkeypatch.setattr(lie, "BUDGET", budget)
        after = model.transform(images), model.posterior(images), torch.tensor(list(model.evaluate(images).values()))
        torch.testing.assert_close(after, before)
        assert max(sizes) == most
        sizes.clear()
    monkeypatch.undo()
    cube = (lie.LieSparseCoder(torus=3, planes=5, templates=2, device="cpu")
            .known(torch.linalg.qr(torch.randn(16, 10, generator=g))[0], torch.rand(16, 2)))
    assert ([len(rows) for rows in cube._chunks(torch.rand(300, 16))] == [134, 134, 32]
            and {len(rows) for rows in cube._chunks(torch.rand(64, 16), 100**3)} == {16})
