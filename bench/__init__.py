"""How fast it is, beside the usual designs and beside what the same servers can do at most: `make bench`."""
