"""Annotations, data sets and batches, and the demo world of stories."""
