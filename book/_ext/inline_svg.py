"""Put our own drawings into the page itself, so that they follow the theme.

An SVG in an <img> cannot see the page's CSS variables. Inlined it can, and
its colours change with light and dark. The alt text becomes the label that
screen readers read.
"""

import html
import re
from pathlib import Path

from docutils import nodes

# A drawing wider than this would be too small to read on a phone: it keeps
# its size there and scrolls inside its own box.
PHONE = 480


def inline(text, alt, prefix):
    """Turn the text of an SVG file into an element for the page.

    Ids get a prefix, since two drawings of one page may use the same.
    """
    text = re.sub(r"<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE.*?>", "", text, flags=re.S)
    # The title would pop up under the mouse; the alt text says the same.
    text = re.sub(r"<title\b.*?</title>", "", text, flags=re.S)
    text = re.sub(r'\s(?:role|aria-[a-z]+)="[^"]*"', "", text)
    text = re.sub(r'(\sid=")', rf"\g<1>{prefix}", text)
    text = re.sub(r"(url\(#)", rf"\g<1>{prefix}", text)
    text = re.sub(r'(href="#)', rf"\g<1>{prefix}", text)
    label = f'<svg role="img" aria-label="{html.escape(alt)}" '
    text = text.strip().replace("<svg ", label, 1)
    width = re.search(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+)', text)
    wide = width and float(width[1]) > PHONE
    box = 'class="emo-drawing wide" tabindex="0"' if wide else 'class="emo-drawing"'
    return f"<div {box}>{text}</div>"


def on_doctree_resolved(app, doctree, page):
    """Replace the images of one page that are our own drawings."""
    if app.builder.format != "html":
        return
    ours = Path(app.srcdir, "book", "_static")
    slug = re.sub(r"[^a-z0-9]+", "-", page.lower())
    for number, image in enumerate(list(doctree.findall(nodes.image))):
        path = Path(app.srcdir, image["uri"])
        if path.suffix != ".svg" or path.parent != ours:
            continue
        text = inline(
            path.read_text(encoding="utf-8"), image.get("alt", ""),
            f"{slug}-{number}-",
        )
        new = nodes.raw("", text, format="html")
        # A block may not stand inside a paragraph.
        parent = image.parent
        alone = isinstance(parent, nodes.paragraph) and len(parent) == 1
        (parent if alone else image).replace_self(new)


def setup(app):
    """Register with Sphinx."""
    app.connect("doctree-resolved", on_doctree_resolved)
    return {"version": "1", "parallel_read_safe": True}
