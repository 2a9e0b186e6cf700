"""Write a figure as a file: a page for the browser, or an image for a paper.

    melens.figures.save(figure, "emergence.pdf", columns=1)      # .pdf, .svg or .png: 3.25 inches wide, 8-point text
    melens.figures.save(figure, "emergence.html")                # a page to look at, also on a phone

plotly draws images with kaleido, which drives a Chrome or Chromium: `check_images` tells early whether both are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import plotly.graph_objects as go
import plotly.io
from plotly.io.base_renderers import ImageRenderer
from plotly.offline import get_plotlyjs

from melens.environment.extras import check_extra
from melens.errors import MelensError
from melens.figures.fitting import fit, in_columns
from melens.storage.files import atomic_file, explain_write_errors, write_text

__all__ = ["IMAGES", "check_images", "for_screens", "in_notebook", "page", "save", "save_images"]

IMAGES = ("svg", "pdf", "png")
_PNG_SCALE = 4  # 384 pixels an inch
_PHONE, _PHONE_TEXT = 380.0, 12.0  # pixels


def save(figure: go.Figure, path: str | Path, *, columns: int = 1) -> Path:
    """Write a figure as .pdf, .svg or .png for a paper, or as .html for a browser; return the path.

    Args:
        figure: as `result.figures[...].plot` holds it.
        path: its suffix decides.
        columns: of the paper that an image is to fill: 1 (3.25 inches) or 2 (6.75 inches). The text in it has 8 points.
            Title and note are left out, as a caption says them.

    Raises:
        MelensError: another suffix or number of columns, a folder that cannot be written to, or kaleido or a Chrome
            that is missing.
    """
    path = Path(path)
    if columns not in (1, 2):
        raise MelensError(f"columns is {columns!r}; it must be 1 or 2.")
    if path.suffix not in (".html", *(f".{kind}" for kind in IMAGES)):
        raise MelensError(f"{path.name} must end in .pdf, .svg, .png or .html: the suffix says what to write.")
    if path.suffix == ".html":
        return write_text(path, page(figure))
    check_images(f"Writing {path.name}")
    save_images([(figure, path, columns)])
    return path


def save_images(images: Iterable[tuple[go.Figure, Path, int]]) -> list[Path]:
    """Write several images with one start of the browser: of each the figure, its path and the columns to fill."""
    images = list(images)
    if not images:
        return []
    figures, paths, columns = zip(*images, strict=True)
    fitted = [in_columns(figure, number) for figure, number in zip(figures, columns, strict=True)]
    sizes = {side: [int(figure.layout[side]) for figure in fitted] for side in ("width", "height")}
    with TemporaryDirectory(prefix="melens-") as folder:
        drawn = [Path(folder) / f"{number}{path.suffix}" for number, path in enumerate(paths)]
        scales = [_PNG_SCALE if path.suffix == ".png" else 1 for path in paths]
        try:
            with _drawn_by(Path(folder) / "plotly.js"):
                plotly.io.write_images(fitted, drawn, scale=scales, **sizes)
        except Exception as error:  # kaleido's are of many kinds
            raise MelensError(f"{paths[0]} could not be drawn: {_reason(error)}.") from error
        for source, path in zip(drawn, paths, strict=True):
            with explain_write_errors(path.parent), atomic_file(path) as partial:
                partial.write_bytes(source.read_bytes())
    return list(paths)


@contextmanager
def _drawn_by(script: Path) -> Iterator[None]:
    """Let kaleido draw with a plotly.js whose pages name their figure and have no margins.

    Else a PDF has a border of a tenth of an inch, into which the figure's foot is cut, and is called "Kaleido-fier".
    """
    script.write_text(get_plotlyjs() + _PAGES_OF_FIGURES, "utf-8")
    before, plotly.io.defaults.plotlyjs = plotly.io.defaults.plotlyjs, str(script)
    try:
        yield
    finally:
        plotly.io.defaults.plotlyjs = before


_PAGES_OF_FIGURES = """
document.head.appendChild(document.createElement("style")).textContent = "@page { margin: 0 }";
const drawFigure = Plotly.toImage;
Plotly.toImage = (figure, ...how) => {
  document.title = figure.layout?.meta?.title ?? "";
  return drawFigure(figure, ...how);
};
"""


@cache
def check_images(purpose: str) -> None:
    """Raise a `MelensError` where images cannot be drawn here: an empty one is tried, which takes a second.

    Args:
        purpose: what they are needed for: "figures=pdf".
    """
    check_extra("figures", purpose)
    try:
        go.Figure().to_image("svg", width=10, height=10)
    except Exception as error:  # kaleido's are of many kinds
        raise MelensError(
            f"{purpose} needs a Chrome or Chromium that starts ({_reason(error)}): install one, as with "
            "`apt-get install chromium`, or run `plotly_get_chrome`."
        ) from error


def page(figure: go.Figure, *, plotlyjs: str | None = None) -> str:
    """Return the HTML page of a figure, laid out by whether it is opened on a wide or on a narrow screen.

    Args:
        figure: its title becomes the page's.
        plotlyjs: where plotly.js lies, from the page; by default the page contains it and needs no other file.
    """
    title, _, note = (figure.layout.title.text or "").partition("<br><sub>")
    title, note = (text.replace("</sub>", "").replace("<br>", " ") for text in (title, note))
    library = f'<script src="{plotlyjs}"></script>' if plotlyjs else f"<script>{get_plotlyjs()}</script>"
    return _PAGE.format(title=escape(title), note=escape(note), library=library, figure=for_screens(figure))


def for_screens(figure: go.Figure) -> str:
    """Return a figure without its title, as a page's script draws it: JSON, of which no text can end the script.

    `wide` has the data and a layout, `narrow` the layout for a phone: with the buttons, and without the toolbar's
    zooming, so that a finger that moves over the figure scrolls the page.
    """
    wide = go.Figure(figure.data, _without_title(figure))
    narrow = go.Figure(layout=fit(figure, _PHONE, _PHONE_TEXT).layout).update_layout(dragmode=False)
    if figure.layout.updatemenus:
        above = 70 - narrow.layout.margin.t  # what buttons and the panels' titles need
        narrow.update_layout(height=narrow.layout.height + above, margin_t=70, updatemenus=figure.layout.updatemenus)
    return f'{{"wide": {wide.to_json()}, "narrow": {narrow.to_json()}}}'  # plotly writes "<" as \\u003c


def in_notebook(figure: go.Figure) -> go.Figure:
    """Return a figure as a notebook shows it: without buttons where plotly draws images, as nobody can press them."""
    renderers = [plotly.io.renderers[name] for name in (plotly.io.renderers.default or "").split("+") if name]
    if not any(isinstance(each, ImageRenderer) for each in renderers):
        return figure
    still = go.Figure(figure)
    still.layout.updatemenus = ()
    return still


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def _without_title(figure: go.Figure) -> go.Layout:
    layout = go.Figure(figure).layout
    above, height = layout.margin.t or 100, layout.height or 500
    spare = above - (104 if layout.updatemenus else 34)  # what the toolbar, buttons and the panels' titles need
    return layout.update(title=None, height=height - spare, margin_t=above - spare)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ font: 16px Helvetica, Arial, sans-serif; color: #222; margin: 12px; }}
h1 {{ font-size: 20px; font-weight: normal; margin: 0; }} p {{ font-size: 14px; margin: 6px 0; }}</style>
{library}
</head>
<body>
<h1>{title}</h1>
<p>{note}</p>
<div id="figure"></div>
<script>
const figure = {figure};
const narrow = matchMedia("(max-width: 700px)");
function draw() {{
  const {{ layout }} = narrow.matches ? figure.narrow : figure.wide;
  const options = {{ responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover" }};
  Plotly.newPlot("figure", figure.wide.data, layout, options);
}}
draw();
narrow.addEventListener("change", draw);
</script>
</body>
</html>
"""
