"""The codec hash: signed copies of a small shared memory."""
