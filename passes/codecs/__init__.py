"""Codecs: ways to store one weight. `CODECS` is the registry."""
