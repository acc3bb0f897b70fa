"""Payloads to nodes and function bodies, and back."""
