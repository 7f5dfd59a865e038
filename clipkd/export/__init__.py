"""Export of a student for other software, with parity checks."""
