"""From a model and facts to one weight shift per site: a method each file."""
