"""Features of frozen models on disk: what `clipkd cache` writes and `teacher.cache` reads."""
