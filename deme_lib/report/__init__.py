"""Records in, tables and figures out; no torch."""
