"""Payloads of weights: encoded, calibrated, compared, kept."""
