"""Plotly figures from tidy data: curves, heatmaps, attention maps, scores, and the style they share.

Of every figure `title` stands above, `note` in small below that, and `me_layer` is the 0-based block that is marked, or
None. `save` writes one for a paper or as a page: `melens.figures.save(figure, "emergence.pdf", columns=2)`.
"""

from melens.figures.saving import save

__all__ = ["save"]
