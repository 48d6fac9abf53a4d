"""Show `#| export` as a badge that links to the module's page.

The directives of nbdev at the head of a cell are for the exporter. A reader
sees a badge instead, and a cell of nothing but directives is not shown.
"""

import re

from docutils import nodes
from sphinx import addnodes

DIRECTIVE = re.compile(r"#\|\s*(\w+):?\s*(.*)")


def split(source):
    """Separate the directives at the head of a cell from its code."""
    directives, lines = {}, source.split("\n")
    while lines and (match := DIRECTIVE.match(lines[0])):
        directives[match[1]] = match[2].strip()
        lines.pop(0)
    return directives, "\n".join(lines).strip("\n")


def make_badge(module, page):
    """Make a paragraph with a link to the module in the API page."""
    link = addnodes.pending_xref(
        "", nodes.inline("", module.replace(".", "/") + ".py"),
        refdomain="py", reftype="mod", reftarget=module,
        refexplicit=True, refwarn=True, refdoc=page,
    )
    label = nodes.inline("", "goes into ", classes=["export-label"])
    return nodes.paragraph("", "", label, link, classes=["export-badge"])


def is_cell(node):
    """Tell whether a node is a notebook cell."""
    return isinstance(node, nodes.container) and "cell" in node["classes"]


def on_doctree_read(app, doctree):
    """Go over the code cells of one page."""
    module = None
    for cell in list(doctree.findall(is_cell)):
        code = next(cell.findall(nodes.literal_block), None)
        if code is None:
            continue
        directives, source = split(code.astext())
        module = directives.get("default_exp", module)
        if not directives:
            continue
        if not source:
            cell.parent.remove(cell)
            continue
        code.rawsource = source
        code.children = [nodes.Text(source)]
        if "export" in directives and module:
            cell["classes"].append("exported")
            cell.insert(0, make_badge(f"emoformer.{module}", app.env.docname))


def setup(app):
    """Register with Sphinx."""
    app.connect("doctree-read", on_doctree_read)
    return {"version": "1", "parallel_read_safe": True}
