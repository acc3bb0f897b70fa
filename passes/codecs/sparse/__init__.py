"""The codec sparse: only the elements of a weight that are not zero."""
