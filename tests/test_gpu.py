"""`make gpu` on the CPU at a size that means nothing: the plan, the budget, going on, and the refusal without a GPU."""
import importlib.util
import json

import pytest
import torch
import yaml
from conftest import ROOT, TINY


@pytest.fixture()
def gpu(calm, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "book" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_whole_path(tmp_path, gpu, capsys, monkeypatch):
    grid = tmp_path / "grid.yml"
    grid.write_text(yaml.safe_dump({"runs": {"mode": "rotation", "preset": "quick", "device": "cpu", "overrides": TINY | {"epochs": 1}}}))
    command = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "runs"), "--sweep", str(grid)]
    assert gpu.main([*command, "--budget", "0"]) == 0  # no time at all: a plan, and a clean end
    said = capsys.readouterr().out
    assert "9 of 9 measurements to make" in said and "Left: matrix rate, compile" in said and "0 of 1 runs finished" in said, said
    assert gpu.main(command) == 0
    said = capsys.readouterr().out
    assert "1 of 1 runs finished" in said and "Left" not in said, said
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert {"card", "matrix rate", "steps", "recording", "layout", "search", "precision", "profile", "compile", "runs"} <= set(found)
    quick = found["steps"]["quick"]  # no bound on the share: on a busy machine the two rates are of different moments
    assert quick["views_per_s"] > 0 and quick["operations_per_view"] > 1e6 and quick["share"] == pytest.approx(quick["views_per_s"] * quick["operations_per_view"] / quick["matrix_rate"])
    assert len(found["profile"]["rows"]) == 15 and sum(r["share"] for r in found["profile"]["rows"]) <= 1.001
    assert found["precision"]["float32"] != found["precision"]["float32, another seed"] and found["precision"]["bfloat16"] == pytest.approx(found["precision"]["float32"], abs=0.2)
    monkeypatch.setattr(gpu.sweep, "start", None)  # nothing may be started again
    assert gpu.main(command) == 0
    assert "0 of 9 measurements to make, about 0 min: none" in capsys.readouterr().out
    (tmp_path / "out" / "speed.json").write_text(json.dumps(found | {"card": "another"}))
    assert gpu.main(command) == 1 and "another device" in capsys.readouterr().err


def test_a_step_neither_asks_the_device_nor_sends_it_numbers(monkeypatch):
    """Each of these calls in the loop would make the host wait for a GPU: an epoch of eight steps has as many as one of four."""
    from seqjepa_nb import train
    calls = []
    for owner, name in ((torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch.Tensor, "cpu"), (torch.Tensor, "numpy"), (torch.Tensor, "new_tensor"), (torch, "tensor"), (torch, "as_tensor")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    counts = {}
    for n in (64, 128):
        c = train.make_config("multi", "torus_phase", "quick", device="cpu", overrides=TINY | {"n_train": n})
        step = train.Step(c, *train.prepare(c))
        calls.clear()
        train.train_epoch(c, step, 0)
        counts[n] = sorted(calls)
    assert "tolist" in counts[64] and counts[64] == counts[128], counts


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_would_do(tmp_path, gpu, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "9 of 9 measurements" in shown.out and "no GPU here" in shown.err and "make gpu BUDGET=600" in shown.err
    assert not list(tmp_path.iterdir())
