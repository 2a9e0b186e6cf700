"""What a run leaves: results, tables and pages."""
