"""Models: the only room that imports open_clip and transformers."""
