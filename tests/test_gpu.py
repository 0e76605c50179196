"""`make gpu` on the CPU at a size that means nothing: the plan, the budget, going on, and the refusal without a GPU."""
import dataclasses
import importlib.util
import json
import signal

import pytest
import torch
import yaml
from conftest import ROOT, TINY
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture()
def gpu(calm, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "book" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    usual = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, usual)


def test_the_whole_path(tmp_path, gpu, capsys, monkeypatch):
    grid = tmp_path / "grid.yml"
    grid.write_text(yaml.safe_dump({"runs": {"mode": "rotation", "preset": "quick", "device": "cpu", "overrides": TINY | {"epochs": 1}}}))
    command = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "runs"), "--sweep", str(grid)]
    assert gpu.main([*command, "--budget", "0"]) == 0  # no time at all: a plan, and a clean end
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    said = capsys.readouterr().out
    assert "9 of 9 measurements to make" in said and "Left: matrix rate, compile" in said and "0 of 1 runs finished" in said, said
    assert gpu.main(command) == 0
    said = capsys.readouterr().out
    assert "1 of 1 runs finished" in said and "Left" not in said, said
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert {"card", "matrix rate", "steps", "recording", "layout", "search", "precision", "profile", "compile"} <= set(found)
    quick = found["steps"]["quick"]  # no bound on the share: on a busy machine the two rates are of different moments
    assert (quick["views_per_s"] > 0 and quick["operations_per_view"] > 1e6
            and quick["share"] == pytest.approx(quick["views_per_s"] * quick["operations_per_view"] / quick["matrix_rate"]))
    assert 15 < len(found["profile"]["rows"]) <= 60 and sum(r["share"] for r in found["profile"]["rows"]) <= 1.001
    assert (found["precision"]["float32"] != found["precision"]["float32, another seed"]
            and found["precision"]["bfloat16"] == pytest.approx(found["precision"]["float32"], abs=0.2))
    monkeypatch.setattr(gpu.sweep, "start", None)  # nothing may be started again
    assert gpu.main(command) == 0
    assert "0 of 9 measurements to make, about 0 min: none" in capsys.readouterr().out
    (tmp_path / "out" / "speed.json").write_text(json.dumps(found | {"card": "another"}))
    assert gpu.main(command) == 1 and "another device" in capsys.readouterr().err


def test_what_stands_in_the_way_is_said_and_nothing_is_measured(tmp_path, gpu, capsys, monkeypatch):
    grid, out = tmp_path / "grid.yml", tmp_path / "out"
    grid.write_text(yaml.safe_dump({"runs": {"mode": "rotation", "preset": "quick", "device": "cpu", "overrides": TINY}}))
    command = ["--device", "cpu", "--tiny", "--out", str(out), "--runs-dir", str(tmp_path / "runs"), "--sweep", str(grid)]
    monkeypatch.setattr(gpu.Bench, "matrix_rate", None)  # no measurement may begin
    job = gpu.sweep.read_sweep(str(grid), runs_dir=str(tmp_path / "runs")).jobs[0]
    job.folder.mkdir(parents=True)
    gpu.files.write_json(job.folder / "config.json", job.config.to_dict() | {"lr": 0.5})  # another run's folder
    assert gpu.main(command) == 2 and job.folder.name in capsys.readouterr().err
    out.mkdir()
    (out / "speed.json").write_text("{")
    assert gpu.main(command) == 2 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["search", "waits"])
def test_a_measurement_that_fails_leaves_nothing_switched_on(gpu, monkeypatch, name):
    """What is measured after it would otherwise be measured with another setting."""
    bench, modes = gpu.Bench("cpu", True), []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(gpu.train, "train_epoch", lambda *a: 1 / 0 if modes or torch.backends.cudnn.benchmark else {"loss": 0.0})
    monkeypatch.setattr(bench, "config", lambda preset, config=bench.config("quick"): config)
    monkeypatch.setattr(bench, "wait", lambda: None)
    bench.device = "cuda"  # in name only
    with pytest.raises(ZeroDivisionError):
        getattr(bench, name)()
    assert not torch.backends.cudnn.benchmark and modes in ([], ["warn", "default"])


def test_a_step_neither_asks_the_device_nor_sends_it_numbers(monkeypatch):
    """Each of these calls in the loop would make the host wait for a GPU: an epoch of eight steps has as many as one of four."""
    from seqjepa_nb import train
    from seqjepa_nb.config import make_config
    calls = []
    for owner, name in ((torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch.Tensor, "cpu"), (torch.Tensor, "numpy"),
                        (torch.Tensor, "new_tensor"), (torch, "tensor"), (torch, "as_tensor")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    counts = {}
    for n in (64, 128):
        c = make_config("multi", "torus_phase", "quick", device="cpu", overrides=TINY | {"n_train": n})
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


class Crossings(TorchDispatchMode):
    """Names the operations that bring tensors of two devices together: on a GPU, what a recording refuses."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.dim()}) > 1:
            self.seen.add(str(func))
        return out


def test_every_variant_can_be_recorded(monkeypatch):
    """Up to its loss (matching is never trained), on tensors that only pretend to be on a GPU (a backward pass wants a real one);
    numbers asked of the device raise there."""
    from seqjepa_nb import train
    from seqjepa_nb.config import VARIANTS, make_config
    from seqjepa_nb.images import load_images
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    digits = load_images("mnist", 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as crossings:  # what it is there to find
        x = torch.zeros(2, 3, device="cuda")
        x[:, [0, 2]], x + torch.arange(3).to(x)
        assert crossings.seen == {"aten._to_copy.default"}
        with pytest.raises(Exception, match="local_scalar"):
            x.sum().item()
    for mode, variant in [("rotation", v) for v in VARIANTS
                          if v != "matching"] + [("multi", v) for v in ("original", "torus_phase", "torus_circles", "supervised")]:
        config = make_config(mode, variant, "quick", device="cpu",
                             overrides={"n_train": 64, "n_test": 64, "batch": 16, "precision": "float32"})
        _, limits, learner, probes, _ = train.prepare(config, digits)
        with FakeTensorMode(allow_non_fake_inputs=True):
            learner, probes = learner.to("cuda"), probes.to("cuda")
            probes.optimiser, optimiser = (torch.optim.Adam([p for p in net.parameters() if p.requires_grad], fused=True, capturable=True)
                                           for net in (probes, learner))
            step = train.Step(dataclasses.replace(config, device="cuda"), digits.to("cuda"), limits, learner, probes,
                              {"optimiser": optimiser})
            learner.train()
            with Crossings() as crossings:
                step.once(torch.zeros(16, dtype=torch.long, device="cuda"), torch.zeros(16, 4, 4, device="cuda"))
        assert not crossings.seen, (mode, variant, crossings.seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("variant", ["original", "torus_phase", "lifted_torus_phase", "vit"])
def test_a_recorded_step_is_the_same_step(variant):
    from seqjepa_nb import train
    from seqjepa_nb.config import make_config
    losses = []
    for on in (False, True):
        config = make_config("rotation", variant, "quick", device="cuda", overrides=TINY | {"n_train": 256, "precision": "float32"})
        step = train.Step(config, *train.prepare(config))
        step.records = on
        losses.append([train.train_epoch(config, step, e)["loss"] for e in range(2)])
        assert (step.graph is not None) == on
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def infers_and_learns(device):
    """What the baseline makes of twenty digits on a device: with a known model, and after learning a little."""
    from seqjepa_nb.images import load_images, to_float
    from seqjepa_nb.lie import LieSparseCoder
    g = torch.Generator().manual_seed(0)
    x = to_float(load_images("mnist", 64, 64).train[:20]).flatten(1)
    coder = LieSparseCoder(templates=3, torus=1, planes=6, multiplicity=2, grid=16, pair_epochs=2, restarts=2, restart_epochs=2, epochs=2,
                           batch=10, neighbours=3, device=device, dtype="float64", verbose=False)
    planes, templates = torch.linalg.qr(torch.randn(784, 12, generator=g).double())[0], torch.rand(784, 3, generator=g).double()
    known = coder.known(planes, templates / templates.norm(dim=0))
    found = [torch.as_tensor(v).cpu() for v in (known.transform(x), known.inverse_transform(known.transform(x)), known.score(x))]
    return found, coder.fit(x).score(x)


def test_the_baseline_learns_here():
    found, score = infers_and_learns("cpu")
    assert found[0].shape == (20, 4) and all(v.isfinite().all() for v in found) and score > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_baseline_infers_on_a_gpu_what_it_infers_here_and_learns_there():
    (here, _), (there, score) = infers_and_learns("cpu"), infers_and_learns("cuda")
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-8)
    assert score > 1
