"""What is measured rather than tested: tables and ratios for the README. Each says the command that makes it."""
