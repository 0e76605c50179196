"""Two properties of the built site: its notebooks are never stale, and no page needs a file from elsewhere.

Notebook outputs are cached by their source alone, but they also depend on the package and on the run folders that
they read. The cache therefore lives in a folder named by a fingerprint of both. MathJax, the one script that Sphinx
takes from a content delivery network, is copied out of an installed wheel instead.
"""
import hashlib
import shutil
from importlib.metadata import distribution
from pathlib import Path

RUN_FILES = ("[!.]*/*.json", "[!.]*/history.csv", "[!.]*/figures/*.png")


def fingerprint(root):
    """Hash of everything a notebook's output depends on besides its own source."""
    files = [*root.glob("seqjepa_nb/*.py"), *root.glob("book/*.json"), *root.glob("README.md")]
    for runs in (root / "runs", root / "book" / "runs"):
        files += [p for name in RUN_FILES for p in runs.glob(name)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def mathjax():
    """Path of MathJax 3's one-file build, as the sphinx-mathjax-offline wheel carries it."""
    files = distribution("sphinx-mathjax-offline").files
    return next(Path(f.locate()) for f in files if f.name == "tex-svg.js")


def prepare(app, config):
    caches = Path(app.outdir).parent / ".jupyter_cache"
    mark = fingerprint(Path(app.srcdir).resolve().parent)
    for old in caches.glob("*"):
        if old.name != mark:
            shutil.rmtree(old)
    config.nb_execution_cache_path = str(caches / mark)
    config.html_static_path.append(str(mathjax()))
    config.mathjax_path = "tex-svg.js"


def read_notebooks_again(app, env, added, changed, removed):
    """Sphinx keeps a page whose source did not change; a notebook's page may change all the same."""
    return [d for d in env.found_docs if str(env.doc2path(d)).endswith(".ipynb")]


def setup(app):
    app.connect("config-inited", prepare, priority=100)
    app.connect("env-get-outdated", read_notebooks_again)
    return {"version": "1", "parallel_read_safe": True}
