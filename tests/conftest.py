"""Its place makes tests/helpers.py importable from every folder of tests."""
