"""The formats that bases are stored in, a file each, behind the protocol in trainer/base/base.py."""
