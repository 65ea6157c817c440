"""The vision demo's page: results by arm, and pictures with questions and everybody's answers.

One idea: one self-contained HTML file; pictures are data URLs, and every text is escaped.
"""

import base64
from html import escape
from typing import Any

from stillroom.stages.demos.vision_findings import in_words

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #bbb }
img { width: 96px; height: 96px; image-rendering: pixelated; border: 1px solid #bbb }
.wrong { color: #b00020; font-weight: 600 }
"""


def page(results: dict[str, Any], pictures: list[Any], shown: dict[str, list]) -> str:
    """The page as HTML.

    Args:
        results: as in results.json.
        pictures: the first test pictures.
        shown: model -> its answers per picture.
    """
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>Vision demo</title><style>{STYLE}</style></head><body><h1>Vision demo</h1>"
        f"{_arms(results)}{_probes(results)}{_examples(pictures, shown)}</body></html>\n"
    )


def _arms(results: dict[str, Any]) -> str:
    rows = [
        [arm, in_words(found["accuracy"]), in_words(found["probe"])]
        for arm, found in results["arms"].items()
    ]
    head = ["arm", "test accuracy", "mean probe cosine"]
    blind = results["blind_accuracy"]
    compared = [
        ["the teacher", f"{results['teacher_accuracy']:.3f}", ""],
        ["blind: most common answer to each question", f"{blind['question']:.3f}", ""],
        ["blind: most common answer", f"{blind['majority']:.3f}", ""],
    ]
    intro = (
        f"<p>{results['test_questions']} questions about {results['test_pictures']} test pictures; "
        "mean ± standard error over seeds.</p>"
    )
    return intro + _table(head, compared + rows)


def _probes(results: dict[str, Any]) -> str:
    rows = []
    for arm, found in results["arms"].items():
        seeds = list(found["seeds"].values())
        for target, layers in seeds[0]["probes"].items():
            means = [
                sum(seed["probes"][target][layer] for seed in seeds) / len(seeds)
                for layer in layers
            ]
            rows.append([arm, target, *(f"{mean:.3f}" for mean in means)])
    first = next(iter(results["arms"].values()))["seeds"]["0"]["probes"]
    layers = [f"layer {layer}" for layer in next(iter(first.values()))]
    return "<h2>Probes by layer (0: what needs no student)</h2>" + _table(
        ["arm", "target", *layers], rows
    )


def _examples(pictures: list[Any], shown: dict[str, list]) -> str:
    parts = ["<h2>Pictures</h2>"]
    for number, picture in enumerate(pictures):
        data = base64.b64encode(picture.path.read_bytes()).decode()
        rows = []
        for place, (question, answer) in enumerate(picture.questions):
            answers = [_answer(said[number][place], answer) for said in shown.values()]
            rows.append([escape(question), f"<b>{escape(answer)}</b>", *answers])
        head = ["question", "truth", *shown]
        parts.append(f"<p><img alt='' src='data:image/png;base64,{data}'></p>")
        parts.append(_table(head, rows, safe=True))
    return "".join(parts)


def _answer(said: str, truth: str) -> str:
    return escape(said) if said == truth else f"<span class='wrong'>{escape(said)}</span>"


def _table(head: list[str], rows: list[list[str]], safe: bool = False) -> str:
    cells = [[cell if safe else escape(cell) for cell in row] for row in rows]
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells)
    return f"<table><tr>{top}</tr>{body}</table>"
