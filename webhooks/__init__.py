"""The door: HTTP in, a committed inbox row out."""
