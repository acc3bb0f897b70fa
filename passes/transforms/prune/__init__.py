"""Structured pruning: channels, neurons and heads are taken out of the graph itself."""
