"""A model and an index behind HTTP: a page to search clips with, and an API that embeds and searches."""
