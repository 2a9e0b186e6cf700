"""Plotly figures from tidy data: curves, heatmaps, attention maps, scores, and the style they share."""
