"""How the networks of the miniature world were trained: one command a file."""
