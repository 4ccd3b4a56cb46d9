"""Rows in, documents of tokens out; text that stands in two data sets."""
