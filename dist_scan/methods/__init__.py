"""One file per method; `kind: moco` is found as moco.py."""
