"""Models of other authors for docs/gallery.md, as factories for `python -m mi.find`."""
