"""The formats that a run can be exported in, a file each."""
