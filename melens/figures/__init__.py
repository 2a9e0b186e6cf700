"""Plotly figures from tidy data."""
