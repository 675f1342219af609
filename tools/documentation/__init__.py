"""The build of the documentation: pages made from the code, notebooks as pages, and the hooks of mkdocs."""
