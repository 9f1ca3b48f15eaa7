"""Pipeline subclasses, and blocks for modular pipelines."""
