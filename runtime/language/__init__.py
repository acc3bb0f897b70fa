"""Decoders of language models: how they are run, judged and timed."""
