"""Sampling: the decoding loop, what turns its output into pixels, and many images as files."""
