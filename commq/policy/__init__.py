"""Policies: which parameters travel in which format, and when."""
