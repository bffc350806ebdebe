"""Scores of samples: on digits, by a judge, by Inception."""
