"""Examples, one folder each, importable from the repository root."""
