"""The formats, a file each; see trainer/model/held/held.py."""
