"""The codec winding: Hyper-Compression as published."""
