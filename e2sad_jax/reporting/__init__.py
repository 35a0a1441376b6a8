"""Tables, provenance, model cards, plots, progress."""
