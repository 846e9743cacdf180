"""Students, teachers and their export."""
