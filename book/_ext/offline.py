"""Make the built pages ask no other host for anything.

MathJax comes from a pip package instead of a content network, and Thebe
(live code, which loads itself from one) is left out.
"""

import importlib.util
import shutil
from pathlib import Path

# Two pieces of the package: 1.7 of its 24 MB.
SCRIPT = "tex-chtml-full.js"
FONTS = "output/chtml/fonts/woff-v2"


def copy_mathjax(app, exception):
    """Copy MathJax beside the other static files."""
    if exception or app.builder.format != "html":
        return
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(package.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    shutil.copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)
    shutil.copy(source / SCRIPT, target / SCRIPT)


def setup(app):
    """Register with Sphinx, and take out what sphinx_thebe registered."""
    for event, hooks in app.events.listeners.items():
        app.events.listeners[event] = [
            hook for hook in hooks
            if not hook.handler.__module__.startswith("sphinx_thebe")
        ]
    app.registry.css_files[:] = [
        entry for entry in app.registry.css_files
        if entry[0] != "sphinx-thebe.css"
    ]
    app.config.mathjax_path = f"mathjax/{SCRIPT}"
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True}
