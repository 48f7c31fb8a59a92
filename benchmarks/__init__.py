"""Programs that measure: each prints a table, and writes it as JSON where asked to."""
