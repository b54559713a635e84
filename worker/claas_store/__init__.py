"""Adapter versions in an object store or a folder: read, write, verify, create. Never imports torch."""
