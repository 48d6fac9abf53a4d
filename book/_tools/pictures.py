"""Draw the whole model with one part lit: python book/_tools/pictures.py [folder].

One drawing for each chapter, all alike but for what is lit.
"""

import sys
from pathlib import Path

STATIC = Path(__file__).resolve().parents[1] / "_static"
WIDTH, LEFT, BOX = 420, 60, 220  # the page, and the column of boxes in it
MIDDLE = LEFT + BOX / 2
EMOTIONS = ("anger", "joy", "optimism", "sadness", "fear", "love")
# name, label, height, gap below, and what goes down that gap: its colour and
# its shape
ROWS = (
    ("data", "“not sad, just happy”", 30, 22, "ink-soft", "a post"),
    ("tokens", "tokenizer", 28, 22, "ids", "(batch, seq_len)"),
    ("embedding", "embedding + positions", 28, 30, "embedding",
     "(batch, seq_len, d_model)"),
    ("attention", "attention", 28, 12, "residual", ""),
    ("norm", "add & norm", 24, 12, "residual", ""),
    ("feedforward", "feed-forward", 28, 12, "residual", ""),
    ("norm", "add & norm", 24, 30, "residual", "(batch, seq_len, d_model)"),
    ("pool", "pooling", 28, 22, "residual", "(batch, d_model)"),
    ("head", "head", 28, 22, "logits", "(batch, num_labels)"),
    ("scores", "", 44, 0, "", ""),
)
# chapter: the rows that are lit, and what the drawing shows
CHAPTERS = {
    "data": ({"data"}, "the post at the top"),
    "tokens": ({"tokens"}, "the tokenizer"),
    "embedding": ({"embedding"}, "the embedding with its positions"),
    "attention": ({"attention"}, "attention inside the encoder layer"),
    "feedforward": (
        {"feedforward"}, "the feed-forward layer inside the encoder layer"),
    "encoder": (
        {"attention", "norm", "feedforward"}, "the whole encoder layer, N times"),
    "classifier": ({"pool", "head", "scores"}, "pooling, head and the six scores"),
    "training": (
        {"embedding", "attention", "norm", "feedforward", "head", "loss"},
        "every part with parameters, and the loss that teaches them",
    ),
    "evaluation": ({"scores"}, "the six scores, and how they compare with the truth"),
    "pretraining": (
        {"embedding", "attention", "norm", "feedforward", "head", "words"},
        "every part with parameters, and a second head that guesses hidden words",
    ),
    "finetuning": (
        {"head", "scores", "loss"},
        "a new head, and the loss that teaches it fast and the rest slowly",
    ),
    "bert": (
        {"tokens", "embedding", "attention", "norm", "feedforward"},
        "all that a checkpoint's folder fills: tokenizer, embedding and layers",
    ),
}


def box(x, y, width, height, label, lit):
    """Draw one box with its label in the middle."""
    fill, line, size = ("lit, #ffe2a8", "ink, #222222", 2.5) if lit else (
        "box, #f4f2ec", "line, #999999", 1)
    ink = "ink, #222222" if lit else "ink-soft, #666666"
    weight = ' font-weight="bold"' if lit else ""
    text = label.replace("&", "&amp;")
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="var(--emo-{fill})" stroke="var(--emo-{line})" '
        f'stroke-width="{size}"/>\n'
        f'<text x="{x + width / 2:g}" y="{y + height / 2 + 5:g}" '
        f'text-anchor="middle"{weight} fill="var(--emo-{ink})">{text}</text>\n'
    )


COLOURS = {
    "ink-soft": "#666666", "ids": "#7a7a7a", "embedding": "#56b4e9",
    "residual": "#e69f00", "logits": "#8a7a00",
    "anger": "#d55e00", "joy": "#e69f00", "optimism": "#009e73",
    "sadness": "#0072b2", "fear": "#5e4b8b", "love": "#cc79a7",
}


def arrow(points, colour, dashed=False, width=2):
    """Draw a line through points with a small head at its end."""
    (x0, y0), (x, y) = points[-2:]
    if x0 == x:
        head = [(x - 4, y - 6), (x, y), (x + 4, y - 6)] if y > y0 else [
            (x - 4, y + 6), (x, y), (x + 4, y + 6)]
    else:
        back = -6 if x > x0 else 6
        head = [(x + back, y - 4), (x, y), (x + back, y + 4)]
    path = "M" + " L".join(f"{a:g} {b:g}" for a, b in points)
    tip = "M" + " L".join(f"{a:g} {b:g}" for a, b in head)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    stroke = f'fill="none" stroke="var(--emo-{colour}, {COLOURS[colour]})"'
    return (
        f'<path d="{path}" {stroke} stroke-width="{width}"{dash}/>\n'
        f'<path d="{tip}" {stroke} stroke-width="{width}"/>\n'
    )


def scores(y, lit):
    """Draw six small bars, one for each emotion."""
    parts = [box(20, y, 300, 44, "", lit)]
    ink = "ink, #222222" if lit else "ink-soft, #666666"
    for x, tall, name in zip(
        (44, 83, 134, 196, 244, 286), (5, 16, 9, 7, 4, 11), EMOTIONS, strict=True
    ):
        parts.append(
            f'<rect x="{x - 9:g}" y="{y + 24 - tall:g}" width="18" '
            f'height="{tall}" fill="var(--emo-{name}, {COLOURS[name]})" '
            f'opacity="{1 if lit else 0.55}"/>\n'
            f'<text x="{x:g}" y="{y + 38:g}" font-size="13" text-anchor="middle" '
            f'fill="var(--emo-{ink})">{name}</text>\n'
        )
    return "".join(parts).replace(
        f'<text x="170" y="{y + 27:g}" text-anchor="middle"', "<text", 1)


def draw(chapter):
    """Draw the model with the parts of one chapter lit."""
    lit, what = CHAPTERS[chapter]
    parts, places, y = [], [], 6
    for name, label, height, gap, colour, shape in ROWS:
        places.append((y, height))
        if name == "scores":
            parts.append(scores(y, name in lit))
        else:
            parts.append(box(LEFT, y, BOX, height, label, name in lit))
        if gap:
            bottom = y + height
            parts.append(arrow(
                [(MIDDLE, bottom + 1), (MIDDLE, bottom + gap - 2)], colour))
            if shape:
                # beside the arrow, and clear of the frame of the layer
                low = bottom + (gap - (10 if name == "embedding" else 0)
                                + (10 if label == "add & norm" else 0)) / 2 + 4
                parts.append(
                    f'<text x="{MIDDLE + 12:g}" y="{low:g}" font-size="13" '
                    f'font-family="monospace" '
                    f'fill="var(--emo-ink-soft, #666666)">{shape}</text>\n'
                )
        y += height + gap
    # the frame of the layer, and the two ways around its sublayers
    top, end = places[3][0] - 11, sum(places[6]) + 9
    frame = (
        f'<rect x="{LEFT - 32}" y="{top}" width="{BOX + 44}" '
        f'height="{end - top}" rx="10" fill="none" '
        'stroke="var(--emo-line, #999999)" stroke-width="'
        f'{2.5 if chapter == "encoder" else 1}" stroke-dasharray="5 4"/>\n'
        f'<text x="{LEFT + BOX + 22}" y="{(top + end) / 2 - 3:g}" '
        'fill="var(--emo-ink-soft, #666666)">encoder</text>\n'
        f'<text x="{LEFT + BOX + 22}" y="{(top + end) / 2 + 15:g}" '
        'fill="var(--emo-ink-soft, #666666)">layer × N</text>\n'
    )
    around = "".join(
        arrow([
            (MIDDLE, places[i][0] - 6), (LEFT - 14, places[i][0] - 6),
            (LEFT - 14, places[i + 1][0] + 12), (LEFT - 2, places[i + 1][0] + 12),
        ], "residual")
        for i in (3, 5)
    )
    teach = ""
    if chapter == "training":
        row = places[-1][0] + 8
        teach = (
            arrow([(321, row + 14), (338, row + 14)], "logits")
            + box(341, row, 70, 28, "loss", True)
            + arrow([(400, row - 2), (400, places[2][0] + 14),
                     (LEFT + BOX + 4, places[2][0] + 14)], "ink-soft", True)
        )
    if chapter == "evaluation":
        row = places[-1][0] + 8
        teach = (
            arrow([(321, row + 14), (338, row + 14)], "logits")
            + box(341, row - 62, 70, 28, "truth", False)
            + arrow([(376, row - 33), (376, row - 3)], "ink-soft")
            + box(341, row, 70, 28, "F1 ± ?", True)
        )
    if chapter == "pretraining":
        row, turn = places[7][0], sum(places[6]) + 5  # still inside the frame
        teach = (
            arrow([(MIDDLE, turn), (396, turn), (396, row - 2)], "residual")
            + box(341, row, 70, 28, "words", True)
        )
    if chapter == "finetuning":
        row, right = places[-1][0] + 8, LEFT + BOX
        heights = (places[-2][0] + 14, places[5][0] + 22, places[2][0] + 14)
        ends = (right + 5, right + 16, right + 4)  # head, frame, embedding
        teach = arrow([(321, row + 14), (338, row + 14)], "logits") + "".join(
            arrow([(388 + 10 * i, row - 2), (388 + 10 * i, y0), (x, y0)],
                  "ink-soft", True, (4, 2, 1)[i])
            for i, (y0, x) in enumerate(zip(heights, ends, strict=True))
        ) + box(341, row, 70, 28, "loss", True)
    if chapter == "bert":
        row, right, x = places[2][0], LEFT + BOX, 398  # clear of the shapes' text
        teach = (
            arrow([(x, row - 2), (x, places[1][0] + 14), (right + 4, places[1][0] + 14)],
                  "ink-soft", True)
            + arrow([(339, row + 14), (right + 4, row + 14)], "ink-soft", True)
            + arrow([(x, row + 30), (x, places[5][0] + 22), (right + 16, places[5][0] + 22)],
                    "ink-soft", True)
            + box(341, row, 70, 28, "folder", True)
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 6}" '
        f'width="{WIDTH}" height="{y + 6}" font-family="sans-serif" '
        'font-size="14">\n'
        f"<title>The model, lit: {what}</title>\n"
        "<desc>From top to bottom: a post, the tokenizer, embedding and "
        "positions, N encoder layers of attention, add and norm, feed-forward, "
        "add and norm, then pooling, the head, and six scores. Lit is "
        f"{what}.</desc>\n"
        f"{frame}{around}{''.join(parts)}{teach}</svg>\n"
    )


def main(folder=STATIC):
    """Write all drawings into a folder."""
    for chapter in CHAPTERS:
        path = Path(folder) / f"model-{chapter}.svg"
        path.write_text(draw(chapter), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
