"""The book builds without a warning, lists every chapter in both tables of contents, and types no run's number."""
import ast
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from built import ROOT, site  # noqa: F401

from seqjepa_nb.images import data_root

BOOK = ROOT / "book"
pytestmark = pytest.mark.xdist_group("site")  # one process builds the site and looks at it


def book_chapters():
    """[(part or None, [files])] of book/_toc.yml, paths from the repository's root and without suffix."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    place = lambda file: file if file.startswith("nbs/") else f"book/{file}"
    files = lambda chapters: [place(f) for c in chapters for f in (c["file"], *(s["file"] for s in c.get("sections", ())))]
    return [(None, [place(toc["root"])])] + [(p["caption"], files(p["chapters"])) for p in toc["parts"]]


def quarto_chapters():
    """The same of _quarto.yml."""
    found = []
    for item in yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]:
        part, files = (None, [item]) if isinstance(item, str) else (item["section"], item["contents"])
        files = [f for c in files for f in ([c] if isinstance(c, str) else [c["href"], *c["contents"]])]
        assert all((ROOT / f).is_file() for f in files), f"_quarto.yml names a file that is not there: {files}"
        found.append((part, [f.rsplit(".", 1)[0] for f in files]))
    return found


def test_builds_without_a_warning(site):
    warnings = [line for line in site.log.splitlines() if "WARNING:" in line or "ERROR:" in line]
    assert site.code == 0 and not warnings, "\n".join(warnings) or site.log[-3000:]
    for _, files in book_chapters():
        for file in files:
            assert (site.html / f"{file.removeprefix('book/')}.html").is_file(), f"{file} has no page"


def test_no_directive_reaches_a_page(site):
    """What the reader sees is the code, not nbdev's instructions."""
    shown = [p.name for p in site.html.glob("nbs/*.html") if re.search(r"#\||nbdev_export\(|default_exp", p.read_text())]
    assert not shown, f"nbdev directives are visible in {shown}"


def test_published_runs_are_shown_as_they_ran(site):
    for path in BOOK.glob("runs/*/*.ipynb"):
        about = [line for line in site.log.splitlines() if f"{path.relative_to(BOOK)}: " in line]
        assert any("Excluded from execution" in line for line in about) and not any("Executing" in line for line in about), about
        pictures = sum("image/png" in o.get("data", {}) for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", []))
        page = (site.html / path.relative_to(BOOK)).with_suffix(".html").read_text()
        assert pictures and page.count("<img") >= pictures and "Finding." in page
        assert "tag_hide-input" in page  # its parameters: the heading has them as a command


def test_a_run_that_a_chapter_names_is_a_link_to_its_page(site):
    run = "rotation-torus_phase-base-mnist-s0"
    page = (site.html / "nbs/37_known_action.html").read_text()
    assert f'href="../runs/{run}/20_train.html">{run}</a></span></code>' in page and f'<span class="pre">{run}</span>' not in page


@pytest.fixture()
def publishing(tmp_path, monkeypatch):
    """book/publish.py at work in an empty book, and an executed notebook beside its finished run."""
    monkeypatch.syspath_prepend(str(BOOK))
    publish = importlib.import_module("publish")
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "small_png", lambda png: png)
    (tmp_path / "book/runs").mkdir(parents=True)
    for file in ("book/_toc.yml", "_quarto.yml"):
        (tmp_path / file).write_text(re.sub(r" +- (?:file: |book/)runs/.*\n", "", (ROOT / file).read_text()))
    run = "rotation-random-small-mnist-s0"
    shutil.copytree(BOOK / "runs" / run, tmp_path / "runs" / run)
    return publish, (tmp_path / "runs" / run / "20_train.ipynb").rename(tmp_path / "runs/out.ipynb"), run


def test_publishing_lists_a_run_once(publishing, tmp_path):
    publish, notebook, run = publishing
    for _ in range(2):
        publish.publish(notebook)
        assert [(tmp_path / file).read_text().count(f"runs/{run}/20_train") for file in ("book/_toc.yml", "_quarto.yml")] == [1, 1]
    assert {p.name for p in (tmp_path / "book/runs").iterdir()} == {run}
    assert (json.loads((tmp_path / "book/runs" / run / "metrics.json").read_text())
            == json.loads((BOOK / "runs" / run / "metrics.json").read_text()))


def test_a_published_run_names_no_folder_of_its_users_images(publishing, tmp_path):
    publish, _, run = publishing
    config = json.loads((tmp_path / "runs" / run / "config.json").read_text()) | {"dataset": "/home/somebody/my images"}
    words = publish.heading(run.replace("mnist", "my_images"), config, "20_train")
    assert "/home" not in words and "-p dataset 'path/to/my images'" in words, words


@pytest.mark.parametrize("how, error", [("unfinished", SystemExit), ("too large", SystemExit),
                                        ("without its folder", SystemExit), ("broken off", ZeroDivisionError),
                                        ("broken off between the renames", ZeroDivisionError), ("killed between the renames", SystemExit)])
def test_publishing_keeps_what_is_there_until_the_new_is_whole(publishing, tmp_path, monkeypatch, how, error):
    publish, notebook, run = publishing
    publish.publish(notebook)
    there = {p: p.read_bytes() for p in (tmp_path / "book").rglob("*") if p.is_file()}
    if how == "unfinished":
        (tmp_path / "runs" / run / "metrics.json").write_text("{}")
    elif how == "too large":
        monkeypatch.setattr(publish, "LIMIT", 1000)
    elif how == "without its folder":
        shutil.rmtree(tmp_path / "runs" / run)
    elif how == "broken off":
        monkeypatch.setattr(publish.files, "write_text", lambda path, text: 1 / 0)
    elif how == "broken off between the renames":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: 1 / 0 if path.name.endswith(".part") else rename(path, to))
    else:  # what is left then; the next publishing brings it back, whatever becomes of that
        (tmp_path / "book/runs" / run).rename(tmp_path / "book/runs" / f".{run}.old")
        (tmp_path / "runs" / run / "metrics.json").write_text("{}")
    with pytest.raises(error) as said:
        publish.publish(notebook)
    assert how != "without its folder" or "is not a run's folder" in str(said.value)
    assert {p: p.read_bytes() for p in there} == there


def test_the_cache_of_outputs_knows_every_file_that_a_page_reads(tmp_path, monkeypatch):
    """A page is run again when one of them changes, and not when a file beside them does."""
    monkeypatch.syspath_prepend(str(BOOK / "_ext"))
    fingerprint = importlib.import_module("fresh_and_offline").fingerprint
    read = ["seqjepa_nb/runs.py", "README.md", "book/original.json", "book/runs/gpu/speed.json",
            *(f"{place}/a/{name}" for place in ("runs", "book/runs")
              for name in ("config.json", "metrics.json", "history.csv", "figures/eigs_rot.png"))]
    beside = ["book/runs/a/20_train.ipynb", "runs/.jobs/a.json", "runs/a/state.safetensors"]
    for name in (*read, *beside):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    for name in (*read, *beside):
        before = fingerprint(tmp_path)
        (tmp_path / name).write_text("new")
        assert (fingerprint(tmp_path) != before) == (name in read), name


def test_the_readme_examples_run(tmp_path):
    model, own, coder, mine, trained = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = model + "assert out.z.shape == (64, 3, 128) and out.prediction.shape == out.target.shape == (64, 128)\n"
    code += (own + "assert 0 < numbers['class_z'] < 1\n"
             + coder.replace(".fit(views)", ".set_params(pair_epochs=3, restarts=1, restart_epochs=2, epochs=2).fit(views[:1000])")
             + "assert code.shape == (100, 11) and coder.score(views) > 1\n")
    code += (mine.replace('"batch": 50', '"batch": 50, "epochs": 1')
             + "assert run.metrics['environment']['data'] == 'arrays' and run.name.startswith('rotation-torus_phase-quick-noise-s0-')\n")
    code += ("from pathlib import Path; SeqJEPA(width=16).save_pretrained('runs/r'); Path('runs/r/config.json').write_text('{}'); "
             "Path('runs/r/metrics.json').write_text('{\"images\": {\"mean\": [0.13], \"std\": [0.3]}}')\n")
    code += trained.replace("runs/rotation-original-quick-mnist-s0", "runs/r") + "assert z.shape == (64, 128)\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"SEQJEPA_DATA": str(data_root())}, check=True)


def test_quarto_lists_the_same_chapters():
    assert quarto_chapters() == book_chapters()


def test_every_notebook_run_and_module_has_a_chapter():
    listed = {f for _, files in book_chapters() for f in files}
    notebooks = {f"nbs/{p.stem}" for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith("2")}
    runs = {f"book/runs/{p.parent.name}/{p.stem}" for p in BOOK.glob("runs/*/*.ipynb")}
    modules = {f"book/api/{p.stem}" for p in (ROOT / "seqjepa_nb").glob("[a-z]*.py")}
    assert (notebooks | runs | modules) - listed == set()


def test_the_list_of_modules_says_what_each_says_of_itself():
    shown = (BOOK / "api" / "index.md").read_text().splitlines()
    for path in (ROOT / "seqjepa_nb").glob("[a-z]*.py"):
        about = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
        assert f"- [{path.stem}]({path.stem}.md): {about}" in shown, path.stem


def test_published_runs_name_no_folder_of_the_machine_they_ran_on():
    pages = list(BOOK.glob("runs/*/*.ipynb"))
    assert len(pages) > 10
    assert not {f"{p.parent.name}: {found}" for p in pages
                for found in re.findall(r"[\"' (](/(?:home|root|tmp|work|opt|usr|mnt|data)/[^\\\"' ]*)", p.read_text())}


NUMBER = re.compile(r"(?<![\w.,/-])[-−]?\d+\.\d+(?![\w./])")
SETTING = {"3.11", "3.12", "0.996", "0.1307", "0.3081"}  # versions of Python; decay of the moving average; mean and deviation of MNIST


def leaves(value):
    """All fractional numbers in nested dictionaries and lists."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, float) and value != int(value) else [n for v in children for n in leaves(v)]


def numbers_of_runs(folder):
    """(final numbers, numbers of the history) of the run folders in `folder`."""
    final, history = [], []
    for path in folder.glob("*/metrics.json"):
        final += leaves(json.loads(path.read_text()))
        if not path.with_name("history.csv").exists():  # an untrained control has none
            continue
        with open(path.with_name("history.csv")) as file:
            history += [float(v) for row in csv.DictReader(file) for v in row.values() if v and "." in v]
    return final, history


def typed(text, final, history):
    """Numbers in a page's text that equal a run's number at the precision written.

    Of three significant digits a final number is recognised, of four any number of the history; fewer digits recognise
    nothing. Code, and paragraphs that cite where a number comes from, are left out.
    """
    found = []
    text = re.sub(r"```.*?```|`[^`]*`", " ", text, flags=re.S)
    for block in re.split(r"\n\s*\n", text):
        if "{cite" in block:
            continue
        for token in NUMBER.findall(re.sub(r"\]\([^)]*\)|https?://\S+", " ", block)):
            token = token.replace("−", "-")
            digits = len(token.replace("-", "").replace(".", "").lstrip("0"))
            known = (final if digits >= 3 else []) + (history if digits >= 4 else [])
            places = len(token.split(".")[1])
            if token not in SETTING and any(f"{v:.{places}f}" == token for n in known for v in (n, 100 * n)):
                found.append(token)
    return found


def pages():
    """Text of every page that is written by hand: (path, text)."""
    for path in (ROOT / "README.md", *BOOK.rglob("*.md")):
        if "_build" not in path.parts:
            yield path, path.read_text()
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        yield path, "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def test_no_number_of_a_run_is_typed():
    final, history = numbers_of_runs(BOOK / "runs")
    original = {str(v) for v in leaves(json.loads((BOOK / "original.json").read_text()))}
    bad = {str(p.relative_to(ROOT)): n for p, text in pages() if (n := [t for t in typed(text, final, history) if t not in original])}
    assert not bad, f"read these from the run's files instead of typing them: {bad}"


def test_a_typed_number_is_recognised(tmp_path):
    run = tmp_path / "rotation-original-small-mnist-s0"
    run.mkdir()
    (run / "metrics.json").write_text(json.dumps({"published": {"loss": -2.9374}, "controlled": {"factors": {"x": {"ev": 0.41872}}}}))
    (run / "history.csv").write_text("epoch,linacc\n1,23.4375\n")
    numbers = numbers_of_runs(tmp_path)
    assert typed("A share of 0.419, a loss of −2.94 and an accuracy of 23.44 in epoch 1.", *numbers) == ["0.419", "-2.94", "23.44"]
    assert typed("| share | 41.9 % |", *numbers) == ["41.9"]
    assert typed("0.42, 0.418, `0.419`, [0.5](page-0.419.html) and 0.4187 by {cite}`seqjepa`.", *numbers) == []
