"""What is killed, breaks or races, tried for real: `python -m tests.faults` runs every test marked `fault`, wherever it
stands, and prints a table.
"""
