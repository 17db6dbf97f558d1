"""Codecs: numbers to bits and back. Codecs know no ranks. Start with `reference.py`, the specification."""
