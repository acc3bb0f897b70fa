"""Models as files and in memory: read, written, walked, changed."""
