"""The formats, a file each; see trainer/model/held/__init__.py."""
