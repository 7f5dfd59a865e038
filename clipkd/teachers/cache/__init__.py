"""`clipkd cache`: compute the teachers' features once."""
