"""Further ways into diffusers: pipeline subclasses and blocks of modular pipelines."""
