"""Feedback: what encoding lost, kept for the next step. Knows neither formats nor ranks."""
