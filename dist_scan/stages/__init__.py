"""One file per stage; `kind: train` is found as train.py."""
