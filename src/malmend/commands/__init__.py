"""What the command line does, as functions with the same words; results are objects."""
