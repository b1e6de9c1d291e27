"""Where on a picture of a person cloth is repainted, found by human parsing and dense pose."""
