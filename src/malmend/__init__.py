"""malmend."""
