"""The formats that a run can be exported in, one file each."""
