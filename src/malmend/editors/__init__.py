"""Editors: from facts to one shift per site."""
