"""The documentation as a site: pages made from the code, the hooks of its build, and the tests that hold pages to the code."""
