"""Methods side by side: a plan, its cells, what they gave, and tables and figures of it."""
