"""Formats of quantised weights: which stored tensors make a weight, and how; one file per method."""
