"""The knowledge memory: entries, versions and edits on disk, encoding, exact search in one process or over actors."""
