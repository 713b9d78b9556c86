"""An edit on its way to others, and what becomes of it: adapters, merged models."""
