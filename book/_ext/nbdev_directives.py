"""Let Sphinx read nbdev notebooks: `#|` lines become cell tags and disappear from the page; long names in a table's heads may
break, names of published runs lead to their pages."""
import json
import re

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.+?)\s*$")
TAGS = {
    "hide": "remove-cell",
    "include: false": "remove-cell",
    "echo: false": "remove-input",
    "code-fold": "hide-input",
    "code-fold: true": "hide-input",
    "eval: false": "skip-execution",
}
PARAMETERS = {"parameters": "remove-cell", "injected-parameters": "hide-input"}  # a run's page names them in its command


def translate(cell):
    """Move a code cell's directives into its tags, and parameters out of sight; None where nothing is left to run or show."""
    lines = "".join(cell["source"]).splitlines()
    directives = [m[1] for line in lines if (m := DIRECTIVE.match(line))]
    source = "\n".join(line for line in lines if not DIRECTIVE.match(line)).strip("\n")
    if not source or "nbdev_export(" in source:
        return None
    tags = cell["metadata"].get("tags", [])
    tags = tags + [TAGS[d] for d in directives if d in TAGS] + [PARAMETERS[t] for t in tags if t in PARAMETERS]
    metadata = {**cell["metadata"], "tags": tags} if tags else cell["metadata"]
    return {**cell, "source": source, "metadata": metadata}


def plain(notebook):
    """A notebook without nbdev's directives."""
    cells = (c if c["cell_type"] != "code" else translate(c) for c in notebook["cells"])
    return {**notebook, "cells": [c for c in cells if c is not None]}


def source_read(app, docname, source):
    """Sphinx event: rewrite the text of one notebook before it is parsed."""
    if str(app.env.doc2path(docname)).endswith(".ipynb"):
        source[0] = json.dumps(plain(json.loads(source[0])))


def plain_sentence(app, what, name, obj, options, lines):
    """Sphinx event: keep napoleon from taking what stands before a colon in a value's docstring for its type."""
    if what in ("data", "attribute", "property"):
        lines.insert(0, "")


def breakable_heads(app, pagename, templatename, context, doctree):
    """Sphinx event: let the names in the heads of tables go on in the next line after an underscore."""
    if body := context.get("body"):
        context["body"] = re.sub(r"(<th(?: [^>]*)?>)([^<]+)(?=</th>)", lambda m: m[1] + m[2].replace("_", "_<wbr>"), body)


def linked_runs(app, pagename, templatename, context, doctree):
    """Sphinx event: make a link of each name of a published run that fills an element of its own, be it a
    word of code or a table's cell."""
    pages = {name.split("/")[1]: name for name in app.env.found_docs if name.startswith("runs/")}
    if (body := context.get("body")) and not pagename.startswith("runs/"):
        link = lambda m: f'<a class="reference internal" href="{context["pathto"](pages[m[0]])}">{m[0]}</a>' if m[0] in pages else m[0]
        context["body"] = re.sub(r"(?<=>)\w+-[\w.-]+(?=</(?:span|td|th)>)", link, body)


def setup(app):
    app.connect("source-read", source_read)
    app.connect("html-page-context", breakable_heads)
    app.connect("html-page-context", linked_runs)
    app.connect("autodoc-process-docstring", plain_sentence, priority=400)
    return {"version": "1", "parallel_read_safe": True}
