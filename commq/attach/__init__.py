"""Attach: where tensors leave and re-enter torch."""
