"""Payloads of weights: encoding, calibration, comparison with dense weights, the cache."""
