"""Labelled rows: read, checked, parted without leaks."""
