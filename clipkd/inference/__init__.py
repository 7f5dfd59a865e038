"""Use of an exported model: predict and bench."""
