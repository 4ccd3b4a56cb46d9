"""Rows in, tokenized documents out; text that two data sets share."""
