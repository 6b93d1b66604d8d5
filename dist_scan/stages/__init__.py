"""The stages of the pipeline, one file each: `kind: train` is train.py."""
