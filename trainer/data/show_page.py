"""Write samples as a page for a browser, with what is trained on in colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from trainer.data.show import Sample

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --trained: #c9f2d0; --text: #1c1c1c; --muted: #6a6a6a; --paper: #fff; --line: #ddd }}
@media (prefers-color-scheme: dark) {{
  :root {{ --trained: #14532d; --text: #e6e6e6; --muted: #9a9a9a; --paper: #161616; --line: #333 }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1rem; margin: 2rem 0 .25rem; overflow-wrap: anywhere }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
      padding: .75rem; margin: 0; color: var(--muted); tab-size: 4 }}
mark {{ background: var(--trained); color: var(--text); border-radius: 3px }}
ul {{ padding-left: 1.2rem; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<p>The loss counts <mark>what is marked</mark>; the rest is read, but not learned.</p>
<ul>
{summary}
</ul>
{samples}
</html>
"""


def page(samples: Iterable[Sample], summary: Sequence[str]) -> str:
    """Return an HTML page of the samples, without scripts or anything loaded from elsewhere. `summary` has a line for
    each source."""
    return _PAGE.format(
        title="What is trained on",
        summary="\n".join(f"<li>{escape(line.strip())}</li>" for line in summary),
        samples="\n".join(map(_section, samples)),
    )


def _section(sample: Sample) -> str:
    runs = (f"<mark>{escape(text)}</mark>" if trained else escape(text) for text, trained in sample.runs)
    # The first line end after <pre> is not shown.
    return f"<h2>{escape(sample.heading)}</h2>\n<pre>\n{''.join(runs)}</pre>"
