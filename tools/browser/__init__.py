"""Checks that need a browser; `make report-check` runs them."""
