"""Codecs of two thin matrices, in floats or in codes."""
