"""The checks of the rows, a module for each group; importing this package registers them."""

from importlib import import_module

GROUPS = (
    *("http", "ssrf", "fetch", "images", "masks", "keys", "load", "model", "aws", "weights", "lifecycle", "privacy"),
    *("doors", "deploy"),
)

for _name in GROUPS:
    import_module(f"{__name__}.{_name}")
