"""Publish finished runs: python book/publish.py runs/rotation-original.ipynb [more executed notebooks]

Copies each run's small files (configuration, metrics, history, figures; no weights) and its executed notebook into
`book/runs/<run>/`, and lists it as a chapter in both tables of contents. Publishing a run again replaces it.
"""
import base64
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

from seqjepa_nb import files, measure, runs, settings
from seqjepa_nb.canvas import small_png
from seqjepa_nb.config import TITLES

ROOT = Path(__file__).resolve().parent.parent
LIMIT, FIGURE = 1_000_000, 150_000


def executed(path):
    """(run's name, cleaned notebook) of an executed 20_train or 21_lie_baseline notebook."""
    try:
        notebook = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be read as a notebook ({error}). Is its run still going?")
    if notebook["metadata"].get("papermill", {}).get("exception"):
        sys.exit(f"{path} did not finish")
    text = json.dumps(notebook)
    found = re.search(r"'((?:rotation|multi|translation|scale|untransformed)[\w.-]*-s\d+[\w.-]*)'", text)
    if not found:
        sys.exit(f"{path} names no run")
    notebook["metadata"] = {"kernelspec": notebook["metadata"]["kernelspec"]}
    for cell in notebook["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        # a folder of another machine says nothing
        cell["source"] = re.sub(r'(?m)^runs_dir = "/.*"$', 'runs_dir = "runs"', "".join(cell["source"])).splitlines(keepends=True)
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = base64.b64encode(small_png(base64.b64decode(picture))).decode()
    return found[1], notebook


def heading(name, config, notebook):
    """A run's chapter in words: what it is, the folder's name, and the command that makes it again."""
    changed = {k: v for k, v in config.items() if f"-{k}{v}" in name.removeprefix(settings.run_name(config))}
    which = f"{config['few']} digits of any class" if "few" in changed else "one digit a class"
    titles = TITLES | {"lie": "Lie-group baseline", "lie_exemplars": f"Lie-group baseline, {which}",
                       "lie_few_first": f"Lie-group baseline, {which} first"}
    about = (f"{config['mode'].capitalize().replace('_', ' and ')}: {titles[config['variant']]}"
             + "".join(f", {k} {v}" for k, v in changed.items() if k != "few")
             + ("" if config["dataset"] == "mnist" else f", {Path(config['dataset']).name}")
             + ("" if config["preset"] == "small" else f", {config['preset']}") + (f", seed {config['seed']}" if config["seed"] else ""))
    given = config if config["dataset"] in ("mnist", "cifar10") else config | {"dataset": f"path/to/{Path(config['dataset']).name}"}
    asked = " ".join(f"-p {k} {shlex.quote(str(given[k]))}" for k in ("mode", "variant", "preset", "dataset", "seed"))
    more = ' -y "{overrides: ' + json.dumps(changed).replace('"', "") + '}"' if changed else ""
    told = (" The baseline gets **no action labels**, while seq-JEPA is given the relative actions." if "lie" in config["variant"] else
            " Its shares in two dimensions differ because what is moved differs: `subspace_ev_rot_2` of the history, and *all test deltas* "
            "in the figure of the spectrum, are about changes between two poses of a test sequence, with all that moves in this mode; "
            f"the controlled `ev` and the Finding are about one factor of {measure.ANCHORS} test digits, "
            "moved from the identity pose; pictures of turning digits, and *rotation alone* in that figure, show a few of these.")
    return (f"# {about}\n\n> `{name}`, made by `papermill nbs/{notebook} out.ipynb {asked}{more}`\n\nA published run, "
            f"shown as it ran. What the numbers mean: [one protocol for every model](../../nbs/12_measure.ipynb).{told}")


def list_chapter(name, page):
    """Add the chapter to both tables of contents, unless it is there; published runs stand in the order of their names."""
    for file, entry, ahead in (
        (ROOT / "book" / "_toc.yml", f"          - file: runs/{name}/{page.stem}\n", "      - file: nbs/39_runs\n        sections:\n"),
        (ROOT / "_quarto.yml", f"              - book/runs/{name}/{page.name}\n",
         "            href: nbs/39_runs.ipynb\n            contents:\n")):
        text = file.read_text()
        known = re.findall(r" +- (?:file: |book/)runs/.*\n", text)
        head, tail = text.replace("".join(known), "").split(ahead)
        files.write_text(file, head + ahead + "".join(sorted({*known, entry})) + tail)


def bring_back(target, aside):
    """The published run that was moved aside, back in its place if nothing has taken that."""
    if aside.exists() and not target.exists():
        aside.rename(target)


def publish(path):
    """Publish one executed notebook's run."""
    name, notebook = executed(path)
    source, target = path.parent / name, ROOT / "book" / "runs" / name
    aside = target.with_name(f".{name}.old")
    bring_back(target, aside)  # a publishing that was killed has left it there
    try:
        finished = runs.read_run(source).finished
    except ValueError as error:
        sys.exit(f"{error}. An executed notebook is published from beside its run's folder.")
    if not finished:
        sys.exit(f"{source} is not finished")
    made = target.with_name(f".{name}.part")  # takes the place of what is published only once it is whole
    shutil.rmtree(made, ignore_errors=True)
    (made / "figures").mkdir(parents=True)
    for file in (source / "config.json", source / "metrics.json", source / "history.csv"):
        if file.exists():
            shutil.copy(file, made)
    for file in source.glob("figures/*.png"):
        (made / "figures" / file.name).write_bytes(small_png(file.read_bytes()))
    page = made / ("21_lie_baseline.ipynb" if "-lie" in name else "20_train.ipynb")
    notebook["cells"][0]["source"] = heading(name, json.loads((made / "config.json").read_text()), page.name).splitlines(keepends=True)
    files.write_text(page, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    sizes = {f: f.stat().st_size for f in made.rglob("*") if f.is_file()}
    if sum(sizes.values()) > LIMIT or any(s > FIGURE for f, s in sizes.items() if f.suffix == ".png"):
        shutil.rmtree(made)
        sys.exit(f"{name} is too large: {sum(sizes.values()) / 1e6:.2f} MB (a run may take 1 MB, a figure 150 kB)")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if target.exists():
            target.rename(aside)
        made.rename(target)
    finally:
        bring_back(target, aside)
    shutil.rmtree(aside, ignore_errors=True)
    list_chapter(name, page)
    print(f"{target.relative_to(ROOT)}: {sum(sizes.values()) / 1000:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        publish(Path(argument))
