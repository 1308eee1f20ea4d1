"""The operators of replacements.py, a file each."""
