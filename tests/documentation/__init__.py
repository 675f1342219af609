"""Holds pages to the code, and runs what they show."""
