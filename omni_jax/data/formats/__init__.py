"""What a manifest may be: one module a format, each giving the entries of a file or folder."""
