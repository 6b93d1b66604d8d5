"""Comparison of several configs over several seeds on the same data."""
