"""Models of other authors for docs/gallery.md: factories for `python -m mi.find`, and the page."""
