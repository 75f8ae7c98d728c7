"""One HTML page that holds everything: tables, plots and where each figure stands in report.json."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from specauf.evaluation.plots import Figure
from specauf.evaluation.report import (
    cache_line,
    comparison_lines,
    footer,
    interval,
    lossless_lines,
    prompt_count,
    runs_table,
    slot_table,
    title,
)

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem} h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;font-size:.85rem;margin:.6rem 0} .wide{overflow-x:auto}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #eee} th:first-child,td:first-child{text-align:left}
figure{margin:1rem 0} figure svg{width:100%;height:auto} figcaption,.field{font-size:.8rem;color:#666}
.cards{display:flex;flex-wrap:wrap;gap:1rem} .card{border:1px solid #ddd;border-radius:8px;padding:.6rem 1.1rem}
.card b{display:block;font-size:1.7rem} .good{color:#176b2c} .bad{color:#a11}
"""


def html(record: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The record as one self-contained page: no script, nothing fetched.

    Args:
        record: of `evaluation_record` or of `join`.
        figures: of `plots.figures`.
    """
    body = [f"<h1>{escape(title(record))}</h1>", _cards(record)]
    if "cache" in record:
        body.append(f"<p>{escape(cache_line(record))} <span class=field>cache.*</span></p>")
    for i, part in enumerate(record["parts"]):
        bench = part["benchmark"]
        head = f"{bench['name']}, {bench['setting']}, {prompt_count(bench)}"
        body += [f"<h2>{escape(head)}</h2>", _table(*runs_table(part["runs"]))]
        body.append(f"<p class=field>report.json: parts[{i}].runs.*</p>")
        body += [
            f"<p>{escape(line)} <span class=field>parts[{i}].comparisons</span></p>" for line in comparison_lines(part)
        ]
        body += [_figure(figure) for figure in figures if figure.fields.startswith(f"parts[{i}].")]
        body += [
            "<p>Share of cycles that accept slot k:</p>",
            _table(*slot_table(part["runs"])),
            f"<p class=field>parts[{i}].runs.*.accepted_per_slot</p>",
        ]
    body += [f"<h2>{figure.title}</h2>{_figure(figure)}" for figure in figures if figure.fields.startswith("training")]
    body.append("<h2>Is the output the target's own?</h2>")
    body += [f"<p>{escape(line)}</p>" for line in lossless_lines(record) if line]
    body += ["<p class=field>report.json: lossless, divergences</p>", f"<p class=field>{escape(footer(record))}</p>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title(record))}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _cards(record: Mapping[str, Any]) -> str:
    cards = []
    for name, run in record["runs"].items():
        spread = interval(run, "tau_pooled_95", 3)
        cards.append(
            f"<div class=card>{escape(name)}<b>{run['tau_pooled']:.3f}</b>tokens a cycle, {spread}<br>"
            f"speed-up {run['speedup']:.2f}</div>"
        )
    if record["lossless"] is not None:
        word, colour = ("yes", "good") if record["lossless"] else ("no", "bad")
        cards.append(f"<div class=card>lossless<b class={colour}>{word}</b>against generate</div>")
    bench = record["benchmark"]
    where = f"{bench['name']}, {bench['setting']}, {prompt_count(bench)}"
    return f"<div class=cards>{''.join(cards)}</div><p class=field>{escape(where)}; report.json: runs, lossless</p>"


def _figure(figure: Figure) -> str:
    caption = f"{escape(figure.title)}. report.json: {escape(figure.fields)}"
    return f"<figure>{figure.svg}<figcaption>{caption}</figcaption></figure>"


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
