"""Everything that touches a model: loading, sites, trunk, capture."""
