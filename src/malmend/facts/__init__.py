"""Facts: what is edited and what is asked."""
