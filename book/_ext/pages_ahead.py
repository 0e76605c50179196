"""Notebooks are executed two at a time before Sphinx reads them one by one, and wait for it in the cache.

Those that measure speed (4x) are left to their turn, so that nothing runs beside them. A notebook that fails here is not
cached: it fails again in its turn, where the error is reported.
"""
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution
from nbdev_directives import plain
from sphinx.util import logging

AT_ONCE = 2
log = logging.getLogger(__name__)


def waiting(app, docnames, cache):
    """(path, notebook) of the pages to be read that have to be executed, the longest files first."""
    for path in sorted((Path(app.env.doc2path(d)) for d in docnames), key=lambda p: -p.stat().st_size):
        excluded = any(path.match(pattern) for pattern in app.config.nb_execution_excludepatterns)
        if path.suffix == ".ipynb" and not excluded and not path.name.startswith("4"):
            notebook = nbformat.reads(json.dumps(plain(json.loads(path.read_text(encoding="utf-8")))), as_version=4)
            try:
                cache.match_cache_notebook(notebook)
            except KeyError:
                yield path, notebook


def execute(app, env, docnames):
    """Sphinx event, before pages are read."""
    cache = get_cache(app.config.nb_execution_cache_path)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {pool.submit(single_nb_execution, notebook, str(path.parent), app.config.nb_execution_timeout, False): (path, notebook)
                for path, notebook in waiting(app, docnames, cache)}
        for k, job in enumerate(as_completed(jobs), 1):
            (path, notebook), result = jobs[job], job.result()
            if result.err is None:
                cache.cache_notebook_bundle(CacheBundleIn(notebook, str(path), data={"execution_seconds": result.time}),
                                            check_validity=False, overwrite=True)
                log.info(f"{path}: Executed notebook in {result.time:.2f} seconds, {k} of {len(jobs)}")


def setup(app):
    app.connect("env-before-read-docs", execute)
    return {"version": "1", "parallel_read_safe": True}
