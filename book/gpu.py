"""`make gpu`: everything that needs a GPU. Measures the training loop, then trains `sweeps/gpu.yml`; what is
there already is not done again.

Measurements go to `book/runs/gpu/speed.json`, each as soon as it is made; the runs, whose files say where their seconds went, to
`runs/`, to be published with book/publish.py.
The budget is in seconds, for measurements and runs together. Without a GPU, `--device cpu --tiny` goes the same
way at a size that means nothing.
"""
import argparse
import json
import math
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from seqjepa_nb import files, runs, sweep, train
from seqjepa_nb.config import make_config
from seqjepa_nb.learner import draw_poses, epoch_generator

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"matrix rate": 10, "compile": 100, "steps": 40, "waits": 10, "recording": 40, "layout": 30, "search": 20,
           "precision": 60, "profile": 20}
"""What each measurement is thought to take; a guess until a GPU has answered."""
TINY = {"width": 16, "n_train": 64, "n_test": 64, "batch": 16}  # not narrower: see train.memory_layout


class Bench:
    """The measurements, by name; each returns what `speed.json` keeps of it."""

    def __init__(self, device, tiny):
        self.device, self.tiny = device, tiny
        self.presets, self.steps = (("quick",), 4) if tiny else (("base", "full"), 40)

    def config(self, preset, mode="multi", **overrides):
        """A configuration with as many digits as the timed steps need."""
        size = TINY if self.tiny else {"n_train": self.steps * make_config(preset=preset, device="cpu").batch, "n_test": 64}
        return make_config(mode, preset=preset, device=self.device, overrides=size | {"epochs": 4} | overrides)

    def wait(self):
        """Until the device has done what it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def epoch(self, config, step, i):
        """Seconds of one epoch of the training loop, everything in it."""
        self.wait()
        start = time.perf_counter()
        train.train_epoch(config, step, i)
        self.wait()
        return time.perf_counter() - start

    def views_per_s(self, config, change=lambda step: None):
        """Views trained on in a second, the best of two epochs, after one that warms up; how long that took, and the step.
        `change` alters the step first."""
        step = train.Step(config, *train.prepare(config))
        change(step)
        warm = self.epoch(config, step, 0)
        best = min(self.epoch(config, step, i) for i in (1, 2))
        return config.n_train // config.batch * config.batch * config.views / best, warm, step

    def as_run(self, step, preset):
        """Let a step of few digits do as a whole run of the preset does."""
        step.compiles = step.records and not self.tiny and train.compiling_pays(make_config(preset=preset, device=self.device))

    def product(self, dtype):
        """Operations a second of one large product of matrices."""
        n = 256 if self.tiny else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(12):
            self.wait()
            start = time.perf_counter()
            a @ b
            self.wait()
            times.append(time.perf_counter() - start)
        return 2 * n**3 / min(times)

    def matrix_rate(self):
        """Of the device, in both arithmetics."""
        return {"bfloat16": self.product(torch.bfloat16), "float32": self.product(torch.float32)}

    def steps_(self):
        """Of the loop as a whole run has it: views a second, share of the matrix rate measured in this call, peak memory,
        whether the encoder is compiled."""
        found = {}
        for preset in self.presets:
            config = self.config(preset)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rate, _, step = self.views_per_s(config, lambda step: self.as_run(step, preset))
            peak = runs.peak_mb(self.device)
            pick = torch.arange(config.batch, device=self.device)
            p = draw_poses(config, config.batch, step.limits, epoch_generator(config, 0))
            with FlopCounterMode(display=False) as counter:
                step.once(pick, p)
            operations = counter.get_total_flops() / (config.batch * config.views)
            product = self.product(torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
            found[preset] = {"batch": config.batch, "width": config.width, "precision": config.precision, "views_per_s": rate,
                             "operations_per_view": operations, "matrix_rate": product, "share": rate * operations / product,
                             "peak_mb": peak, "compiled": step.compiles}
        return found

    def waits(self):
        """How often the host waits for the device in an epoch; once at its end is meant."""
        if self.device != "cuda":
            return {"not measured": "torch counts this on a GPU only"}
        config = self.config(self.presets[0])
        step = train.Step(config, *train.prepare(config))
        step.records = False  # so that each operation is asked for
        self.epoch(config, step, 0)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train.train_epoch(config, step, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"steps": config.n_train // config.batch, "waits": sum("synchroniz" in str(w.message) for w in caught)}

    def recording(self):
        """Views a second with steps recorded and replayed, and with each operation asked for anew; and by how much the losses of
        the first steps differ, relative to the first."""
        found = {}
        for preset in self.presets:
            rates = {name: self.views_per_s(self.config(preset), lambda step: setattr(step, "records", step.records and on))[0]
                     for name, on in (("asked for", False), ("recorded", True))}
            config, losses = self.config(preset, precision="float32"), []
            for on in (False, True):
                step = train.Step(config, *train.prepare(config))
                step.learner.train()
                step.records = step.records and on
                g = epoch_generator(config, 0)
                p = draw_poses(config, min(8 * config.batch, config.n_train), step.limits, g)
                losses.append(torch.stack([step(i, p[i])[0] for i in torch.arange(len(p), device=self.device).split(config.batch)]))
            found[preset] = rates | {"losses differ by": float((losses[0] - losses[1]).abs().max() / losses[0][0].abs())}
        return found

    def layout(self):
        """Views a second with the default layout and with channels last."""
        return {preset: {name: self.views_per_s(self.config(preset), lambda step: step.learner.to(memory_format=form))[0]
                         for name, form in (("default", torch.contiguous_format), ("channels last", torch.channels_last))}
                for preset in self.presets}

    def search(self):
        """Views a second with cuDNN's own choice of how to convolve, and with the best it finds."""
        found = {preset: {} for preset in self.presets}
        try:
            for preset in self.presets:
                for name, on in (("chosen", False), ("searched", True)):
                    torch.backends.cudnn.benchmark = on
                    found[preset][name] = self.views_per_s(self.config(preset))[0]
        finally:
            torch.backends.cudnn.benchmark = False
        return found

    def precision(self):
        """The loss of each epoch of a short run: float32 with two seeds, bfloat16 with one of them."""
        found = {}
        for name, precision, seed in (("float32", "float32", 0), ("float32, another seed", "float32", 1), ("bfloat16", "bfloat16", 0)):
            config = make_config("multi", preset=self.presets[0], device=self.device, seed=seed,
                                 overrides=(TINY if self.tiny else {"n_test": 64}) | {"precision": precision, "epochs": 4})
            step = train.Step(config, *train.prepare(config))
            found[name] = [train.train_epoch(config, step, e)["loss"] for e in range(config.epochs)]
        return found

    def profile(self):
        """Where the time goes: the operations that take most of it."""
        config = self.config(self.presets[-1])
        step = train.Step(config, *train.prepare(config))
        self.as_run(step, config.preset)
        self.epoch(config, step, 0)
        kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (self.device == "cuda")
        with torch.profiler.profile(activities=kinds) as seen:
            self.epoch(config, step, 1)
        spent = lambda e: e.self_device_time_total if self.device == "cuda" else e.self_cpu_time_total
        rows = sorted(seen.key_averages(), key=spent, reverse=True)
        whole = sum(map(spent, rows))
        return {"preset": config.preset,
                "rows": [{"operation": e.key[:80], "calls": e.count, "share": spent(e) / whole} for e in rows[:60]]}

    def compile(self):
        """Views a second with the encoder compiled and not, both recorded, and how long compiling takes."""
        found = {}
        for preset in self.presets:
            compiled = lambda step: setattr(step, "compiles", step.records)
            plain, warm, _ = self.views_per_s(self.config(preset))
            torch.compiler.reset()
            rate, first, _ = self.views_per_s(self.config(preset), compiled)
            found[preset] = {"plain": plain, "compiled": rate, "compiling_s": first - warm}
        return found


def refused(why):
    """Say why nothing more is done; returns the exit code."""
    print(why, file=sys.stderr)
    return 2


def main(arguments=None):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("python book/gpu.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything together")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a size that only shows that everything works")
    parser.add_argument("--out", type=Path, default=ROOT / "book" / "runs" / "gpu", help="where speed.json goes")
    parser.add_argument("--runs-dir", dest="runs_dir", default="runs", help="where the runs go")
    parser.add_argument("--sweep", default=str(ROOT / "sweeps" / "gpu.yml"), help="what is trained")
    given, begun = parser.parse_args(arguments), time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends it as Ctrl-C does
    left = lambda: given.budget - (time.time() - begun)
    bench = Bench(given.device, given.tiny)
    measures = {"matrix rate": bench.matrix_rate, "compile": bench.compile, "steps": bench.steps_, "waits": bench.waits,
                "recording": bench.recording, "layout": bench.layout, "search": bench.search, "precision": bench.precision,
                "profile": bench.profile}
    there = given.device == "cpu" or torch.cuda.is_available()
    file = given.out / "speed.json"
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        return refused(f"{file} cannot be read ({error}): move it away, or name another folder with --out.")
    card = runs.device_name(given.device) if there else None
    if there and found.get("card", card) != card:
        print(f"{file} holds measurements of another device, {found['card']}: move it away, or name another folder with --out.",
              file=sys.stderr)
        return 1
    todo = [name for name in measures if name not in found]
    print(f"Plan for {card or 'a GPU'}: {len(todo)} of {len(measures)} measurements to make, "
          f"about {sum(SECONDS[n] for n in todo) / 60:.0f} min: {', '.join(todo) or 'none'};")
    if not there:
        print("then the runs of sweeps/gpu.yml, about a minute each by the goals.\n\n"
              "There is no GPU here that torch can use, so nothing was measured. On a machine with one:"
              "\n\n    make gpu                 all of it\n"
              "    make gpu BUDGET=600      what fits into ten minutes; the same command goes on"
              "\n\nTo see the same path work on the CPU: python book/gpu.py --device cpu --tiny --out /tmp/gpu --runs-dir /tmp/gpu",
              file=sys.stderr)
        return 1
    try:
        jobs = sweep.read_sweep(given.sweep, runs_dir=given.runs_dir)
        known = sweep.known_runs(jobs.runs_dir)
        print(f"then {sweep.total(sweep.plan(jobs, known), jobs.at_once)}"
              + (f". Budget: {given.budget:g} s." if given.budget < math.inf else "."), flush=True)
    except ValueError as error:
        return refused(error)
    found["card"] = card
    found["environment"] = found.get("environment", {}) | {"torch": torch.__version__, "cuda": torch.version.cuda}
    late, broken = [], []
    for name in todo:
        if left() < (1 if given.tiny else SECONDS[name]):
            late.append(name)
            continue
        start = time.time()
        try:
            found[name] = measures[name]()
            found["environment"] |= {f"commit of {name}": runs.commit()}
        except Exception as error:  # one measurement that fails stops no other; it is tried again next time
            broken.append(name)
            print(f"{name}: failed, {type(error).__name__}: {error}", flush=True)
            continue
        files.write_json(file, found)
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
    torch.cuda.empty_cache()
    try:
        states = sweep.run_sweep(jobs, known, budget=left()) if left() > 0 else {j.folder.name: sweep.stands(j)[0] for j in jobs.jobs}
    except ValueError as error:  # another sweep is at work here
        return refused(error)
    files.write_json(file, found)
    open_ = [n for n, s in states.items() if s != "finished"]
    print(f"{len(states) - len(open_)} of {len(states)} runs finished; measurements in {file}.")
    if late or broken or open_:
        print(f"Left: {', '.join(late + broken + open_)}. The same command goes on.")
    return int(bool(broken) or any(s.startswith("failed") for s in states.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, the running job's whole epochs too. The same command goes on.")
        sys.exit(130)
