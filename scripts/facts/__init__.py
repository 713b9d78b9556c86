"""What scripts/make_facts.py is made of: sources, wording, and how facts are drawn and written."""
