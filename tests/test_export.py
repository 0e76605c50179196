"""The notebooks are the source: the package follows from them, and they are stored clean."""
import json
import shutil
import subprocess

import pytest
from built import BIN, ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
EXPERIMENTS = [p for p in NOTEBOOKS if p.name[0] in "234"]
PAPERMILL = [p for p in NOTEBOOKS if p.name[0] == "2"]
name = lambda path: path.name


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind in (None, c["cell_type"])]


def text(path, kind=None):
    return "\n\n".join("".join(c["source"]) for c in cells(path, kind))


def copy_sources(to):
    """Everything an export reads, and nothing that it writes."""
    shutil.copy(ROOT / "settings.ini", to)
    (to / "nbs").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, to / "nbs")
    return to


def test_no_code_line_is_too_long():
    """At most 140 characters, but for the parameters, which papermill reads with their comments from one line each."""
    sources = [(f"{p.name} {c['id']}", "".join(c["source"])) for p in NOTEBOOKS for c in cells(p, "code")
               if "parameters" not in c["metadata"].get("tags", [])]
    sources += [(p.relative_to(ROOT), p.read_text()) for at in ("book", "book/_ext", "tests") for p in sorted((ROOT / at).glob("*.py"))]
    long = [f"{at}:{k} ({len(line)})" for at, source in sources for k, line in enumerate(source.splitlines(), 1) if len(line) > 140]
    assert not long, f"longer than 140 characters: {long}"


def test_package_is_its_notebooks_byte_for_byte(tmp_path):
    copy_sources(tmp_path)
    subprocess.run([BIN / "nbdev_export"], cwd=tmp_path, check=True)
    fresh = {p.name: p.read_bytes() for p in (tmp_path / "seqjepa_nb").glob("*.py")}
    here = {p.name: p.read_bytes() for p in (ROOT / "seqjepa_nb").glob("*.py")}
    assert sorted(fresh) == sorted(here), "modules without a notebook, or notebooks not exported: run nbdev_export"
    differ = [n for n in here if here[n] != fresh[n]]
    assert not differ, f"differ from their notebooks (run nbdev_export): {differ}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_stored_without_outputs(path):
    dirty = [c["id"] for c in cells(path, "code") if c["outputs"] or c["execution_count"] is not None]
    assert not dirty, f"cells with outputs (run nbdev_clean): {dirty}"


def test_cleaning_changes_nothing(tmp_path):
    """nbdev_clean keeps every notebook as stored, its `parameters` tag above all."""
    copy_sources(tmp_path)
    subprocess.run([BIN / "nbdev_clean"], cwd=tmp_path, check=True)
    changed = [p.name for p in NOTEBOOKS if p.read_bytes() != (tmp_path / "nbs" / p.name).read_bytes()]
    assert not changed, f"not clean (run nbdev_clean): {changed}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_one_title_and_one_line_about_it(path):
    first, *_ = cells(path)
    assert first["cell_type"] == "markdown" and "".join(first["source"]).startswith("# ")
    assert "\n> " in "".join(first["source"]), "no one-line quote under the title"
    titles = [line for line in text(path, "markdown").splitlines() if line.startswith("# ")]
    assert len(titles) == 1, titles
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["language"] == "python"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_an_experiment_ends_in_a_finding_and_exports_nothing(path):
    told = ["".join(c["source"]) for c in cells(path) if not "".join(c["source"]).startswith("#| hide")]
    assert "finding" in told[-1].lower()
    assert "#| default_exp" not in text(path, "code")


@pytest.mark.parametrize("path", PAPERMILL, ids=name)
def test_papermill_finds_the_parameters(path):
    tagged = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell with the tag 'parameters', or it injects values too early"
    shown = subprocess.run([BIN / "papermill", "--help-notebook", path], text=True, capture_output=True, check=True).stdout
    for line in "".join(tagged[0]["source"]).splitlines():
        if "=" in line and not line.startswith("#"):
            parameter, comment = line.split("=")[0].split(":")[0].strip(), line.split("#", 1)[-1].strip()
            assert f"{parameter}: " in shown, f"{parameter} is not in --help-notebook"
            assert "#" in line and comment.split()[0] in shown, f"{parameter} is not explained"
