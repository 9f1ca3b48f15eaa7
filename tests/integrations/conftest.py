"""Scripts that tests run with another program's interpreter are no tests, and cannot be imported here."""

collect_ignore = ["comfyui_core"]
