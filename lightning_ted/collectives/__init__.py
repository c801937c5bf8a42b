"""Every operation that communicates inside a step, each beside its dual; nothing else in the package does."""
